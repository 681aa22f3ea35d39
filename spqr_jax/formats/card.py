"""The model card that stands beside an exported model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_USES = {
    "dense": """These are dense (dequantized) weights. Any program that supports the architecture can run them.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```""",
    "hf-spqr": """The model is in Hugging Face's SpQR format. transformers runs it on NVIDIA GPUs
(`pip install spqr_quant[gpu]`). spqr-jax runs it on every device that JAX supports.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="float16", device_map="cuda")
```

```bash
spqr generate {name} --prompt "..."
```""",
}


def model_card(
    name: str,
    form: str,
    summary: dict[str, Any],
    perplexities: Sequence[dict[str, Any]] = (),
    family: str = "",
) -> str:
    """Markdown with Hugging Face's metadata block.

    Args:
      name: of the model as users will call it.
      form: ``dense`` or ``hf-spqr``.
      summary: of the checkpoint, from `spqr_jax.inspection.summarize`.
      perplexities: what ``spqr perplexity --json`` wrote, any number.
      family: of the model.
    """
    origin = summary["provenance"] or {}
    base = str(origin.get("model", "unknown"))
    metadata = ["library_name: transformers", "pipeline_tag: text-generation", f"tags: [spqr, quantized, {family}]"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        metadata.append(f"base_model: {base}")
    return "\n".join(
        [
            "---",
            *metadata,
            "---",
            "",
            f"# {name}",
            "",
            f"This is `{base}`, quantized with spqr-jax, a JAX implementation of",
            "[SpQR](https://arxiv.org/abs/2306.03078), the sparse-quantized representation of Dettmers et al.",
            "",
            _USES[form].format(name=name),
            "",
            "## How it was quantized",
            "",
            *_table(_facts(summary, origin)),
            "",
            *_command(origin),
            "## Perplexity",
            "",
            *_perplexities(perplexities),
            "",
            "## Configuration",
            "",
            "```json",
            json.dumps(summary["quantization"], indent=2),
            "```",
            "",
        ]
    )


def _facts(summary: dict[str, Any], origin: dict[str, Any]) -> list[tuple[str, str]]:
    calibration = origin.get("calibration")
    text = "none"
    if isinstance(calibration, dict) and {"windows", "seqlen", "data", "seed"} <= set(calibration):
        text = "{windows} windows of {seqlen} tokens from {data}, seed {seed}".format(**calibration)
    elif calibration:
        text = str(calibration)
    head = summary["head_bits"]
    return [
        ("Method", str(origin.get("method", "unknown"))),
        ("Calibration", text),
        (
            "Stored bits per weight",
            f"{summary['stored_bits']:.3f} (matrices of the transformer blocks, every stored byte counted)",
        ),
        ("Bits per weight by the paper's formula", f"{summary['ideal_bits']:.3f}"),
        ("Outliers", f"{summary['outlier_percent']:.2f}%"),
        ("Output head", "dense" if head is None else f"{head:.2f} stored bits per weight"),
        (
            "Size in spqr-jax's format",
            f"{summary['bytes'] / 1e6:.1f} MB (dense model: {summary['dense_bytes'] / 1e6:.1f} MB)",
        ),
    ]


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]


def _command(origin: dict[str, Any]) -> list[str]:
    command = origin.get("command")
    return ["```bash", str(command), "```", ""] if command else []


def _perplexities(results: Sequence[dict[str, Any]]) -> list[str]:
    if not results:
        return ["Perplexity was not measured for this card. To add it, run `spqr perplexity MODEL --data wikitext2"
                " --json FILE`, then export again with `spqr export --perplexity FILE`."]  # fmt: skip
    row = "| {data} | {windows} of {seqlen} tokens | {perplexity:.4f} | {stderr:.4f} |"
    rows = [row.format(**one) for one in results]
    return ["| text | windows | perplexity | standard error |", "| --- | --- | --- | --- |", *rows]
