"""One model on several devices and hosts (tensor parallel).

`plan.py` says which device gets which rows, columns and heads. `cut.py` cuts and
joins weights on the host. `mesh.py` reads ``--mesh``. `sharded.py` places the
pieces, `collectives.py` makes pieces multiply as the whole, and `run.py` runs the
decoder's functions on all devices at once.
"""

from spqr_jax.parallel.mesh import parse_mesh
from spqr_jax.parallel.run import (
    ReadyShards,
    copied_for,
    empty_cache_of,
    make_ready_shards,
    ready_anywhere,
    with_cache,
)
from spqr_jax.parallel.sharded import AXIS, ShardedDecoder, ShardedSource, shard, shard_source

__all__ = [
    "AXIS",
    "ReadyShards",
    "ShardedDecoder",
    "ShardedSource",
    "copied_for",
    "empty_cache_of",
    "make_ready_shards",
    "parse_mesh",
    "ready_anywhere",
    "shard",
    "shard_source",
    "with_cache",
]
