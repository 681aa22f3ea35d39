"""Flax NNX models: every linear and einsum layer found, calibrated and quantized; the model stays a model.

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
from spqr_jax.integrations.contraction import Contraction, of_equation, over_axes
from spqr_jax.integrations.kernels import InputSums, check_config, quantize_kernels
from spqr_jax.linear import Implementation
from spqr_jax.linear import prepare as prepare_weight
from spqr_jax.quantize import OnLayer

_KINDS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
Call = Callable[[Any, Any], Any]


class QuantizedLayer(nnx.Module):
    """What stands in place of a linear or einsum layer: the same product with a quantized kernel.

    Attributes:
      weight: Variable with a `SpQRArray` (or what `prepare` makes of it), [out, in].
      bias: the layer's own, or None.
      form: how the kernel's axes lie in the matrix.
      dtype: in which the layer computes; None for its input's.
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
    """Linear and einsum layers by path, such as ``blocks.0.attention.query``; a shared one by its first."""
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
    on_layer: OnLayer | None = None,
) -> Any:
    """Quantizes the kernels of a model's linear and einsum layers.

    All Hessians come from one pass through the dense model and are held at once.

    Args:
      model: stays as it is.
      batches: whatever `call` takes. Not needed by round to nearest.
      config: what to do; None for `SpQRConfig()`. Rules match paths as `find_layers` gives them.
      call: runs the model on a batch, ``call(model, batch)``; None for ``model(batch)``.
        Not under jit.
      on_layer: called after each weight.

    Returns:
      A model of the same structure with a `QuantizedLayer` in the place of each
      quantized layer; call it as before, compile it with `nnx.jit`. Layers that are
      shared stay shared. See `prepare`.

    Raises:
      SpQRError: no such layer, one whose kernel is no one matrix, or a configuration that a Flax model cannot take.
      DataError: no calibration batches, or batches that do not reach a layer.
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
    arrays = quantize_kernels(kernels, sums, config, on_layer)
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
    """A quantized model with weights in the layout that this machine's kernels read: `spqr_jax.linear.prepare`."""
    ready = nnx.clone(model)
    for _, node in nnx.iter_graph(ready):
        if isinstance(node, QuantizedLayer):
            node.weight = nnx.Variable(prepare_weight(node.weight.get_value(), dtype, implementation))
    return ready


def dequantize(model: Any) -> dict[str, jax.Array]:
    """Kernels as they are after quantization, in their own axes, by path: for comparison."""
    found: dict[str, jax.Array] = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, QuantizedLayer):
            form = node.form
            order = (*form.free, *form.contracted)
            kernel = node.weight.get_value().to_dense().reshape([form.kernel_shape[axis] for axis in order])
            found[".".join(map(str, path))] = kernel.transpose([order.index(axis) for axis in range(len(order))])
    return found


__all__ = ["QuantizedLayer", "dequantize", "find_layers", "prepare", "quantize"]
