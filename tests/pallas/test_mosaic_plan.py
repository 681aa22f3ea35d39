"""How the tensor-core kernel's work is cut: every product has a cut that fits its device, and covers W once."""

import dataclasses
import itertools

import pytest

from pallas_kernels.spqr_matmul import tuning
from pallas_kernels.spqr_matmul.device import Target
from pallas_kernels.spqr_matmul.formats import Format
from pallas_kernels.spqr_matmul.mosaic import estimate
from pallas_kernels.spqr_matmul.mosaic.plan import MosaicConfig, Plan

DEVICES = {
    "a100": Target("gpu", "NVIDIA A100", (8, 0), 108),
    "rtx4090": Target("gpu", "NVIDIA GeForce RTX 4090", (8, 9), 128),
    "h100": Target("gpu", "NVIDIA H100", (9, 0), 132),
    "b200": Target("gpu", "NVIDIA B200", (10, 0), 148),
}
SHAPES = [(16, 16), (4096, 4096), (8192, 28672), (128256, 4096)]
FORMATS = [
    (Format(3, 16, "nibbles"),),
    (Format(8, 16, "halves"),),
    (Format(2, 8, "nibbles"), Format(3, 16, "nibbles"), Format(8, 8, "halves")),
]


def plan(n, shape, formats, config=MosaicConfig(blocks=1)):
    return Plan(n, *shape, formats, len(formats) > 1, 1024, 2, 2, config)


@pytest.mark.parametrize("device", DEVICES)
def test_every_product_has_a_cut(device):
    target = DEVICES[device]
    for n, shape, formats in itertools.product((1, 16, 17, 64), SHAPES, FORMATS):
        problem = plan(n, shape, formats)
        cut = dataclasses.replace(problem, config=tuning.mosaic_config(target, problem))
        assert cut.why_impossible() == ""
        assert cut.shared_bytes + estimate.RESERVED_SHARED <= target.shared_bytes
        assert not estimate.spills(cut)
        assert cut.config.cluster == 1 or target.capability >= (9, 0)


def test_a_generation_step_fills_an_h100():
    """The cuts that were found by hand: nearly all multiprocessors, no cluster at one row, clusters of 4 at 16."""
    formats = FORMATS[0]
    one = tuning.mosaic_config(DEVICES["h100"], plan(1, (4096, 4096), formats))
    assert (one.blocks, one.warps, one.cluster, one.depth) == (128, 16, 1, 2)
    wide = tuning.mosaic_config(DEVICES["h100"], plan(1, (11008, 4096), formats))
    assert (wide.blocks, wide.warps) == (115, 12)
    sixteen = tuning.mosaic_config(DEVICES["h100"], plan(16, (4096, 4096), formats))
    assert (sixteen.blocks, sixteen.cluster) == (32, 4)


@pytest.mark.parametrize("n", [1, 5, 16, 24, 40, 64])
def test_regions_of_shared_memory_do_not_overlap_while_both_are_used(n):
    cut = plan(n, (4096, 4096), FORMATS[2], MosaicConfig(blocks=64, warps=8, cluster=2, chunk=3))
    regions = cut.regions
    late = {"parts"} if n > 16 else set()  # they take the place of x at the end
    late |= {"totals"} if n > 32 else set()
    for a, b in itertools.combinations(regions, 2):
        if (a in late) == (b in late) or {a, b} & {"powers"}:
            (first, words), (other, more) = regions[a], regions[b]
            assert first + words <= other or other + more <= first, (a, b)
    assert all(first % 4 == 0 and first + words <= cut.shared_words for first, words in regions.values())


def test_what_cannot_be_cut_is_refused():
    shape, formats = (4096, 4096), FORMATS[0]
    assert "warps" in plan(1, shape, formats, MosaicConfig(blocks=128, warps=6)).why_impossible()
    assert "tiles" in plan(1, shape, formats, MosaicConfig(blocks=8, warps=16)).why_impossible()
    assert "clusters" in plan(1, shape, formats, MosaicConfig(blocks=128, cluster=3)).why_impossible()
    assert "65 rows" in plan(65, shape, formats, MosaicConfig(blocks=128)).why_impossible()


def test_a_measured_configuration_is_taken(tmp_path, monkeypatch):
    table = tmp_path / "tuned.json"
    table.write_text(
        '{"NVIDIA H100": {"mosaic_gpu": {"1x4096x4096:3/16/nibbles": {"blocks": 64, "warps": 8, "depth": 3}}}}'
    )
    monkeypatch.setattr(tuning, "TABLE", table)
    tuning.table.cache_clear()
    try:
        config = tuning.mosaic_config(DEVICES["h100"], plan(1, (4096, 4096), FORMATS[0]))
    finally:
        tuning.table.cache_clear()
    assert config == MosaicConfig(blocks=64, warps=8, depth=3)
