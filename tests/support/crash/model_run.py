"""A run over the public parts that writes a real checkpoint: a tiny model, rounded to nearest block by block.

python -m support.crash.model_run PATH
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from spqr_jax import Decoder, SpQRConfig
from spqr_jax.checkpoint import CheckpointSink
from spqr_jax.journal import Journal, identity_of
from spqr_jax.methods import quantize_weights
from spqr_jax.models.decoder import matrix_names, random_decoder
from spqr_jax.output import AlreadyFinished, Claim
from spqr_jax.stream.blocks import TreeSource
from support.problems import TINY

CONFIG = SpQRConfig.rtn()


def model() -> Decoder:
    return random_decoder(TINY, seed=0)


def run(path: Path, params: Decoder) -> None:
    """Goes on, or begins; nothing if all was finished before."""
    source = TreeSource(params)
    identity = identity_of(source.identity(), None, CONFIG.to_json(), None)
    try:
        with (
            Claim(path, run="resume") as claim,
            CheckpointSink(claim, params.config, CONFIG, files={"tokenizer.json": b"{}"}) as sink,
        ):
            journal = Journal(claim.run, identity, resume=True)
            state = journal.state or {"blocks": {}, "stream": None}
            sink.adopt(state["blocks"])
            seen = np.zeros(8) if state["stream"] is None else journal.get(state["stream"])["seen"]
            for index in range(len(state["blocks"]), params.config.num_layers):
                block = source.block(index)
                solved = {
                    name: quantize_weights([block[name]], None, [CONFIG])[0].array
                    for name in matrix_names(params.config, block.kind)
                }
                sink.put_block(index, block.replace({**block, **solved}))
                seen = seen + index
                journal.commit({"blocks": sink.digests(), "stream": journal.put({"seen": seen})})
            if "model" not in state["blocks"]:
                sink.put_outer(source.outer())
                journal.commit({"blocks": sink.digests(), "stream": journal.put({"seen": seen})})
        journal.close(done=True)
    except AlreadyFinished:
        pass


if __name__ == "__main__":
    run(Path(sys.argv[1]), model())
