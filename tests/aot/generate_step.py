"""Compiles the whole of a decoding step for an accelerator that is not there, and says what memory it needs.

    python tests/aot/generate_step.py h100 --batch 1

A process of its own, as compile.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

LAYERS = 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--implementation", default=None)
    options = parser.parse_args()
    from compile import lower_for, start_jax

    start_jax(None)
    import jax
    import jax.numpy as jnp
    import targets
    from support.arrays import random_array

    from spqr_jax.array import SpQRArray
    from spqr_jax.generate import _decode, _Progress, _Rest, empty_cache
    from spqr_jax.models.config import DecoderConfig
    from spqr_jax.models.decoder import random_decoder
    from spqr_jax.products import default_implementation, prepare
    from spqr_jax.sampling import Sampling

    device = targets.device(options.target)
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
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), random_decoder(config, 0))
    blocks = tuple(
        jax.tree.map(lambda w: random_array(w.shape, outliers=0.01) if w.ndim == 2 else w, block)
        for block in params.layers
    )
    with jax.default_device(device):
        implementation = options.implementation or default_implementation()
    outer = dataclasses.replace(params.outer, lm_head=random_array(params.outer.lm_head.shape, outliers=0.01))
    params = prepare(dataclasses.replace(params, outer=outer, layers=blocks), implementation=implementation)
    packed = [w for w in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "sparse")) if hasattr(w, "sparse")]
    assert len(packed) == 7 * LAYERS + 1
    assert not any(isinstance(w, SpQRArray) for w in packed)
    cache = empty_cache(config, options.batch, 256, jnp.bfloat16)
    progress = _Progress(jnp.zeros((options.batch, 1), jnp.int32), jnp.int32(0), jnp.ones(options.batch, bool))
    draw = Sampling().draw(config.vocab_size)
    rest = _Rest(jnp.zeros(options.batch, jnp.int32), jax.random.key(0), jnp.array([2], jnp.int32), draw)
    compiled = lower_for(
        device, _decode.__wrapped__, (params, cache, progress, rest, jnp.int32(8)), donate_argnums=(1,)
    ).compile()
    text = compiled.as_text()
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    print(
        json.dumps(
            {
                "implementation": implementation,
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
                "packed_bytes": sum(w.nbytes for w in packed),
                "smallest_matrix_bytes": min(w.nbytes for w in packed),
                "copies_of_packed": copies_of(text, {tuple(a.shape) for w in packed for a in w.arrays}),
                "kernels": sum(call in ("mosaic_gpu_v2", "__gpu$xla.gpu.triton", "tpu_custom_call") for call in calls),
                "calls": sorted(set(calls)),
            }
        )
    )


def copies_of(text: str, shapes: set[tuple[int, ...]]) -> list[str]:
    """Instructions that put an int32 array of one of these shapes into device memory (S(1) is a TPU core's own)."""
    found = []
    for name, dims, layout, kind in re.findall(r"%?([\w.-]+) = s32\[([\d,]+)\](\{[^}]*\})? ([\w-]+)\(", text):
        shape = tuple(int(d) for d in dims.split(","))
        if shape in shapes and "S(1)" not in layout and kind not in ("parameter", "get-tuple-element", "bitcast"):
            found.append(f"{kind} {name}")
    return found


if __name__ == "__main__":
    main()
