"""Native checkpoints: Orbax directories, written block by block, verified on load.

    DIR/
      model/           Orbax: embedding, final norm, head; configuration
      layers/00000/    Orbax: one block
      ...
      tokenizer.json, tokenizer_config.json, ...

Each Orbax directory holds two checkpointables: `params`, a tree of arrays, and
`config`, a JSON object with the format version and, for each leaf, shape, dtype
and SHA-256. Orbax casts to the type that is asked for without a word, so types
and shapes are compared with what the files say before anything is read, and
checksums after. A checkpoint grows under a temporary name and is renamed when
it is whole. Nothing is pickled.
"""

from spqr_jax.checkpoint.content import content_digest
from spqr_jax.checkpoint.growing import CheckpointFolder
from spqr_jax.checkpoint.loading import load
from spqr_jax.checkpoint.reading import CheckpointSource, is_checkpoint
from spqr_jax.checkpoint.writing import CheckpointSink, save

__all__ = ["CheckpointFolder", "CheckpointSink", "CheckpointSource", "content_digest", "is_checkpoint", "load", "save"]
