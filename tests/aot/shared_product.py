"""Compiles a product whose inputs two GPUs share, which are not there, and says what it calls.

    python tests/aot/shared_product.py h100

A process of its own, as compile.py.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def main() -> None:
    from compile import start_jax

    start_jax(None)
    import jax
    import jax.numpy as jnp
    import numpy as np
    import product
    import targets
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from pallas_kernels import spqr_matmul

    target, out, inner = sys.argv[1], 4096, 4096  # of each device
    pair = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=targets.GPUS[target].described(), topology="1x1x2"
    )
    mesh, columns, pieces = (
        Mesh(np.array(pair.devices), ("model",)),
        PartitionSpec(None, "model"),
        PartitionSpec("model"),
    )
    jax.config.update("jax_default_device", pair.devices[0])  # for which kernels are chosen
    form = product.Form(target, 1, (out,), inner, (3, 3), 16, True, exact=False)

    def multiply(x: jax.Array, w: spqr_matmul.Prepared) -> jax.Array:
        piece = jax.tree.map(lambda leaf: leaf[0], w)
        return jax.lax.psum(spqr_matmul.matmul(x, piece, jnp.int32(0)).astype(jnp.float32), "model")

    run = jax.shard_map(multiply, mesh=mesh, in_specs=(columns, pieces), out_specs=PartitionSpec(), check_vma=False)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype, sharding=NamedSharding(mesh, pieces))

    x = jax.ShapeDtypeStruct((1, 2 * inner), jnp.bfloat16, sharding=NamedSharding(mesh, columns))
    text = jax.jit(run).lower(x, jax.tree.map(placed, product.described(form, out * inner // 100))).compile().as_text()
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    print(json.dumps({"calls": sorted(set(calls)), "sums": len(re.findall(r" all-reduce(?:-start)?\(", text))}))


if __name__ == "__main__":
    main()
