"""`spqr --version`: one line for bug reports."""

from __future__ import annotations

import platform

import jax
import typer

from spqr_jax import __version__


def show_version(asked: bool) -> None:
    """Prints the line and ends the program."""
    if asked:
        typer.echo(f"spqr-jax {__version__} (JAX {jax.__version__}, Python {platform.python_version()}, {device()})")
        raise typer.Exit


def device() -> str:
    """The device that JAX uses, in words."""
    try:
        first = jax.devices()[0]
    except RuntimeError as error:  # no driver, or another process holds the device
        return f"no device: {str(error).splitlines()[0] if str(error) else 'JAX finds none'}"
    name = first.device_kind
    return f"device {first.platform}" if name == first.platform else f"device {first.platform}: {name}"
