"""Sound files of every kind, tiny, made when a run begins and the same each time.

Each maker fills a folder of its own with folders, the variants; a variant holds what a reader is given.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax.config import SpQRConfig
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.families import FAMILIES
from spqr_jax.models.weights import Block, Decoder, Outer, block_shapes, outer_shapes
from support.fuzz import mutate_gguf
from support.fuzz.mutate_torch import Coo, torch_bytes

_TEXTS = ["A line of text.", "Another, with numbers 12 345 and naïve 日本 🙂.", "", "  blanks  "]


def small_config(family: str = "llama", **changes: Any) -> DecoderConfig:
    """A decoder of a few thousand weights."""
    values: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_layers": 2, "num_heads": 2,
        "num_kv_heads": 1, "head_dim": 16, "norm_eps": 1e-5, "rope_theta": 10000.0, "max_positions": 64,
        "tied_head": False, "bos_token_id": 1, "eos_token_ids": (2,), "family": family,
    }  # fmt: skip
    particular: dict[str, dict[str, Any]] = {
        "qwen2": {"qkv_bias": True},
        "qwen3": {"qk_norm": True},
        "gemma2": {"norm_offset": 1.0, "post_norms": True, "activation": "gelu_tanh", "tied_head": True,
                   "attention_softcap": 50.0, "logit_softcap": 30.0, "sliding_window": 16, "local_layers": (0,),
                   "query_scale": 0.25, "embedding_scale": 32**0.5},
        "gemma3_text": {"norm_offset": 1.0, "post_norms": True, "activation": "gelu_tanh", "tied_head": True,
                   "qk_norm": True, "sliding_window": 16, "local_layers": (0,), "local_rope_theta": 10000.0,
                   "query_scale": 0.25, "embedding_scale": 32**0.5},
        "falcon": {"norm": "layer", "activation": "gelu", "gated": False, "parallel": True, "shared_norm": True},
        "opt": {"norm": "layer", "activation": "relu", "gated": False, "rope_theta": None, "qkv_bias": True,
                "o_bias": True, "mlp_bias": True, "learned_positions": 66, "position_offset": 2, "num_kv_heads": 2,
                "tied_head": True},
        "gpt2": {"norm": "layer", "activation": "gelu_tanh", "gated": False, "rope_theta": None, "qkv_bias": True,
                 "o_bias": True, "mlp_bias": True, "learned_positions": 64, "num_kv_heads": 2, "tied_head": True},
        "mixtral": {"num_experts": 2, "experts_per_token": 1, "expert_size": 32},
        "qwen3_moe": {"num_experts": 2, "experts_per_token": 1, "expert_size": 32, "qk_norm": True},
    }  # fmt: skip
    return DecoderConfig(**(values | particular.get(family, {}) | changes))


def small_model(config: DecoderConfig) -> Decoder:
    """Random weights, without a program compiled."""
    rng = np.random.default_rng(0)

    def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        return {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}

    blocks = tuple(Block(draw(block_shapes(config, kind)), kind) for kind in config.kinds)
    return Decoder(Outer(**draw(outer_shapes(config))), blocks, config)


# ---- Hugging Face directories ---------------------------------------------------------------------


def hf_configs(folder: Path) -> None:
    """config.json of every family, as transformers writes it and as we do."""
    import transformers

    from support.family_files import VARIANTS, torch_config

    transformers.logging.set_verbosity_error()
    from spqr_jax.models.hf import hf_config

    for number, variant in enumerate(VARIANTS):
        values = torch_config(variant).to_dict() | {"architectures": [f"{VARIANTS[variant][0]}ForCausalLM"]}
        values = {name: value for name, value in values.items() if not name.startswith("_")}
        _write(folder / f"{number:02d}", "config.json", values)
    for family in FAMILIES:
        _write(folder / family, "config.json", hf_config(small_config(family)))


def hf_directories(folder: Path) -> None:
    """Whole models; one in several files, one with a tokenizer."""
    from support.model_files import byte_tokenizer, write_hf

    for family in FAMILIES:
        write_hf(_new(folder / family), small_model(small_config(family)), shards=2 if family == "qwen2" else 1)
    _write(folder / "llama", "generation_config.json", {"eos_token_id": [2, 3], "temperature": 0.6, "top_p": 0.9})
    byte_tokenizer().save_pretrained(folder / "llama")


def safetensors_files(folder: Path) -> None:
    from safetensors.numpy import save_file

    types: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "int32": np.int32, "uint8": np.uint8}
    tensors = {name: np.arange(24).reshape(2, 3, 4).astype(kind) for name, kind in types.items()}
    save_file(
        tensors | {"scalar": np.zeros((), np.float32)}, _new(folder / "one") / "model.safetensors", {"format": "pt"}
    )
    shards = {f"model-0000{n}-of-00002.safetensors": {f"t{n}": np.ones((n, 2), np.float32)} for n in (1, 2)}
    for name, held in shards.items():
        save_file(held, _new(folder / "two") / name)
    where = {tensor: name for name, held in shards.items() for tensor in held}
    _write(folder / "two", "model.safetensors.index.json", {"metadata": {"total_size": 24}, "weight_map": where})


def tokenizers(folder: Path) -> None:
    from support.model_files import byte_tokenizer

    byte_tokenizer().save_pretrained(_new(folder / "alone"))
    special = byte_tokenizer()
    special.add_special_tokens(
        {"eos_token": "<end>", "pad_token": "<pad>", "additional_special_tokens": ["<a>", "<b>"]}
    )
    special.save_pretrained(_new(folder / "special"))
    _write(folder / "special", "config.json", {"model_type": "llama", "vocab_size": 260})


CHAT_TEMPLATES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>",
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message.role == 'assistant' %}{{ message.content | trim + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "{%- if tools %}{{ tools | tojson }}{%- endif %}{%- set ns = namespace(n=0) %}{%- for m in messages[::-1] %}"
    "{%- set ns.n = ns.n + 1 %}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}{{ strftime_now('%d') }}",
)


def chat_templates(folder: Path) -> None:
    from support.model_files import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    for number, template in enumerate(CHAT_TEMPLATES):
        tokenizer.save_pretrained(_new(folder / str(number)))
        (folder / str(number) / "chat_template.jinja").write_text(template)


# ---- GGUF -----------------------------------------------------------------------------------------


def gguf_files(folder: Path) -> None:
    """Every family that has them, in float32 and quantized, with both kinds of tokenizer."""
    import gguf

    from support.family_files import write_gguf

    kinds = (None, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0)
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(name for name, family in FAMILIES.items() if family.gguf and name != "mistral"):
            model = small_model(small_config(name))
            path = write_gguf(Path(scratch) / "m.gguf", model, kinds[number % 3], _gguf_keys(model.config))
            fields = mutate_gguf.parse(Path(path).read_bytes())
            fields.entries += _byte_level_entries() if number % 2 else _sentencepiece_entries()
            fields.count()
            (_new(folder / name) / "model.gguf").write_bytes(fields.to_bytes())


def _gguf_keys(config: DecoderConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if config.sliding_window is not None:
        keys["attention.sliding_window"] = config.sliding_window
    if config.attention_softcap is not None:
        keys |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if config.num_experts:
        keys |= {"expert_count": config.num_experts, "expert_used_count": config.experts_per_token,
                 "expert_feed_forward_length": config.expert_size}  # fmt: skip
    return keys


def _byte_level_entries() -> list[mutate_gguf.Group]:
    tokens = ["<s>", "</s>", "Ġ", *"abcdefghijklmnopqrstuvwxyz", "th", "the"]
    entries = [("model", 8, "gpt2"), ("pre", 8, "qwen2"), ("tokens", 9, (8, tokens)),
               ("merges", 9, (8, ["t h", "th e"])),
               ("token_type", 9, (5, [3, 3, *[1] * (len(tokens) - 2)])), ("add_bos_token", 7, False),
               ("chat_template", 8, CHAT_TEMPLATES[0])]  # fmt: skip
    return _tokenizer_entries(entries)


def _sentencepiece_entries() -> list[mutate_gguf.Group]:
    tokens = ["<unk>", "<s>", "</s>", "<0x41>", "▁", "t", "h", "e", "th", "the", "▁the"]
    entries = [("model", 8, "llama"), ("tokens", 9, (8, tokens)), ("scores", 9, (6, [-float(i) for i in range(11)])),
               ("token_type", 9, (5, [2, 3, 3, 6, *[1] * 7])), ("unknown_token_id", 4, 0),
               ("add_space_prefix", 7, True)]  # fmt: skip
    return _tokenizer_entries(entries)


def _tokenizer_entries(entries: list[tuple[str, int, Any]]) -> list[mutate_gguf.Group]:
    made = [mutate_gguf.entry_fields(f"tokenizer.{'ggml.' * (name != 'chat_template')}{name}", kind, value)
            for name, kind, value in entries]  # fmt: skip
    return [*made, mutate_gguf.entry_fields("general.name", 8, "a tiny model")]


# ---- quantized models -------------------------------------------------------------------------------


@cache
def _quantized() -> Decoder:
    from support.arrays import random_quantized

    return random_quantized(small_model(small_config(num_layers=1)))


def checkpoints(folder: Path) -> None:
    from spqr_jax.checkpoint import save

    stats = {"model": "tiny", "calibration": {"data": "pydoc", "windows": 4}}
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "quantized", _quantized(), SpQRConfig(), provenance=stats)


def spqr_directories(folder: Path) -> None:
    from spqr_jax.blocks import TreeSource
    from spqr_jax.formats.directory import HFDirectory
    from spqr_jax.formats.export import export_hf_spqr

    folder.mkdir(parents=True, exist_ok=True)
    with HFDirectory(folder / "llama") as out:
        export_hf_spqr(TreeSource(_quantized()), out)


def spqr_words(folder: Path) -> None:
    from safetensors.numpy import save_file

    from spqr_jax.formats.hf_spqr import pack_words
    from support.arrays import random_array

    for number, (shape, share) in enumerate([((32, 48), 0.05), ((16, 16), 0.0), ((64, 32), 0.3)]):
        tensors = pack_words(random_array(shape, outliers=share, seed=number)).tensors()
        save_file(tensors, _new(folder / str(number)) / "words.safetensors")
        _write(folder / str(number), "shape.json", list(shape))


def _saved_matrix(array: Any) -> dict[str, Any]:
    """What the original's engine would have saved of a matrix."""
    from spqr_jax.packing import unpack_codes
    from support.arrays import dense

    out, inner = array.shape
    names = [f"quant_layer_{kind}_qq_{part}" for kind in ("scale", "zero") for part in ("scale", "zero")]
    saved: dict[str, Any] = {
        "quant_weights": unpack_codes(np.asarray(array.codes), array.bits)[:, :inner].astype(np.int8)
    }
    saved |= {name: [] for name in ("quant_layer_scale", "quant_layer_zeros", *names)}
    stats = np.asarray(array.tile_stats)
    for group in range(stats.shape[1]):
        if array.quantized_stats:
            for name, words in (("scale", array.scale_codes), ("zeros", array.zero_codes)):
                codes = unpack_codes(np.asarray(words), 3)[group].reshape(-1, 16).astype(np.int8)
                saved[f"quant_layer_{name}"].append(codes)
            for index, name in enumerate(names):
                saved[name].append(stats[:, group, index : index + 1])
        else:
            saved["quant_layer_scale"].append(stats[:, group, :1])
            saved["quant_layer_zeros"].append(stats[:, group, 1:])
    rows, cols, _ = dataclasses.replace(array, perm=None).to_coo()
    values = dense(dataclasses.replace(array, perm=None), np.float32)[rows, cols]
    return saved | {
        "outliers_matrix": Coo(np.stack([rows, cols]).astype(np.int64), values, (out, inner)),
        "perm": np.asarray(array.perm).astype(np.int64),
        "weight_shape": (out, inner),
        "groupsize": array.group_size,
        "blocksize": 128,
        "keep_last_columns": 0,
    }


def legacy_matrices(folder: Path) -> None:
    from support.arrays import random_array

    forms: list[dict[str, Any]] = [{}, {"stats_bits": None}, {"outliers": 0.0}]
    for number, form in enumerate(forms):
        data = torch_bytes(_saved_matrix(random_array((32, 32), seed=number, **form)))
        (_new(folder / str(number)) / "matrix").write_bytes(data)


def legacy_folders(folder: Path) -> None:
    """A folder that the original wrote, with the config.json of its model in ``base``."""
    from spqr_jax.array import SpQRArray
    from spqr_jax.models.hf import hf_config, hf_tensors

    model, saved = _quantized(), _new(folder / "llama")
    rest = dict(hf_tensors(small_model(model.config)))
    for tensor, row in FAMILIES["llama"].table.expand(model.config).items():
        _, _, place = row.paths[0].partition("layers.")
        layer, _, name = place.partition(".")
        if name and isinstance(array := model.layers[int(layer)][name], SpQRArray):
            module = tensor.removesuffix(".weight").partition(f".{layer}.")[2]
            (_new(saved / layer) / module).write_bytes(torch_bytes(_saved_matrix(array)))
            del rest[tensor]
    (saved / "not_quantized_weights.pt").write_bytes(torch_bytes(rest))
    arguments = {"wbits": 3, "groupsize": 16, "qq_scale_bits": 3, "qq_zero_bits": 3, "qq_groupsize": 16,
                 "outlier_threshold": 0.2, "percdamp": 1.0, "permutation_order": "act_order"}  # fmt: skip
    (saved / "args.pt").write_bytes(torch_bytes(arguments))
    _write(saved / "base", "config.json", hf_config(model.config))


# ---- data, results, requests ------------------------------------------------------------------------


def data_files(folder: Path) -> None:
    """Token ids and texts in every form that is read, or looks like one."""
    ids = np.arange(400) % 64
    for name, value in {
        "stream": ids,
        "windows": ids.reshape(4, 100).astype(np.int32),
        "small": ids.astype("u1"),
    }.items():
        np.save(_new(folder / name) / "data.npy", value)
    (_new(folder / "text") / "data.txt").write_text("\n\n".join(_TEXTS * 5), encoding="utf-8")
    lines = [json.dumps({"text": text, "meta": {"n": 1}}) for text in _TEXTS]
    lines += [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in _TEXTS]
    (_new(folder / "jsonl") / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (_new(folder / "csv") / "data.csv").write_text("id,text\n" + "\n".join(f'{i},"{t}"' for i, t in enumerate(_TEXTS)))
    _write(folder / "json", "data.json", [{"text": text} for text in _TEXTS])
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:  # not a package that we ask for
        return
    table = pyarrow.table({"text": _TEXTS, "n": list(range(len(_TEXTS)))})
    pyarrow.parquet.write_table(table, _new(folder / "parquet") / "data.parquet")


def results(folder: Path) -> None:
    perplexity = {
        "model": "x",
        "data": "pydoc",
        "perplexity": 12.5,
        "windows": 4,
        "seqlen": 128,
        "bits": {"ideal": 3.1},
    }
    _write(folder / "perplexity", "result.json", perplexity)
    tasks = {"model": "x", "results": {"piqa": {"acc,none": 0.7, "acc_stderr,none": 0.01, "alias": "piqa"}}}
    _write(folder / "tasks", "result.json", tasks)


def rules(folder: Path) -> None:
    for number, text in enumerate(["down_proj=4", r"layers\.(0|1)\..*=skip", "^lm_head$=8", "[qk]_proj=2", "a=b=3"]):
        (_new(folder / str(number)) / "rule.txt").write_text(text)


def quantizations(folder: Path) -> None:
    from spqr_jax.config import LayerRule

    configs = {
        "spqr": SpQRConfig(),
        "preset": SpQRConfig.preset("4bit"),
        "gptq": SpQRConfig.gptq(),
        "rules": SpQRConfig(rules=(LayerRule("down_proj", bits=4, outlier_threshold=0.5), LayerRule("q", skip=True))),
        "brecq": SpQRConfig.baseline("brecq", steps=3),
    }
    for name, config in configs.items():
        _write(folder / name, "request.json", config.to_json())


def decoder_configs(folder: Path) -> None:
    for family in FAMILIES:
        _write(folder / family, "request.json", small_config(family).to_json())
    stretched = small_config(rope_factors=(1.0,) * 4, rope_dim=8, rope_scale=1.2)
    _write(folder / "stretched", "request.json", stretched.to_json())


def prompts(folder: Path) -> None:
    _write(folder / "two", "request.json", {"prompts": [[1, 2, 3], [4]], "max_new_tokens": 5})


# ---- all of them ------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[[Path], None]] = {
    make.__name__: make
    for make in (
        hf_configs, hf_directories, safetensors_files, tokenizers, chat_templates, gguf_files, checkpoints,
        spqr_directories, spqr_words, legacy_matrices, legacy_folders, data_files, results, rules, quantizations,
        decoder_configs, prompts,
    )
}  # fmt: skip


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(folder: Path, name: str, values: Any) -> None:
    (_new(folder) / name).write_text(json.dumps(values))
