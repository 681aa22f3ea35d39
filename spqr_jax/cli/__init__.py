"""The `spqr` command line."""
