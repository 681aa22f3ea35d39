"""``python -m spqr_jax`` is the `spqr` command."""

from spqr_jax.cli.app import main

main()
