"""Which device gets which part of a model: whole heads, equal parts of every MLP, a range of the vocabulary."""

from __future__ import annotations

import dataclasses
import re

from spqr_jax.config import SHARED_INPUTS
from spqr_jax.errors import ModelError
from spqr_jax.layout import round_up
from spqr_jax.models.config import BlockKind, DecoderConfig
from spqr_jax.models.weights import block_shapes
from spqr_jax.parallel.cut import Split

VOCABULARY = ("embed_tokens", "lm_head")
"""Weights outside of the blocks that devices share, by ranges of tokens."""


def local_config(config: DecoderConfig, devices: int) -> DecoderConfig:
    """The configuration of the smaller decoder that each device runs.

    Raises:
      ModelError: so many devices cannot share the model evenly; says which numbers can.
    """
    if problem := _why_not(config, devices):
        most = max(config.num_heads, devices)
        fitting = [str(count) for count in range(1, most + 1) if not _why_not(config, count)]
        raise ModelError(
            f"{problem}: use {' or '.join(fitting)} devices" if fitting[1:] else f"{problem}: use 1 device"
        )
    has_dense = any(not kind.sparse for kind in config.kinds)
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // devices,
        num_kv_heads=max(config.num_kv_heads // devices, 1),
        intermediate_size=config.intermediate_size // devices if has_dense else config.intermediate_size,
        expert_size=config.expert_size // devices,
    )


def _why_not(config: DecoderConfig, devices: int) -> str:
    heads, shared = config.num_heads, config.num_kv_heads
    if heads % devices:
        return f"{devices} devices cannot share {heads} query heads evenly"
    if shared % devices and devices % shared:
        return f"{devices} devices cannot share {shared} key-value heads evenly"
    if config.intermediate_size % devices and any(not kind.sparse for kind in config.kinds):
        return f"{devices} devices cannot share an MLP of width {config.intermediate_size} evenly"
    if config.expert_size % devices:
        return f"{devices} devices cannot share experts of width {config.expert_size} evenly"
    return ""


def block_splits(config: DecoderConfig, kind: BlockKind, devices: int) -> dict[str, Split | None]:
    """How devices share each weight of a block; None for a weight that every device has whole."""
    heads = config.num_heads * config.head_dim // devices
    shared_heads = max(config.num_kv_heads // devices, 1) * config.head_dim
    copies = max(devices // config.num_kv_heads, 1)  # devices with the same head of keys and values
    width = (config.expert_size if kind.sparse else config.intermediate_size) // devices
    every = tuple(range(devices))
    queries = Split(0, heads, tuple(heads * device for device in every))
    keys = Split(0, shared_heads, tuple(shared_heads * (device // copies) for device in every))
    inner = Split(0, width, tuple(width * device for device in every))
    roles = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": inner, "up_proj": inner}
    columns = {"o_proj": queries._replace(axis=1), "down_proj": inner._replace(axis=1)}

    def split(name: str) -> Split | None:
        role = re.sub(r"^experts\.\d+\.", "", name)
        return columns.get(role) or roles.get(role.removesuffix("_bias"))

    return {name: split(name) for name in block_shapes(config, kind)}


def vocabulary_split(rows: int, devices: int, unit: int) -> Split:
    """Equal ranges of tokens in whole tiles; the last ones may reach past the vocabulary."""
    size = round_up(-(-rows // devices), unit)
    return Split(0, size, tuple(size * device for device in range(devices)))


def sums_over_devices(name: str) -> bool:
    """Whether a weight's product is the sum of what the devices' pieces give."""
    return name.endswith(SHARED_INPUTS)
