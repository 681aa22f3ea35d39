"""Quantizes Flax Linen models, given as module and variables: calibrates and quantizes every dense and einsum layer.

from spqr_jax.integrations import linen as spqr_linen

small = spqr_linen.quantize(module, variables, batches, SpQRConfig(bits=3))
y = jax.jit(partial(spqr_linen.apply, module))(spqr_jax.prepare(small), x)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import flax
import jax
from flax import linen as nn  # the models that this is for
from flax.core import meta

from spqr_jax.config import SpQRConfig
from spqr_jax.errors import DataError, SpQRError
from spqr_jax.events import Events, ignore
from spqr_jax.integrations.contraction import Contraction, of_equation, over_axes
from spqr_jax.integrations.kernels import InputSums, check_config, quantize_kernels
from spqr_jax.quantized import is_quantized

_KINDS = (nn.Dense, nn.DenseGeneral, nn.Einsum)
Call = Callable[[nn.Module, Any, Any], Any]


def _path(layer: nn.Module) -> str:
    return ".".join(layer.path)


def _kernel(path: str) -> str:
    """Where a layer's kernel stands; the path of a model that is one layer is empty."""
    return f"{path}.kernel" if path else "kernel"


def _form(
    layer: Any, shape: tuple[int, ...], x: jax.Array, given: dict[str, Any], args: tuple[Any, ...]
) -> Contraction:
    """How a layer's kernel meets its input.

    Raises:
      SpQRError: not as one matrix.
    """
    if isinstance(layer, nn.Einsum):
        equation = layer.einsum_str or given.get("einsum_str") or (args[0] if args else None)
        return of_equation(shape, str(equation))
    if isinstance(layer, nn.DenseGeneral):
        if layer.batch_dims:
            raise SpQRError("it has a separate kernel for each index of a batch axis")
        axes = (layer.axis,) if isinstance(layer.axis, int) else tuple(layer.axis)
        return over_axes(shape, [axis % x.ndim for axis in axes] if min(axes) >= 0 else axes)
    return over_axes(shape, (-1,))


def quantize(
    module: nn.Module,
    variables: Any,
    batches: Iterable[Any] | None = None,
    config: SpQRConfig | None = None,
    *,
    call: Call | None = None,
    events: Events = ignore,
) -> Any:
    """Quantizes the kernels of a model's dense and einsum layers.

    All Hessians come from one pass through the dense model and are in memory together.

    Args:
      module: the model.
      variables: its variables, as ``module.init`` returns them; they are not changed.
      batches: any iterable of inputs that ``call`` takes. At least one is needed, also for round-to-nearest: layers are
        found by running the model.
      config: how to quantize; None for `SpQRConfig` without arguments. Rules match paths such as ``Block_0.Dense_1``.
      call: runs the model on a batch, ``call(module, variables, batch)``; None for ``module.apply(variables, batch)``.
        It must not run under jit.
      events: is told of each weight: an `Event` whose ``detail`` is a `LayerReport`.

    Returns:
      The variables with a `SpQRArray` [out, in] in place of each quantized kernel, for `apply`. A layer that is called
      several times is quantized once, from all its inputs.

    Raises:
      SpQRError: the model has no such layer, a kernel is not one matrix, or the configuration does not work for Flax
        models.
      DataError: there are no batches.

    Example:
      >>> from flax import linen as nn
      >>> from spqr_jax.integrations import linen as spqr_linen
      >>> module = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(32)])
      >>> x = jax.random.normal(jax.random.key(0), (256, 32))
      >>> variables = module.init(jax.random.key(1), x)
      >>> small = spqr_linen.quantize(module, variables, [x], spqr_jax.SpQRConfig(bits=4))
      >>> spqr_linen.apply(module, spqr_jax.prepare(small), x).shape
      (256, 32)
    """
    config = config or SpQRConfig()
    if batches is None:
        raise DataError("no batches: give at least one, because the layers of a Linen model are found by running it")
    check_config(config, batches)
    params = meta.unbox(flax.core.unfreeze(variables))["params"]
    flat = flax.traverse_util.flatten_dict(params, sep=".")
    forms: dict[str, Contraction] = {}
    sums = InputSums()

    def record(next_function: Any, args: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if isinstance(layer, _KINDS) and context.method_name == "__call__":
            path = _path(layer)
            own = config.for_path(path)
            if own is not None:
                _note(layer, path, args, options, own.needs_calibration)
        return next_function(*args, **options)

    def _note(layer: Any, path: str, args: Any, options: Any, calibrated: bool) -> None:
        x = args[0] if args else options["inputs"]
        try:
            form = _form(layer, flat[_kernel(path)].shape, x, options, args[1:])
            if forms.setdefault(path, form) != form:
                raise SpQRError("its kernel is applied to its inputs in different ways")
        except SpQRError as error:
            raise SpQRError(
                f"{path} cannot be quantized: {error}; leave it dense with LayerRule({path!r}, skip=True)"
            ) from None
        if calibrated:
            sums.add(path, form, x)

    count = 0
    with nn.intercept_methods(record):
        for batch in batches:
            (call or (lambda module, variables, batch: module.apply(variables, batch)))(module, variables, batch)
            count += 1
    if not count:
        raise DataError("no calibration batches: give at least one (a generator that was already used up is empty)")
    if not forms:
        raise SpQRError("the model has no nn.Dense, nn.DenseGeneral or nn.Einsum layer to quantize")
    kernels = {path: (form, flat[_kernel(path)]) for path, form in forms.items()}
    for path, array in quantize_kernels(kernels, sums, config, events).items():
        flat[_kernel(path)] = array
    return {**flax.core.unfreeze(variables), "params": flax.traverse_util.unflatten_dict(flat, sep=".")}


def apply(module: nn.Module, variables: Any, *args: Any, **options: Any) -> Any:
    """Runs a model with quantized variables. It may be compiled with `jax.jit`.

    Args:
      module: the model.
      variables: the result of `quantize` or of `spqr_jax.prepare`.
      args: passed to ``module.apply``.
      options: passed to ``module.apply``.

    Returns:
      The result of ``module.apply``.
    """
    with nn.intercept_methods(_run_quantized):
        return module.apply(variables, *args, **options)


def _run_quantized(next_function: Any, args: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
    layer: Any = context.module
    if not isinstance(layer, _KINDS) or context.method_name != "__call__":
        return next_function(*args, **options)
    kernel: Any = layer.get_variable("params", "kernel")
    if not is_quantized(kernel):
        return next_function(*args, **options)
    x = args[0] if args else options["inputs"]
    x = x if layer.dtype is None else x.astype(layer.dtype)
    form = _form(layer, _kernel_shape(layer, x), x, options, args[1:])
    bias = meta.unbox(layer.get_variable("params", "bias")) if layer.use_bias else None
    return form.product(kernel, x, bias)


def _kernel_shape(layer: Any, x: jax.Array) -> tuple[int, ...]:
    """Of the kernel as it was."""
    if isinstance(layer, nn.Einsum):
        return tuple(layer.shape)
    features = (layer.features,) if isinstance(layer.features, int) else tuple(layer.features)
    axes = getattr(layer, "axis", -1)
    return (*(x.shape[axis] for axis in ((axes,) if isinstance(axes, int) else axes)), *features)


__all__ = ["apply", "quantize"]
