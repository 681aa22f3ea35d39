"""Quantizes Flax NNX models: finds, calibrates and quantizes every linear and einsum layer. The model stays a model.

from spqr_jax.integrations import nnx as spqr_nnx

small = spqr_nnx.quantize(model, batches, SpQRConfig(bits=3))
y = nnx.jit(lambda model, x: model(x))(spqr_nnx.prepare(small), x)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import nnx  # the models that this is for

from spqr_jax.array import SpQRArray
from spqr_jax.config import SpQRConfig
from spqr_jax.errors import DataError, SpQRError
from spqr_jax.events import Events, ignore
from spqr_jax.integrations.contraction import Contraction, of_equation, over_axes
from spqr_jax.integrations.kernels import InputSums, check_config, quantize_kernels
from spqr_jax.products import Implementation
from spqr_jax.products import prepare as prepare_weight

_KINDS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
Call = Callable[[Any, Any], Any]


class QuantizedLayer(nnx.Module):
    """A linear or einsum layer with a quantized kernel. It computes what the original layer computes.

    Attributes:
      weight: ``nnx.Variable`` with a `SpQRArray` [out, in], or with its prepared form.
      bias: the bias of the original layer, or None.
      form: how the axes of the kernel became those of the matrix.
      dtype: type in which the layer computes; None for the type of its input.
    """

    def __init__(self, weight: SpQRArray, form: Contraction, bias: Any, dtype: Any) -> None:
        self.weight = nnx.Variable(weight)
        self.bias = nnx.data(bias)
        self.form = form
        self.dtype = dtype

    def __call__(self, inputs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        x = inputs if self.dtype is None else inputs.astype(self.dtype)
        bias = None if self.bias is None else self.bias[...]
        return self.form.product(self.weight.get_value(), x, bias)


class _RecordingLayer(nnx.Module):
    """Passes everything on to a layer, and notes what it is given."""

    def __init__(self, layer: Any, path: str, form: Contraction, sums: InputSums) -> None:
        self.layer = layer
        self.form = form
        self.note = nnx.static(lambda x: sums.add(path, form, x))

    def __call__(self, inputs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        self.note(inputs)
        return self.layer(inputs, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["layer"], name)


def _form(layer: Any) -> Contraction:
    """How a layer's kernel meets its input.

    Raises:
      SpQRError: not as one matrix.
    """
    shape = layer.kernel.shape
    if isinstance(layer, nnx.Einsum):
        if layer.einsum_str is None:
            raise SpQRError("its equation is not fixed: each call gives one")
        return of_equation(shape, layer.einsum_str)
    if isinstance(layer, nnx.LinearGeneral):
        if layer.batch_axis:
            raise SpQRError("it has a separate kernel for each index of a batch axis")
        return over_axes(shape, layer.axis)
    if len(shape) != 2:
        raise SpQRError(f"its kernel has shape {shape}: several layers are stacked in it, as nnx.scan does")
    return over_axes(shape, (-1,))


def _children(node: Any) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """Name, child, and what puts another in its place."""
    if isinstance(node, (nnx.List, list)):
        for index, child in enumerate(node):
            yield str(index), child, lambda new, index=index: node.__setitem__(index, new)  # type: ignore[misc]
    elif isinstance(node, dict):
        for key, child in node.items():
            yield str(key), child, lambda new, key=key: node.__setitem__(key, new)  # type: ignore[misc]
    elif isinstance(node, nnx.Module):
        for name, child in list(vars(node).items()):
            yield name, child, lambda new, name=name: setattr(node, name, new)  # type: ignore[misc]


def find_layers(model: nnx.Module) -> dict[str, Any]:
    """The linear and einsum layers of a model.

    Args:
      model: the model; it is not changed.

    Returns:
      Layers by path, such as ``blocks.0.attention.query``. A shared layer has the first of its paths.
    """
    found: dict[str, Any] = {}
    _replace(model, lambda path, layer: found.setdefault(path, layer))
    return found


def _replace(model: nnx.Module, make: Callable[[str, Any], Any]) -> None:
    """Puts ``make(path, layer)`` in the place of every layer, wherever it is referred to; it is made once."""
    made: dict[int, Any] = {}
    seen = {id(model)}
    todo: list[tuple[str, Any]] = [("", model)]
    while todo:
        prefix, node = todo.pop()
        below = []
        for name, child, put in _children(node):
            path = prefix + name
            if isinstance(child, _KINDS):
                if id(child) not in made:
                    made[id(child)] = make(path, child)
                if made[id(child)] is not child:
                    put(made[id(child)])
            elif isinstance(child, (nnx.Module, list, dict)) and id(child) not in seen:
                seen.add(id(child))
                below.append((path + ".", child))
        todo += reversed(below)


def quantize(
    model: nnx.Module,
    batches: Iterable[Any] | None = None,
    config: SpQRConfig | None = None,
    *,
    call: Call | None = None,
    events: Events = ignore,
) -> Any:
    """Quantizes the kernels of a model's linear and einsum layers.

    All Hessians come from one pass through the dense model and are in memory together.

    Args:
      model: the model; it is not changed.
      batches: any iterable of inputs that ``call`` takes. Round-to-nearest needs none.
      config: how to quantize; None for `SpQRConfig` without arguments. Rules match the paths of `find_layers`.
      call: runs the model on a batch, ``call(model, batch)``; None for ``model(batch)``. It must not run under jit.
      events: is told of each weight: an `Event` whose ``detail`` is a `LayerReport`.

    Returns:
      A model of the same structure with a `QuantizedLayer` in place of each quantized layer. Call it as before, or
      compile it with ``nnx.jit``. Shared layers stay shared. See also `prepare`.

    Raises:
      SpQRError: the model has no such layer, a kernel is not one matrix, or the configuration does not work for Flax
        models.
      DataError: there are no calibration batches, or a layer was not called with them.

    Example:
      >>> from flax import nnx
      >>> from spqr_jax.integrations import nnx as spqr_nnx
      >>> rngs = nnx.Rngs(0)
      >>> mlp = nnx.Sequential(nnx.Linear(32, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 32, rngs=rngs))
      >>> x = jax.random.normal(jax.random.key(0), (256, 32))
      >>> small = spqr_nnx.quantize(mlp, [x], spqr_jax.SpQRConfig(bits=4))
      >>> nnx.jit(lambda model, x: model(x))(spqr_nnx.prepare(small), x).shape
      (256, 32)
    """
    config = config or SpQRConfig()
    check_config(config, batches)
    forms: dict[str, Contraction] = {}
    for path, layer in find_layers(model).items():
        if config.for_path(path) is not None:
            try:
                forms[path] = _form(layer)
            except SpQRError as error:
                raise SpQRError(
                    f"{path} cannot be quantized: {error}; leave it dense with LayerRule({path!r}, skip=True)"
                ) from None
    if not forms:
        raise SpQRError("the model has no nnx.Linear, nnx.LinearGeneral or nnx.Einsum layer to quantize")
    sums = InputSums()
    if config.needs_calibration:
        _record(model, forms, sums, batches or (), call)
    kernels = {path: (forms[path], layer.kernel[...]) for path, layer in find_layers(model).items() if path in forms}
    arrays = quantize_kernels(kernels, sums, config, events)
    small = nnx.clone(model)

    def quantized(path: str, layer: Any) -> Any:
        return QuantizedLayer(arrays[path], forms[path], layer.bias, layer.dtype) if path in arrays else layer

    _replace(small, quantized)
    return small


def _record(
    model: nnx.Module, forms: dict[str, Contraction], sums: InputSums, batches: Iterable[Any], call: Call | None
) -> None:
    """Runs a copy: what a call changes (statistics, random streams) stays as it is in the model."""
    recorder = nnx.clone(model)
    _replace(recorder, lambda p, layer: _RecordingLayer(layer, p, forms[p], sums) if p in forms else layer)
    count = 0
    for batch in batches:
        (call or (lambda model, batch: model(batch)))(recorder, batch)
        count += 1
    if not count:
        raise DataError("no calibration batches: give at least one (a generator that was already used up is empty)")


def prepare(model: Any, implementation: Implementation | None = None, dtype: Any = None) -> Any:
    """A copy of a quantized model with its weights in the layout that a fast kernel reads.

    Args:
      model: the result of `quantize`.
      implementation: as in `spqr_jax.prepare`.
      dtype: as in `spqr_jax.prepare`.

    Returns:
      The prepared model.

    Raises:
      SpQRError: as `spqr_jax.prepare`.
    """
    ready = nnx.clone(model)
    for _, node in nnx.iter_graph(ready):
        if isinstance(node, QuantizedLayer):
            node.weight = nnx.Variable(prepare_weight(node.weight.get_value(), dtype, implementation))
    return ready


def dequantize(model: Any) -> dict[str, jax.Array]:
    """The dequantized kernels of a model, to compare with the original ones.

    Args:
      model: the result of `quantize`, not prepared.

    Returns:
      float32 kernels by path, with the axes of the original kernels.
    """
    found: dict[str, jax.Array] = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, QuantizedLayer):
            form = node.form
            order = (*form.free, *form.contracted)
            kernel = node.weight.get_value().to_dense().reshape([form.kernel_shape[axis] for axis in order])
            found[".".join(map(str, path))] = kernel.transpose([order.index(axis) for axis in range(len(order))])
    return found


__all__ = ["QuantizedLayer", "dequantize", "find_layers", "prepare", "quantize"]
