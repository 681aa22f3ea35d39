"""Compiles the whole of a decoding step for an accelerator that is not there, and says what it needs.

    python tests/aot/generate_step.py tpu v5e            layers one after the other, weights of a small model
    python tests/aot/generate_step.py loop h100 2 32     layers in a loop, Llama-7B's shape, for 2 and for 32 layers

A process of its own, as compile.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "benchmarks")]

LAYERS = 2


def main() -> None:
    from compile import start_jax

    start_jax(None)
    kind, target, *layers = sys.argv[1:]
    if kind == "loop":
        print(json.dumps(in_a_loop(target, [int(number) for number in layers])))
    else:
        print(json.dumps(unrolled(kind, target)))


def in_a_loop(target: str, layers: list[int]) -> list[dict[str, Any]]:
    """Decoding programs of Llama-7B's shape; the last number of layers also with mixed widths."""
    import generate_program
    import jax
    import launches
    import targets
    from compile import lower_for

    from spqr_jax.products import default_implementation

    device = targets.device(target)
    with jax.default_device(device):
        implementation = default_implementation()
    results = []
    for number, form in [*((number, "3 bits") for number in layers), (layers[-1], "mixed")]:
        params = generate_program.abstract_model(generate_program.shape("7b", number, 2048), form)
        function, values = generate_program.programs(params, batch=1, prompt=32)["decode"]
        compiled = lower_for(device, function, values, donate_argnums=(1,)).compile()
        text = compiled.as_text()
        loop = launches.program(text).loop_of(number)
        assert loop is not None
        packed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params.parts))
        results.append(
            {
                "implementation": implementation,
                "launches": len(loop.body),
                "kernels": sum(launch.is_kernel for launch in loop.body),
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
                "layer_bytes": packed / number,
                "instructions": len(re.findall(r"^ +(?:ROOT )?%?[\w.-]+ = ", text, re.MULTILINE)),
            }
        )
    return results


def unrolled(kernel: str, target: str) -> dict[str, Any]:
    """A decoding program of a small model whose layers run one after the other."""
    import jax
    import jax.numpy as jnp
    import targets
    from compile import lower_for
    from support.arrays import random_array

    from spqr_jax.generate import _decode, _Progress, _Rest
    from spqr_jax.models.config import DecoderConfig
    from spqr_jax.models.decoder import random_decoder
    from spqr_jax.models.ready import ReadyDecoder, empty_cache
    from spqr_jax.products import BACKENDS, prepare_for
    from spqr_jax.quantized import quantized_leaves
    from spqr_jax.sampling import Sampling

    device = targets.device(target)
    config = DecoderConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=2048,
        num_layers=LAYERS,
        num_heads=8,
        num_kv_heads=4,
        head_dim=128,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_positions=512,
        tied_head=False,
        eos_token_ids=(2,),
    )
    model = jax.tree.map(lambda a: a.astype(jnp.bfloat16), random_decoder(config, 0))
    layers = jax.tree.map(lambda w: random_array(w.shape, outliers=0.01) if w.ndim == 2 else w, model.layers)
    outer = dataclasses.replace(model.outer, lm_head=random_array(model.outer.lm_head.shape, outliers=0.01))
    outer, layers = prepare_for(BACKENDS[kernel], (outer, layers), jnp.bfloat16, strict=True)
    params = ReadyDecoder(outer, layers, config)
    packed = quantized_leaves(params)
    assert len(packed) == 7 * LAYERS + 1
    cache = empty_cache(params, 1, 256, jnp.bfloat16)
    progress = _Progress(jnp.zeros((1, 1), jnp.int32), jnp.int32(0), jnp.ones(1, bool))
    draw = Sampling().draw(config.vocab_size)
    rest = _Rest(jnp.zeros(1, jnp.int32), jax.random.key(0), jnp.array([2], jnp.int32), draw)
    compiled = lower_for(
        device, _decode.__wrapped__, (params, cache, progress, rest, jnp.int32(8)), donate_argnums=(1,)
    ).compile()
    text = compiled.as_text()
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    shapes = {tuple(a.shape) for w in packed for piece in w.raw.pieces for a in piece.arrays}
    return {
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "packed_bytes": sum(w.nbytes for w in packed),
        "copies_of_packed": copies_of(text, shapes),
        "kernels": sum(call in ("mosaic_gpu_v2", "__gpu$xla.gpu.triton", "tpu_custom_call") for call in calls),
        "calls": sorted(set(calls)),
    }


def copies_of(text: str, shapes: set[tuple[int, ...]]) -> list[str]:
    """Instructions that put an int32 array of one of these shapes into device memory (S(1) is a TPU core's own)."""
    copies = []
    for name, dims, layout, kind in re.findall(r"%?([\w.-]+) = s32\[([\d,]+)\](\{[^}]*\})? ([\w-]+)\(", text):
        shape = tuple(int(d) for d in dims.split(","))
        if shape in shapes and "S(1)" not in layout and kind not in ("parameter", "get-tuple-element", "bitcast"):
            copies.append(f"{kind} {name}")
    return copies


if __name__ == "__main__":
    main()
