"""One of two processes with four devices each: loads a model in parts, generates, saves, and meets a damaged file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
from support.shared_models import shared_model

import spqr_jax


def main(folder: Path, port: str, process: int) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("model",))
    params = spqr_jax.load(folder / "model", mesh)
    whole = spqr_jax.shard(shared_model("llama", 8), mesh)
    assert jax.tree.structure(params) == jax.tree.structure(whole)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True)
    same = all(
        np.array_equal(mine.data, its.data)
        for leaf, other in pairs
        for mine, its in zip(leaf.addressable_shards, other.addressable_shards, strict=True)
    )
    out = spqr_jax.generate(params, [[1, 5, 9], [7]], max_new_tokens=8, stop_tokens=())
    spqr_jax.save(folder / "saved", params)
    try:
        spqr_jax.load(folder / "damaged", mesh)
        damage = "not noticed"
    except spqr_jax.CheckpointError as error:
        damage = str(error)
    print(json.dumps({"same": same, "tokens": out.tokens, "damage": damage}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
