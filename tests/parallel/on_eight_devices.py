"""Models that 2, 4 and 8 devices share, beside the same models on one device; reports as JSON."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from support.shared_models import shared_model

import spqr_jax
from spqr_jax import Decoder, Generator, Sampling
from spqr_jax.checkpoint import content_digest
from spqr_jax.models.decoder import forward as forward_alone
from spqr_jax.models.ready import ReadyDecoder, make_ready, stack_blocks
from spqr_jax.parallel import make_ready_shards
from spqr_jax.parallel.run import forward
from spqr_jax.products import BACKENDS, prepare_for

PROMPTS = [[1, 5, 9], [7]]
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)
CASES = [("llama", 2), ("llama", 4), ("llama", 8), ("gemma", 4), ("experts", 2), ("experts", 8)]


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("model",))


def in_stacks(model: Decoder) -> ReadyDecoder:
    backend = BACKENDS["mosaic_gpu"]
    return ReadyDecoder(prepare_for(backend, model.outer, np.float32), stack_blocks(model, backend), model.config)


def texts(generator: Generator, **options: Any) -> list[list[int]]:
    return generator(PROMPTS, max_new_tokens=8, stop_tokens=(), **options).tokens


def main(folder: Path) -> None:
    assert len(jax.devices()) == 8
    models = {name: shared_model(name, 8) for name in ("llama", "gemma", "experts")}
    alone = {name: make_ready(model) for name, model in models.items()}
    expected = {name: texts(Generator(ready)) for name, ready in alone.items()}
    scores = {name: np.asarray(jax.jit(forward_alone)(ready, TOKENS)) for name, ready in alone.items()}
    cases = []
    for name, devices in CASES:
        shards = make_ready_shards(spqr_jax.shard(models[name], mesh_of(devices)))
        error = np.abs(np.asarray(forward(shards, TOKENS)) - scores[name]).max() / np.abs(scores[name]).max()
        same = texts(Generator(shards)) == expected[name]
        cases.append({"model": name, "devices": devices, "same": same, "error": float(error)})
    # dense weights for each device, and a random draw
    sharded = spqr_jax.shard(models["llama"], mesh_of(4))
    dense = Generator(make_ready_shards(sharded, partial(make_ready, implementation="xla")))
    same = texts(dense) == expected["llama"]
    sampling = Sampling(temperature=1.0)
    drawn = texts(dense, sampling=sampling, seed=3) == texts(Generator(alone["llama"]), sampling=sampling, seed=3)
    # layers in a loop, as on a GPU
    stacked = Generator(make_ready_shards(spqr_jax.shard(models["gemma"], mesh_of(2)), in_stacks))
    in_loop = texts(stacked) == texts(Generator(in_stacks(models["gemma"])))
    # files
    spqr_jax.save(folder / "whole", models["gemma"])
    sharded = spqr_jax.load(folder / "whole", mesh_of(4))
    spqr_jax.save(folder / "joined", sharded)
    files = content_digest(folder / "joined") == content_digest(folder / "whole")
    loaded = texts(Generator(sharded)) == expected["gemma"]
    print(
        json.dumps({"cases": cases, "xla": same, "drawn": drawn, "in_loop": in_loop, "files": files, "loaded": loaded})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
