"""Tiny products for the tensor-core kernel: matrices, what the product is in float64, and the kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

OUTLIERS = 0.01


@dataclasses.dataclass(frozen=True)
class Form:
    """A stack of joined matrices and how its product is cut.

    Attributes:
      batch: rows of x.
      parts: rows of each joined matrix.
      inner: columns.
      bits: of the codes, by matrix of the stack; the last one is multiplied.
      group_size: columns a group.
      second_level: whether scales and zero points are codes.
      exact: a float32 result, else bfloat16.
      wide_x: x in float32, else in bfloat16.
      config: fields of `MosaicConfig`; empty for what `tuning` chooses for the default device.
    """

    target: str
    batch: int
    parts: tuple[int, ...] = (96,)
    inner: int = 1024
    bits: tuple[int, ...] = (3, 3)
    group_size: int = 16
    second_level: bool = True
    exact: bool = True
    wide_x: bool = False
    config: tuple[tuple[str, int | bool], ...] = ()

    @property
    def error(self) -> float:
        """Relative error that is allowed: products are in float16; a bfloat16 result is rounded to 8 bits.

        Large zero points, as of wide codes, cancel more.
        """
        if not self.exact:
            return 2.5e-3
        return 6e-4 if max(self.bits) < 8 else 1e-3


def _form(
    target: str, batch: int, *, blocks: int = 3, warps: int = 8, form: dict[str, Any] | None = None, **config: Any
):
    return Form(target, batch, config=(("blocks", blocks), ("warps", warps), *sorted(config.items())), **(form or {}))


JOINED = {"parts": (40, 24, 32), "inner": 1808}  # rows and columns that fill no tile, no step
FORMS = {
    "one row": _form("h100", 1),
    "one row, bfloat16": _form("h100", 1, form={"exact": False}, subnormal=True, pdl=True),
    "one row, joined": _form("h100", 1, blocks=2, warps=12, form=JOINED),
    "one row, 2 bits, groups of 32": _form("h100", 1, form={"bits": (2, 2), "group_size": 32}),
    "5 rows, 5 bits, no second level": _form(
        "h100", 5, form={"bits": (5, 5), "second_level": False, "group_size": 48}, depth=1
    ),
    "3 rows, mixed widths": _form("h100", 3, form={"bits": (4, 2, 3)}),
    "4 rows, float32 x": _form("h100", 4, form={"wide_x": True}),
    "8 rows, clusters": _form("h100", 8, blocks=2, cluster=4, form={"inner": 2048}, pdl=True),
    "16 rows": _form("h100", 16, form={"group_size": 64}),
    "2 rows, 8 bits": _form("h100", 2, form={"bits": (8, 8), "group_size": 32}),
    "64 rows, clusters, 4 bits, no second level": _form(
        "h100", 64, blocks=2, cluster=4, form={"parts": (64,), "bits": (4, 4), "second_level": False, "group_size": 128}
    ),
    "20 rows, chunks": _form("h100", 20, blocks=2, chunk=2, form={"bits": (4, 4)}),
    "a100, one row": _form("a100", 1),
    "a100, 16 rows": _form("a100", 16),
}


# ---- matrices -------------------------------------------------------------------------------------------------------


def matrix(rng: np.random.Generator, form: Form, rows: int, bits: int) -> tuple[dict[str, Any], np.ndarray]:
    """The arrays of a `Part`, and the dense matrix in float64."""
    from spqr_jax.packing import pack_codes

    inner, group = form.inner, form.group_size
    groups, tiles = -(-inner // group), -(-rows // 16)
    codes = rng.integers(0, 1 << bits, (rows, inner)).astype(np.uint8)
    part = {"shape": (rows, inner), "bits": bits, "group_size": group}
    part |= dict.fromkeys(("scale_codes", "zero_codes", "tile_stats", "scale", "zero"))
    middle = (1 << bits) / 2
    if form.second_level:
        names = ("scale_codes", "zero_codes")
        scale_codes, zero_codes = (rng.integers(0, 16, (rows, groups)).astype(np.uint8) for _ in names)
        low, high = (0.001, -2, 0.05 * middle, -9), (0.002, -0.5, 0.07 * middle, -7)
        stats = rng.uniform(low, high, (tiles, groups, 4)).astype(np.float16)
        spread = np.repeat(stats.astype(np.float64), 16, axis=0)[:rows]
        scale = spread[..., 0] * (scale_codes - spread[..., 1])
        zero = spread[..., 2] * (zero_codes - spread[..., 3])
        part |= {"scale_codes": scale_codes, "zero_codes": zero_codes, "tile_stats": stats}
    else:
        scale = rng.uniform(0.001, 0.02, (rows, groups)).astype(np.float16)
        zero = rng.uniform(0, 2 * middle, (rows, groups)).astype(np.float16)
        part |= {"scale": scale, "zero": zero}
    wide = [np.repeat(np.asarray(v, np.float64), group, axis=1)[:, :inner] for v in (scale, zero)]
    sparse = np.where(rng.random((rows, inner)) < OUTLIERS, rng.standard_normal((rows, inner)), 0).astype(np.float16)
    sparse[rows // 2] = 0
    sparse[rows // 3, : inner // 3] = 0.01  # a row with many
    at_row, columns = np.nonzero(sparse)
    part |= {"codes": np.asarray(pack_codes(codes, bits)), "cols": columns, "values": sparse[at_row, columns]}
    part["row_ptr"] = np.searchsorted(at_row, np.arange(rows + 1))
    return part, wide[0] * (codes - wide[1]) + sparse.astype(np.float64)


def matrices(form: Form) -> list[list[tuple[dict[str, Any], np.ndarray]]]:
    """The parts of each matrix of the stack."""
    rng = np.random.default_rng(0)
    return [[matrix(rng, form, rows, bits) for rows in form.parts] for bits in form.bits]


def most_outliers(form: Form) -> int:
    """Of one matrix of the stack."""
    return max(sum(len(part["values"]) for part, _ in parts) for parts in matrices(form))


def problem(form: Form) -> tuple[Any, np.ndarray, np.ndarray]:
    """(the stack as `Prepared`, x in float32, the product in float64); rows of x have very different sizes."""
    from pallas_kernels.spqr_matmul.part import Part
    from pallas_kernels.spqr_matmul.prepared import prepare, stack

    stacked = matrices(form)
    prepared = stack([prepare("fragments", [Part(**part) for part, _ in parts]) for parts in stacked])
    rng = np.random.default_rng(1)
    x = rng.standard_normal((form.batch, form.inner)) * np.exp2(rng.integers(-20, 20, (form.batch, 1)))
    x = np.asarray(x, np.float32)
    if not form.wide_x:
        x = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    want = [x.astype(np.float64) @ weights.T for _, weights in stacked[-1]]
    return prepared, x, np.concatenate(want, axis=1)


def described(form: Form, outliers: int) -> Any:
    """The stack that `problem` makes, or a larger one, as shapes; `outliers` of the matrix that has most."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.spqr_matmul import entries, fragments
    from pallas_kernels.spqr_matmul.formats import format_of
    from pallas_kernels.spqr_matmul.prepared import Prepared

    def spec(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    formats = [format_of(bits, form.group_size, second_level=form.second_level) for bits in form.bits]
    count, steps = len(formats), fragments.num_steps(form.inner)
    tiles = sum(fragments.num_tiles(rows) for rows in form.parts)
    words, spans = spec(count, tiles, steps, formats[0].step_words), None
    if len(set(formats)) > 1:
        words, spans = spec(sum(tiles * steps * f.step_words for f in formats)), spec(count, tiles, 2)
    held, starts, order = spec(count, entries.capacity(outliers)), spec(count, 64 * tiles + 1), spec(count, form.inner)
    kinds = tuple(sorted(set(formats)))
    return Prepared(words, spans, held, starts, order, (), form.parts, form.inner, kinds, "fragments")


# ---- the kernel -----------------------------------------------------------------------------------------------------


def kernel(form: Form, prepared: Any) -> tuple[Any, dict[str, Any], Any]:
    """(multiply as a function of a dictionary of arrays, shapes of these, its plan); `prepared` may hold shapes."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.spqr_matmul import mosaic_gpu
    from pallas_kernels.spqr_matmul.mosaic.plan import MosaicConfig

    of, to = (jnp.float32 if wide else jnp.bfloat16 for wide in (form.wide_x, form.exact))
    config = MosaicConfig(**dict(form.config)) if form.config else None
    columns = -(-form.inner // 16) * 16
    shapes = {name: getattr(prepared, name) for name in ("words", "spans", "entries", "starts")}
    shapes["index"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    shapes["x"] = jax.ShapeDtypeStruct((form.batch, columns), of)
    plan = mosaic_gpu.plan_of(
        *(form.batch, prepared.rows, columns, prepared.formats, prepared.entries.shape[1], config),
        mixed=prepared.spans is not None,
        x_dtype=of,
        out_dtype=to,
    )

    def multiply(arrays: dict[str, Any]) -> Any:
        options = {"rows": prepared.rows, "formats": prepared.formats, "config": plan.config, "out_dtype": to}
        return mosaic_gpu.multiply(**arrays, **options)

    specs = {name: s if s is None else jax.ShapeDtypeStruct(s.shape, s.dtype) for name, s in shapes.items()}
    return multiply, specs, plan
