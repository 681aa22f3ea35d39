"""The state of a run on disk, so that a run that was stopped can go on."""

from spqr_jax.journal.identity import differences, identity_of
from spqr_jax.journal.journal import Journal

__all__ = ["Journal", "differences", "identity_of"]
