"""Accelerators that programs are compiled for without having one."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, as XLA wants it described."""

    name: str
    capability: tuple[int, int]
    cores: int
    lanes: int  # float32 units of a core
    shared: int  # bytes a core
    shared_block: int  # bytes a thread block at most
    cache: int  # bytes
    bandwidth: int  # bytes a second
    clock: float  # GHz
    memory: int  # bytes
    threads: int = 2048  # of a core at most

    def described(self) -> str:
        """A text of XLA's GpuTargetConfigProto."""
        major, minor = self.capability
        extension = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared}
  threads_per_core_limit: {self.threads}
  core_count: {self.cores}
  fpus_per_core: {self.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.shared_block}
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{self.name}"
"""


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 166912, 41943040, 2039 * 10**9, 1.41, 85 * 10**9),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 102400, 101376, 75497472, 1008 * 10**9, 2.52, 25 * 10**9, 1536
    ),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 232448, 52428800, 3352 * 10**9, 1.755, 85 * 10**9),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 233472, 232448, 132644864, 7672 * 10**9, 1.965, 191 * 10**9),
}
TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}


def device(name: str) -> Any:
    """A device to compile for, by its short name; JAX must not have started another platform than the CPU's."""
    from jax.experimental import topologies

    if name in GPUS:
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=GPUS[name].described(), topology="1x1x1"
        ).devices[0]
    return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[name]).devices[0]
