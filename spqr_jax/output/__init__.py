"""Where results go: names that are checked before the work and given after it, files that are whole or not there."""

from spqr_jax.output.claim import AlreadyFinished, Claim, refuse_existing
from spqr_jax.output.leftovers import unfinished_note
from spqr_jax.output.space import readable_size
from spqr_jax.output.text_file import check_file, write_file

__all__ = [
    "AlreadyFinished",
    "Claim",
    "check_file",
    "readable_size",
    "refuse_existing",
    "unfinished_note",
    "write_file",
]
