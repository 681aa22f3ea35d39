"""Compiles one kernel for one accelerator that is not there, in a process of its own, and says in JSON what came out.

    python tests/aot/compile.py h100 mosaic_gpu --batch 8 --keep kernel.ptx

An instruction that the target lacks ends the process: hence one process for each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("target", help="a100, rtx4090, h100, b200, v5e or v6e")
    parser.add_argument("kernel", choices=["mosaic_gpu", "triton", "tpu", "xla"])
    parser.add_argument("--batch", type=int, default=1, help="rows of activations")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=8192)
    parser.add_argument(
        "--forms", type=Path, help="mosaic_gpu: a folder for the PTX of all of this target in product.py"
    )
    parser.add_argument(
        "--halves", action="store_true", help="mosaic_gpu: scales and zero points without a second level"
    )
    parser.add_argument("--blocks", type=int, default=1, help="triton: blocks of 128 rows a warp")
    parser.add_argument("--depth", type=int, default=4, help="tpu: column blocks of a grid step")
    parser.add_argument("--splits", type=int, default=4, help="triton: warps that share rows")
    parser.add_argument("--keep", type=Path, help="where the PTX goes")
    return parser.parse_args()


def start_jax(dump: Path | None) -> None:
    """Environment of a compilation without a device, before jax is imported; what it makes goes to `dump`."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "XLA_FLAGS": "",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    if dump is not None:
        os.environ["XLA_FLAGS"] += " --xla_gpu_fail_ptx_compilation_on_register_spilling=true"
        os.environ["XLA_FLAGS"] += f" --xla_dump_to={dump} --xla_dump_emitter_re=.* --xla_gpu_dump_llvmir=true"
        os.environ |= {
            "MOSAIC_GPU_DUMP_TO": str(dump),
            "MOSAIC_GPU_DUMP_PTX": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_mosaic_dump_to={dump}",
        }
    from sass import tool

    if ptxas := tool("ptxas"):
        os.environ["PATH"] = f"{Path(ptxas).parent}:{os.environ['PATH']}"
        os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(Path(ptxas).parents[1])
        os.environ["XLA_FLAGS"] += f" --xla_gpu_cuda_data_dir={Path(ptxas).parents[1]}"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def form_of(options: argparse.Namespace) -> Any:
    """A stack of two matrices, whose product is cut as on the device."""
    from product import Form

    return Form(
        options.target,
        options.batch,
        (options.out,),
        options.inner,
        (options.bits, options.bits),
        options.group_size,
        not options.halves,
        exact=False,
    )


def tensor_core_kernel(options: argparse.Namespace) -> tuple[Any, dict[str, Any], Any]:
    """As `product.kernel`, of shapes."""
    import product

    form = form_of(options)
    return product.kernel(form, product.described(form, options.out * options.inner // 100))


def keep_forms(device: Any, dump: Path, target: str, folder: Path) -> None:
    """Compiles the tiny products, all in this process; their PTX goes to `folder`, named by number."""
    import product

    for i, form in enumerate(product.FORMS.values()):
        if form.target == target:
            multiply, specs, _ = product.kernel(form, product.described(form, product.most_outliers(form)))
            lower_for(device, multiply, [specs]).compile()
            (folder / f"{i}.ptx").write_text(_ptx_of(dump, "mosaic").read_text())
            for path in dump.rglob("*.ptx"):
                path.unlink()


def kernel(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The kernel alone and what it takes, as shapes."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.spqr_matmul import lanes, rows, tuning

    def spec(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    out, inner, group = options.out, options.inner, options.group_size
    form = {"bits": options.bits, "group_size": group}
    if options.kernel == "mosaic_gpu":
        multiply, specs, _ = tensor_core_kernel(options)
        return multiply, [specs]
    if options.kernel == "triton":
        from pallas_kernels.spqr_matmul import triton

        config = tuning.TritonConfig(options.blocks, options.splits)
        return (
            lambda *a: triton.multiply(*a, **form, config=config),
            [
                spec(inner // rows.WORD_COLUMNS, options.bits, out),
                spec(inner // (rows.GROUPS * group), out),
                spec(inner // group, 2, out // rows.TILE),
                spec(options.batch, inner, dtype=jnp.float32),
            ],
        )
    if options.kernel == "xla":
        return many_rows(options, spec)
    from pallas_kernels.spqr_matmul import tpu

    block = lanes.choose_block(out)
    columns = inner // (lanes.GROUPS * group)
    return (
        lambda *a: tpu.multiply(*a, **form, block=block, depth=options.depth),
        [
            spec(columns * lanes.code_sublanes(options.bits, group), out),
            spec(columns * 8, out),
            spec(columns * lanes.GROUPS, out // block * lanes.LANES),
            spec(options.batch, inner, dtype=jnp.bfloat16),
        ],
    )


def many_rows(options: argparse.Namespace, spec: Any) -> tuple[Any, list[Any]]:
    """The product for prompts, from blocks for tensor cores or for a TPU: no kernel of ours, dequantized rows."""
    import jax.numpy as jnp
    import product

    from pallas_kernels import spqr_matmul
    from pallas_kernels.spqr_matmul import lanes, outliers
    from pallas_kernels.spqr_matmul.pieces import Piece

    out, inner, group = options.out, options.inner, options.group_size
    x = spec(options.batch, inner, dtype=jnp.bfloat16)
    if options.target not in ("v5e", "v6e"):
        return lambda x, w: spqr_matmul.matmul(x, w, 0), [x, product.described(form_of(options), out * inner // 100)]
    chunks = out * (inner // 100 // outliers.CHUNK + 1)
    sparse = outliers.Outliers(
        columns=spec(outliers.CHUNK, chunks, dtype=jnp.uint16),
        values=spec(outliers.CHUNK, chunks, dtype=jnp.float16),
        merges=(),
        starts=spec(out + 1),
        chunk_starts=None,
        widest=24,
        row_chunks=24,
    )
    block, columns = lanes.choose_block(out), inner // (lanes.GROUPS * group)
    arrays = (
        spec(columns * lanes.code_sublanes(options.bits, group), out),
        spec(columns * 8, out),
        spec(columns * lanes.GROUPS, out // block * lanes.LANES),
    )
    piece = Piece(arrays, sparse, (out, inner), options.bits, group, block, "lanes")
    matrix = spqr_matmul.Prepared(None, None, None, None, spec(1, inner), (piece,), (out,), inner, (), "lanes")
    return lambda x, w: spqr_matmul.matmul(x, w), [x, matrix]


def lower_for(device: Any, function: Any, specs: Any, **options: Any) -> Any:
    """Lowers for a device that is not there."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    sharding = SingleDeviceSharding(device)
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), specs)
    platform = "tpu" if device.platform == "tpu" else "gpu"
    described = AbstractDevice(device.device_kind, getattr(device, "num_cores", None), platform)
    with jax.default_device(device), jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=described)):
        return jax.jit(function, **options).lower(*specs)


def weights_a_step(options: argparse.Namespace) -> int:
    """Weights that a thread, or on a TPU the core, goes through in one turn of the loop."""
    if options.kernel == "mosaic_gpu":
        return 128 * tensor_core_kernel(options)[2].config.depth
    if options.kernel == "triton":
        return 16 * options.group_size * options.blocks
    from pallas_kernels.spqr_matmul import lanes

    return lanes.choose_block(options.out) * lanes.GROUPS * options.group_size * options.depth


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        start_jax(Path(folder))
        print(json.dumps(result(options, Path(folder))), flush=True)
    os._exit(0)  # at an ordinary exit the compiler's threads now and then use what is no longer there


def result(options: argparse.Namespace, dump: Path) -> dict[str, Any]:
    """What came out."""
    import jax
    import targets

    device = targets.device(options.target)
    jax.config.update("jax_default_device", device)  # for which `tuning` chooses
    gpu = targets.GPUS.get(options.target)
    if options.forms:
        keep_forms(device, dump, options.target, options.forms)
        return {}
    function, specs = kernel(options)
    compiled = lower_for(device, function, specs).compile()
    numbers = {"temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}
    if options.kernel == "xla":
        return numbers | {"dense_bytes": 2 * options.out * options.inner}
    if gpu is None:
        return numbers | _bundles(dump, weights_a_step(options))
    return numbers | _machine(dump, options, weights_a_step(options))


def _ptx_of(dump: Path, name: str) -> Path:
    """The only PTX with such a kernel."""
    paths = [path for path in dump.rglob("*.ptx") if re.search(rf"\.entry\s+\w*{name}", path.read_text())]
    [ptx] = {path.read_text(): path for path in paths}.values()
    return ptx


def _bundles(dump: Path, weights: int) -> dict[str, Any]:
    [analysis] = dump.glob("*spqr_matmul*schedule-analysis_final_bundles.txt")
    bundles = int(re.search(r"total scheduled bundles:\s+(\d+)", analysis.read_text())[1])
    return {"bundles": bundles, "weights_per_bundle": weights / bundles}


def _machine(dump: Path, options: argparse.Namespace, weights: int) -> dict[str, Any]:
    import sass

    ptx = _ptx_of(dump, "mosaic" if options.kernel == "mosaic_gpu" else "spqr_matvec")
    kept = options.keep or dump / "kernel.ptx"
    kept.write_text(ptx.read_text())
    machine = sass.assemble(kept)
    wide = [op for op in machine.loop if re.match(r"(LDG|LDS)\.(\w+\.)*128|UBLKCP|UTMALDG", op)]
    shared, cut = machine.shared, f"{options.blocks} blocks, {options.splits} splits"
    if options.kernel == "mosaic_gpu":
        plan = tensor_core_kernel(options)[2]
        shared, cut = plan.shared_bytes, str(plan.config)
    return {
        "cut": cut,
        "shared_bytes": shared,
        "registers": machine.registers,
        "spills": machine.spills,
        "instructions_per_weight": machine.loop_instructions / weights,
        "wide_loads": {op: machine.loop[op] for op in wide},
        "copies": {op: n for op, n in machine.loop.items() if op.startswith(("LDGSTS", "UBLKCP", "UTMALDG"))},
        "loop": machine.loop,
    }


if __name__ == "__main__":
    main()
