"""One weight, or several that read one input, by the method that each configuration names."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spqr_jax.array import SpQRArray
from spqr_jax.config import SHARED_INPUTS, SpQRConfig
from spqr_jax.errors import SpQRError
from spqr_jax.layout import check_input_shards
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.weights import block_shapes
from spqr_jax.solver import Hessian, PanelHessian, Solved, solve


def quantize_weight(w: jax.Array, hessian: Hessian | jax.Array | None, config: SpQRConfig | None = None) -> SpQRArray:
    """Quantizes one matrix (algorithm 1 of arXiv 2306.03078).

    Args:
      w: the matrix [out, in], any float type.
      hessian: the Hessian of its inputs: a `Hessian`, or the matrix H [in, in] with any positive scale. None for
        round-to-nearest.
      config: how to quantize; None for the defaults. Per-layer rules have no effect.

    Returns:
      The quantized matrix.

    Raises:
      SpQRError: shapes that do not fit, values that are not finite, or a method that needs a Hessian without one.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (64, 32))
      >>> x = jax.random.normal(jax.random.key(1), (256, 32))  # the inputs of the matrix
      >>> hessian = spqr_jax.accumulate_hessian(spqr_jax.empty_hessian(32), x)
      >>> array = spqr_jax.quantize_weight(w, hessian, spqr_jax.SpQRConfig(bits=4))
      >>> array.shape, array.bits
      ((64, 32), 4)
    """
    return quantize_weights([w], hessian, [config or SpQRConfig()])[0].array


def check_shards(config: SpQRConfig, model: DecoderConfig) -> None:
    """Refuses `input_shards` that cut a group of some weight of a model, before any text is read.

    Raises:
      SpQRError: names the weight, and the numbers of shards that fit it.
    """
    if config.order == "identity" or config.input_shards == 1:
        return
    shapes = {name: shape for kind in set(model.kinds) for name, shape in block_shapes(model, kind).items()}
    for name, shape in shapes.items():
        if name.endswith(SHARED_INPUTS):
            try:
                check_input_shards(shape[1], config.group_size, config.input_shards)
            except SpQRError as error:
                raise SpQRError(f"{name}: {error}") from None


def quantize_weights(
    weights: Sequence[jax.Array],
    hessian: Hessian | PanelHessian | jax.Array | None,
    configs: Sequence[SpQRConfig],
    mesh: Mesh | None = None,
) -> list[Solved]:
    """Quantizes matrices that read the same input, each with its own configuration.

    As `quantize_weight`, for a list of [out_k, in]. Those of SpQR, GPTQ and round-to-nearest are solved together where
    they can be, see `spqr_jax.solver.solve`; with a mesh on all its devices. Other methods use one device.
    """
    if all(config.solver == "columns" for config in configs):
        solved = solve.quantize_weights(weights, hessian, configs, mesh)
    else:
        h = solve.checked_hessian(weights, hessian, configs)
        solved = [_solve_otherwise(*problem, h) for problem in zip(weights, configs, strict=True)]
    if not isinstance(hessian, (Hessian, PanelHessian)):
        return solved
    tokens = round(float(hessian.tokens))
    return [result._replace(stats=dataclasses.replace(result.stats, tokens=tokens)) for result in solved]


def _solve_otherwise(w: jax.Array, config: SpQRConfig, h: jax.Array | None) -> Solved:
    """One matrix by one of the `BASELINES`, beginning from its weights rounded to nearest."""
    if config.solver == "columns":
        return solve.quantize_weights([w], h, [config])[0]
    from spqr_jax.methods.obq import LARGEST
    from spqr_jax.methods.table import SOLVERS  # they need optax

    if config.solver == "obq" and w.shape[1] > LARGEST:
        warnings.warn(
            f"OBQ's time grows with the cube of the number of inputs. A matrix with more than {LARGEST} inputs, such "
            f"as this {tuple(w.shape)}, is quantized with GPTQ: the same method with one column order for all rows",
            stacklevel=2,
        )
        return solve.quantize_weights([w], h, [dataclasses.replace(config, solver="columns")])[0]
    if config.solver not in SOLVERS:
        raise SpQRError(f"{config.solver} optimizes whole blocks: use spqr_jax.quantize, not a single matrix")
    assert h is not None
    nearest = dataclasses.replace(config, solver="columns", steps=None, compensate=False, sequential=False)
    start = solve.quantize_weights([w], None, [nearest])[0].array
    array = SOLVERS[config.solver](w.astype(jnp.float32), h, start, config)
    return solve.solved_as(w, h, array, config.damping)
