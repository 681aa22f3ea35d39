"""Compiles attention at one position for GPUs that are not there, in a process of its own; prints JSON.

    python tests/aot/compile_attention.py h100 --heads 32 --kv-heads 8 --layers 4 --keep kernel.ptx
    python tests/aot/compile_attention.py - < lists_of_arguments.json

With --layers 0 one call is compiled; else a loop over the layers, which share the cache. With - as its argument, a list
of lists of arguments is read, all for one target, and a list is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from compile import lower_for, start_jax


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("target", help="a100, rtx4090, h100 or b200")
    parser.add_argument("--implementation", default="mosaic_gpu", choices=["mosaic_gpu", "xla"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rotated", type=int, help="all of head_dim where it is not given")
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--scale", type=float, help="head_dim^-0.5 where it is not given")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache-dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, default=0, help="turns of the loop; 0 for none")
    parser.add_argument("--plan", type=json.loads, help="fields of a Plan, in JSON; otherwise the one chosen")
    parser.add_argument("--keep", type=Path, help="where the PTX goes")
    return parser.parse_args(words)


def program(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """One call, or a loop over layers whose turns depend on each other, and what it takes, as shapes."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from pallas_kernels.attention import Plan, attend

    head_dim, rotated = options.head_dim, options.head_dim if options.rotated is None else options.rotated
    static = {"heads": options.heads, "kv_heads": options.kv_heads, "head_dim": head_dim, "rotated": rotated}
    static |= {
        "scale": options.scale or head_dim**-0.5,
        "softcap": options.softcap,
        "implementation": options.implementation,
    }
    static["plan"] = Plan(**options.plan) if options.plan else None

    def call(qkv: Any, cos: Any, sin: Any, keys: Any, values: Any, layer: Any, first: Any, start: Any) -> Any:
        tables = (cos, sin) if rotated else (None, None)
        return attend(qkv, *tables, keys, values, layer, first, start, **static)

    def loop(qkv: Any, cos: Any, sin: Any, keys: Any, values: Any, layer: Any, first: Any, start: Any) -> Any:
        def turn(i: Any, carried: Any) -> Any:
            x, keys, values = carried
            out, keys, values = call(x, cos, sin, keys, values, layer + i, first, start)
            return jnp.tile(out, (1, -(-x.shape[1] // out.shape[1])))[:, : x.shape[1]], keys, values

        return lax.fori_loop(0, options.layers, turn, (qkv, keys, values))

    def spec(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    cache = (max(options.layers, 2), options.batch, options.kv_heads, options.length, head_dim)
    width = (options.heads + 2 * options.kv_heads) * head_dim
    table = spec(options.batch, rotated // 2, dtype=jnp.float32)
    caches = [spec(*cache, dtype=options.cache_dtype)] * 2
    specs = [
        spec(options.batch, width, dtype=options.dtype),
        table,
        table,
        *caches,
        spec(),
        spec(options.batch),
        spec(),
    ]
    return loop if options.layers else call, specs


def cache_copies(text: str, options: argparse.Namespace) -> list[str]:
    """Instructions of optimized HLO, outside of fusions, whose result is as large as a layer's cache or larger.

    Not those that pass a buffer on, nor those that update the cache in place: the loop, the kernel, fused updates.
    """
    layer = options.batch * options.kv_heads * options.length * options.head_dim
    fused = set(re.findall(r" fusion\(.*calls=%?([\w.-]+)", text))
    found, computation, text = [], "", re.sub(r"/\*.*?\*/", "", text)
    for line in text.splitlines():
        if start := re.match(r"^(?:ENTRY )?%?([\w.-]+) [^=]*\{$", line):
            computation = start[1]
        match = re.match(r"^\s+(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if match is None or computation in fused or match[3] in ("parameter", "get-tuple-element", "bitcast"):
            continue
        if math.prod(int(d) for d in match[2].split(",")) >= layer and "dynamic_update_slice" not in match[1]:
            found.append(f"{match[3]} {match[1]} [{match[2]}]")
    return found


def compiled(options: argparse.Namespace, dump: Path) -> dict[str, Any]:
    """What came out of one compilation."""
    import sass
    import targets

    for old in dump.rglob("*.ptx"):
        old.unlink()
    function, specs = program(options)
    executable = lower_for(targets.device(options.target), function, specs, donate_argnums=(3, 4)).compile()
    memory, text = executable.memory_analysis(), executable.as_text()
    result = {
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "cache_bytes": specs[3].dtype.itemsize * specs[3].size,
        "cache_copies": cache_copies(text, options),
        "calls": len(re.findall(r'custom_call_target="mosaic_gpu', text)),
    }
    if options.implementation == "mosaic_gpu":
        [ptx] = {f.read_text() for f in dump.rglob("*.ptx") if re.search(r"\.entry\s+\w*mosaic", f.read_text())}
        kept = options.keep or dump / "kernel.ptx"
        kept.write_text(ptx)
        machine = sass.assemble(kept)
        wide = sum(n for op, n in machine.loop.items() if op.startswith("LDG") and ".128" in op)
        result |= {"registers": machine.registers, "spills": machine.spills, "wide_loads": wide, "loop": machine.loop}
    return result


def main() -> None:
    several = sys.argv[1:] == ["-"]
    lists = json.load(sys.stdin) if several else [sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        start_jax(Path(folder))
        results = [compiled(arguments(words), Path(folder)) for words in lists]
    print(json.dumps(results if several else results[0]))


if __name__ == "__main__":
    main()
