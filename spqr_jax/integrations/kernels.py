"""What both integrations do: sum up what each layer reads, then quantize its kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from spqr_jax.array import SpQRArray
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import DataError, SpQRError
from spqr_jax.events import Events
from spqr_jax.integrations.contraction import Contraction
from spqr_jax.methods import quantize_weights
from spqr_jax.methods.report import Reporter
from spqr_jax.solver import Hessian, accumulate_hessian, empty_hessian


def check_config(config: SpQRConfig, batches: Iterable[Any] | None) -> None:
    """Refuses what needs to know a model's blocks, and a missing calibration text.

    Raises:
      SpQRError, DataError: says which.
    """
    if config.target_bits is not None:
        raise SpQRError(
            "target_bits needs a backward pass through a Decoder's blocks, which a Flax model does not have: "
            "set bits and outlier_threshold instead, or give rules for individual weights"
        )
    if config.needs_calibration and batches is None:
        raise DataError("this configuration needs calibration batches; SpQRConfig.rtn() needs none")


class InputSums:
    """Hessians of what layers read, by path."""

    def __init__(self) -> None:
        self.hessians: dict[str, Hessian] = {}

    def add(self, path: str, form: Contraction, x: jax.Array) -> None:
        """Adds a layer's input.

        Raises:
          SpQRError: it is traced: the model compiles or loops over the layer by itself.
        """
        if isinstance(x, jax.core.Tracer):
            raise SpQRError(
                f"{path} is called under jit, scan, remat or vmap, where its inputs cannot be recorded: give a call "
                "(call=...) that runs the model without them"
            )
        hessian = self.hessians.get(path)
        if hessian is None:
            hessian = empty_hessian(form.shape[1])
        self.hessians[path] = accumulate_hessian(hessian, form.rows(x))


def quantize_kernels(
    kernels: dict[str, tuple[Contraction, Any]], sums: InputSums, config: SpQRConfig, events: Events
) -> dict[str, SpQRArray]:
    """Quantizes kernels, by path; those that a rule of `config` skips are left out.

    Raises:
      DataError: the calibration text never reached a layer.
    """
    configs = {path: own for path in kernels if (own := config.for_path(path)) is not None}
    unread = [path for path, own in configs.items() if own.needs_calibration and path not in sums.hessians]
    if unread:
        raise DataError(
            f"the calibration batches never reached {', '.join(unread)}: leave them dense (LayerRule(..., skip=True)), "
            "or give batches and a call that reach them"
        )
    report, quantized = Reporter(len(configs), events), {}
    for path, own in configs.items():
        form, kernel = kernels[path]
        (solved,) = quantize_weights([form.matrix(kernel)], sums.hessians.get(path), [own])
        quantized[path] = solved.array
        report(path, solved.array, solved.stats)
    return quantized
