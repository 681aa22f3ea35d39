"""Decoder functions on all devices of a mesh at once: each runs them on its pieces, as on a small model of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spqr_jax.models import decoder
from spqr_jax.models.attention import KVCache
from spqr_jax.models.config import DecoderConfig
from spqr_jax.models.decoder import Decoder
from spqr_jax.models.ready import ReadyDecoder, empty_cache, make_ready
from spqr_jax.parallel.collectives import with_collectives
from spqr_jax.parallel.sharded import ShardedDecoder, own_devices, spread


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadyShards:
    """A `ShardedDecoder` prepared for generation, a pytree.

    Attributes:
      ready: a `ReadyDecoder` with the sizes of one device; its arrays have the devices in front.
      config: of the whole model; static.
      mesh, axis: as in `ShardedDecoder`; static.
    """

    ready: ReadyDecoder
    config: DecoderConfig = dataclasses.field(metadata={"static": True})
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    axis: str = dataclasses.field(metadata={"static": True})


def ready_anywhere(
    params: Decoder | ReadyDecoder | ReadyShards | ShardedDecoder, *, int8_activations: bool = False
) -> ReadyDecoder | ReadyShards:
    """A model prepared for generation where it is: `make_ready` on one device, `make_ready_shards` on several."""
    if isinstance(params, ShardedDecoder):
        return make_ready_shards(params, partial(make_ready, int8_activations=int8_activations))
    return make_ready(params, int8_activations=int8_activations) if isinstance(params, Decoder) else params


def empty_cache_of(params: ReadyDecoder | ReadyShards, batch: int, length: int) -> tuple[KVCache, ...]:
    """A cache of `length` positions; of `ReadyShards` on every device for its own heads, the devices in front."""
    if isinstance(params, ReadyDecoder):
        return empty_cache(params, batch, length, params.outer.final_norm.dtype)
    local = jax.eval_shape(lambda: empty_cache(params.ready, batch, length, params.ready.outer.final_norm.dtype))

    devices, sharding = params.mesh.shape[params.axis], NamedSharding(params.mesh, PartitionSpec(params.axis))
    return jax.tree.map(lambda leaf: jnp.zeros((devices, *leaf.shape), leaf.dtype, device=sharding), local)


def copied_for(params: ReadyDecoder | ReadyShards, tree: Any) -> Any:
    """Arguments of a program as its devices read them: each of `ReadyShards` whole. Equal in all processes."""
    return tree if isinstance(params, ReadyDecoder) else jax.tree.map(partial(_copied, mesh=params.mesh), tree)


def _copied(leaf: jax.Array, mesh: Mesh) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_copied(jax.random.key_data(leaf), mesh))
    value = np.asarray(leaf)
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def make_ready_shards(params: ShardedDecoder, make: Callable[[Decoder], ReadyDecoder] = make_ready) -> ReadyShards:
    """Prepares every device's pieces for its kernels, device by device.

    Args:
      params: the model.
      make: prepares the decoder of one device, which is JAX's default device meanwhile.

    Raises:
      SpQRError: as `make`.
    """
    mesh, axis = params.mesh, params.axis
    prepared = {}
    for device, _ in own_devices(mesh, axis):
        with jax.default_device(device):
            local = make(_on_device(params.pieces, device))
            prepared[device] = jax.tree.leaves(local)
    leaves = [
        _spread_padded(dict(zip(prepared, values, strict=True)), mesh, axis)
        for values in zip(*prepared.values(), strict=True)
    ]
    return ReadyShards(jax.tree.unflatten(jax.tree.structure(local), leaves), params.config, mesh, axis)


def _on_device(pieces: Decoder, device: Any) -> Decoder:
    """One device's decoder, as NumPy arrays: weights are packed on the host."""

    def own(leaf: jax.Array) -> np.ndarray:
        return np.asarray(next(shard.data for shard in leaf.addressable_shards if shard.device == device))[0]

    return jax.tree.map(own, pieces)


def _spread_padded(values: dict[Any, jax.Array], mesh: Mesh, axis: str) -> jax.Array:
    """As `spread`. Packed outliers may differ in number: kernels read no further than a matrix's own count."""
    longest = max(value.shape[-1] for value in values.values()) if next(iter(values.values())).ndim else 0
    if jax.process_count() > 1:
        longest = int(np.max(multihost_utils.process_allgather(np.int32(longest))))

    def padded(value: Any) -> Any:
        if next(iter(values)).platform == "cpu":
            value = np.asarray(value)  # the same memory: nothing is compiled for it
        missing = longest - value.shape[-1] if value.ndim else 0
        if not missing:
            return value
        pad = np.pad if isinstance(value, np.ndarray) else jnp.pad
        return pad(value, [(0, 0)] * (value.ndim - 1) + [(0, missing)])

    return spread({device: padded(value) for device, value in values.items()}, mesh, axis)


def with_cache(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(params, cache, *rest) -> (cache, *results)`` of one device, on all devices of `ReadyShards`.

    `rest` and the results are the same on every device.
    """

    def on_devices(params: ReadyShards, cache: Any, *rest: Any) -> Any:
        def body(ready: ReadyDecoder, cache: Any, *rest: Any) -> Any:
            cache, *results = function(with_collectives(_first(ready), params.axis), _first(cache), *rest)
            return jax.tree.map(lambda leaf: leaf[None], cache), tuple(results)

        shared, same = PartitionSpec(params.axis), PartitionSpec()
        run = jax.shard_map(
            body,
            mesh=params.mesh,
            in_specs=(shared, shared, *(same for _ in rest)),
            out_specs=(shared, same),
            check_vma=False,  # kernels do not say how their results vary
        )
        cache, results = run(params.ready, cache, *rest)
        return cache, *results

    return on_devices


@jax.jit
def forward(params: ShardedDecoder | ReadyShards, tokens: jax.Array, padding: jax.Array | None = None) -> jax.Array:
    """`spqr_jax.forward` on all devices: logits of every position, float32 [batch, tokens, vocab]."""
    pieces = params.pieces if isinstance(params, ShardedDecoder) else params.ready

    def body(local: Any, tokens: jax.Array, padding: jax.Array | None) -> jax.Array:
        return decoder.forward(with_collectives(_first(local), params.axis), tokens, padding)

    shared, same = PartitionSpec(params.axis), PartitionSpec()
    run = jax.shard_map(body, mesh=params.mesh, in_specs=(shared, same, same), out_specs=same, check_vma=False)
    logits: jax.Array = run(pieces, tokens, padding)
    return logits


def _first(tree: Any) -> Any:
    """This device's slice of arrays that have the devices in front."""
    return jax.tree.map(lambda leaf: leaf[0], tree)
