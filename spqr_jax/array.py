"""`SpQRArray`: a weight matrix as packed codes, two levels of statistics and outliers.

The dequantization formula of the whole project is written once, in
:meth:`SpQRArray.statistics` and :meth:`SpQRArray.to_dense`; every kernel is
tested against it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import SpQRError
from spqr_jax.layout import ArrayLayout, column_dtype, leaf_specs, round_up
from spqr_jax.packing import unpack_codes

_OUTLIER_BITS = 32  # a 16-bit value and a 16-bit column, as the paper counts


@dataclasses.dataclass(frozen=True)
class SpQRArray:
    """A quantized matrix W [out, in] that acts as a linear operator on activations.

    Make one with `quantize_weight` or `quantize`, multiply by it with `linear`. It is a pytree.

    The matrix is the sum of a dense part, made of low-bit codes and two levels of statistics, and sparse outliers
    (arXiv 2306.03078). Below, g = `group_size`, G = `stats_group_size` and b = `bits`. Columns are stored in the
    order `perm`. The inputs are padded to whole groups and to whole runs of 16 codes, the outputs to whole tiles of
    G rows. Padding never appears in a result.

    `validate` checks these invariants:

    1. `codes` is uint16 [out, padded_in / 16 * b]. A run of 16 codes is b words, one little-endian bit stream.
    2. With a second level, `scale_codes` and `zero_codes` are uint16 [groups, padded_out / 16 * bits of a statistic],
       packed along the rows. `tile_stats` is float16 [padded_out / G, groups, 4] = (ss, sz, zs, zz). The scale of a row
       is s = ss * (scale_code - sz), its zero point is z = zs * (zero_code - zz).
    3. Without a second level, `scale_codes` and `zero_codes` are None. `tile_stats` is float16 [out, groups, 2] and
       holds the scale and the zero point.
    4. The dense part of a weight is s * (code - z), computed in float32.
    5. Outliers are **added** to the dense part. They are sorted by row, then by column. `outlier_row_ptr` is
       int32 [out + 1] and rises from 0 to `nnz`.
    6. `outlier_cols` (uint16, or int32 with more than 65536 inputs) and `outlier_values` (float16) have max(nnz, 1)
       entries. Columns are in permuted order and below `in`. An entry past `nnz` has the value 0.
    7. `perm` (uint16, or int32 with more than 65536 inputs) is a permutation [in]: ``x[..., perm]`` is in the order of
       the codes. None means the original order.
    8. All statistics and outlier values are finite.

    Attributes:
      codes: packed weight codes, see 1.
      scale_codes: packed codes of the scales, see 2; None without a second level.
      zero_codes: packed codes of the zero points, see 2; None without a second level.
      tile_stats: float16 statistics, see 2 and 3.
      outlier_cols: column of each outlier, see 6.
      outlier_values: value of each outlier, see 6.
      outlier_row_ptr: number of outliers before each row, see 5.
      perm: stored order of the inputs, see 7.
      shape: (out, in).
      bits: bits of a weight code.
      group_size: inputs that share one scale and zero point.
      stats_group_size: rows that share one second-level fit.
      scale_bits: bits of a scale code; 16 without a second level.
      zero_bits: bits of a zero-point code; 16 without a second level.
      nnz: number of outliers.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (64, 32))
      >>> array = spqr_jax.quantize_weight(w, None, spqr_jax.SpQRConfig.rtn(bits=4))
      >>> array.shape, array.bits, array.nnz
      ((64, 32), 4, 0)
      >>> array.ideal_bits  # codes of 4 bits, and a scale and a zero of 16 bits for 16 weights
      6.0
      >>> array.to_dense().shape
      (64, 32)
    """

    codes: Any
    scale_codes: Any
    zero_codes: Any
    tile_stats: Any
    outlier_cols: Any
    outlier_values: Any
    outlier_row_ptr: Any
    perm: Any
    shape: tuple[int, int]
    bits: int
    group_size: int
    stats_group_size: int
    scale_bits: int
    zero_bits: int
    nnz: int

    # ---- what it is -------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        """Always 2."""
        return 2

    @property
    def dtype(self) -> np.dtype:
        """Always float32, in which the matrix is defined."""
        return np.dtype(np.float32)

    @property
    def size(self) -> int:
        """Number of weights, out * in."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves, padding included."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def quantized_stats(self) -> bool:
        """Whether scales and zero points are quantized too (a second level)."""
        return self.scale_codes is not None

    @property
    def ideal_bits(self) -> float:
        """Bits per weight by the paper's formula (arXiv 2306.03078, section 4.3).

        The formula is b + (scale_bits + zero_bits) / g + 64 / (g * G) + 32 * (outliers per weight). Without a second
        level the third term is absent. Row pointers, the permutation and padding do not count; see `stored_bits`.
        """
        group_size = min(self.group_size, self.shape[1])  # one group a row: no more than its inputs
        bits = self.bits + (self.scale_bits + self.zero_bits) / group_size
        if self.quantized_stats:
            bits += 64 / (group_size * self.stats_group_size)
        return bits + _OUTLIER_BITS * self.nnz / self.size

    @property
    def stored_bits(self) -> float:
        """Bits per weight that are held in memory, 8 * nbytes / (out * in)."""
        return 8 * self.nbytes / self.size

    @property
    def rows(self) -> Any:
        """Row of each entry of `outlier_cols`, int32 [max(nnz, 1)]."""
        counts = jnp.diff(self.outlier_row_ptr)
        return jnp.repeat(
            jnp.arange(self.shape[0], dtype=jnp.int32), counts, total_repeat_length=self.outlier_cols.shape[0]
        )

    # ---- what it holds ----------------------------------------------------------------

    def statistics(self) -> tuple[Any, Any]:
        """Scale and zero point of each group, both float32 [out, groups].

        Returns:
          Two NumPy arrays if the leaves are NumPy arrays, else two JAX arrays.
        """
        xp = np if isinstance(self.tile_stats, np.ndarray) else jnp
        stats = self.tile_stats.astype(np.float32)
        if not self.quantized_stats:
            return stats[..., 0], stats[..., 1]
        scale_codes = unpack_codes(self.scale_codes, self.scale_bits).T.astype(np.float32)
        zero_codes = unpack_codes(self.zero_codes, self.zero_bits).T.astype(np.float32)
        ss, sz, zs, zz = xp.moveaxis(xp.repeat(stats, self.stats_group_size, axis=0), -1, 0)
        out = self.shape[0]
        return (ss * (scale_codes - sz))[:out], (zs * (zero_codes - zz))[:out]

    def to_dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Dequantizes the whole matrix, outliers included.

        Args:
          dtype: type of the result.

        Returns:
          The matrix [out, in], its columns in the original order.
        """
        if isinstance(self.codes, jax.core.Tracer):
            return _dense(self, self.rows, None if self.perm is None else jnp.argsort(self.perm), dtype)
        # Outlier counts differ from matrix to matrix: pad them to few distinct
        # lengths, so that matrices of one shape share one compilation.
        length = self.outlier_cols.shape[0]
        padded = round_up(length, max(1024, 1 << max(length.bit_length() - 2, 0)))
        array = dataclasses.replace(
            self,
            outlier_cols=np.pad(np.asarray(self.outlier_cols), (0, padded - length)),
            outlier_values=np.pad(np.asarray(self.outlier_values), (0, padded - length)),
            outlier_row_ptr=None,
            perm=None,
            nnz=0,
        )
        rows = self._host_rows()
        place = None if self.perm is None else np.argsort(np.asarray(self.perm))
        return _dense_jit(array, np.pad(rows, (0, padded - len(rows))), place, dtype)

    def _host_rows(self) -> np.ndarray:
        """Row of each outlier, int32 [nnz]."""
        return np.repeat(np.arange(self.shape[0], dtype=np.int32), np.diff(np.asarray(self.outlier_row_ptr)))

    def to_coo(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The outliers as coordinates and values, sorted by row, then by column.

        Returns:
          Rows int32 [nnz], columns int32 [nnz] and values float16 [nnz]. The columns are in the matrix's original
          order.
        """
        rows = self._host_rows()
        cols = np.asarray(self.outlier_cols)[: self.nnz].astype(np.int32)
        if self.perm is not None:
            cols = np.asarray(self.perm).astype(np.int32)[cols]
        order = np.lexsort((cols, rows))
        return rows[order], cols[order], np.asarray(self.outlier_values)[: self.nnz][order]

    def validate(self) -> SpQRArray:
        """Checks every invariant.

        The leaves may be arrays, `jax.ShapeDtypeStruct` or anything with a shape and a dtype. Values are checked
        only if all leaves are arrays.

        Returns:
          The array itself.

        Raises:
          SpQRError: some invariants do not hold. The message names all of them.
        """
        problems = _layout_problems(self)
        if not problems and all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(self)):
            problems = _value_problems(self)
        if problems:
            raise SpQRError(f"not a valid SpQRArray of shape {self.shape}: " + "; ".join(problems))
        return self


jax.tree_util.register_dataclass(
    SpQRArray,
    data_fields=[
        "codes",
        "scale_codes",
        "zero_codes",
        "tile_stats",
        "outlier_cols",
        "outlier_values",
        "outlier_row_ptr",
        "perm",
    ],
    meta_fields=["shape", "bits", "group_size", "stats_group_size", "scale_bits", "zero_bits", "nnz"],
)


def _dense(array: SpQRArray, rows: Any, place: Any, dtype: Any) -> jax.Array:
    """The matrix of an array whose outliers lie in `rows`; `place` [in], which column of the codes each input has."""
    scale, zero = array.statistics()
    groups = scale.shape[1]
    codes = unpack_codes(array.codes, array.bits).astype(jnp.float32)
    codes = codes[:, : groups * array.group_size].reshape(array.shape[0], groups, array.group_size)
    dense = scale[..., None] * (codes - zero[..., None])
    dense = dense.reshape(array.shape[0], -1)[:, : array.shape[1]]
    dense = dense.at[rows, array.outlier_cols.astype(jnp.int32)].add(
        array.outlier_values.astype(jnp.float32), mode="promise_in_bounds"
    )
    if place is not None:
        dense = jnp.take(dense, place, axis=1)
    return dense.astype(dtype)


_dense_jit = jax.jit(_dense, static_argnums=3)


# ---- building one -----------------------------------------------------------------------


def pack_array(
    layout: ArrayLayout,
    *,
    codes: Any,
    scale_codes: Any,
    zero_codes: Any,
    tile_stats: Any,
    residual: np.ndarray,
    outliers: np.ndarray,
    perm: np.ndarray | None,
    bits: int,
    stats_group_size: int,
    stats_bits: int,
) -> SpQRArray:
    """Puts a solver's output together; the outliers become sparse here, on the host.

    Args:
      layout: of the matrix, from :func:`array_layout`.
      codes, scale_codes, zero_codes, tile_stats: packed, as the leaves of
        :class:`SpQRArray` of the same names.
      residual: float16 [out, in], what an outlier adds, permuted columns.
      outliers: bool [out, in], where the outliers are, permuted columns.
      perm: integers [in], or None for the identity.
      bits: bits a code.
      stats_group_size: rows a tile.
      stats_bits: bits of a scale or zero code; 16 without a second level.
    """
    rows, cols = np.nonzero(outliers)
    nnz = len(rows)
    values = residual[rows, cols] if nnz else np.zeros(1, np.float16)
    inner = layout.shape[1]
    return SpQRArray(
        codes=codes,
        scale_codes=scale_codes,
        zero_codes=zero_codes,
        tile_stats=tile_stats,
        # Put there, not made by jnp.asarray, which compiles a program for each number of outliers.
        outlier_cols=jax.device_put((cols if nnz else np.zeros(1)).astype(column_dtype(inner))),
        outlier_values=jax.device_put(values.astype(np.float16)),
        outlier_row_ptr=jax.device_put(np.searchsorted(rows, np.arange(layout.shape[0] + 1)).astype(np.int32)),
        perm=None if perm is None else jax.device_put(np.asarray(perm).astype(column_dtype(inner))),
        shape=layout.shape,
        bits=bits,
        group_size=layout.group_size,
        stats_group_size=stats_group_size,
        scale_bits=stats_bits,
        zero_bits=stats_bits,
        nnz=nnz,
    )


# ---- the invariants ---------------------------------------------------------------------


def _layout_problems(array: SpQRArray) -> list[str]:
    out, inner = array.shape
    if out < 1 or inner < 1:
        return [f"shape {array.shape} has no weights"]
    if not 1 <= array.bits <= 8 or array.group_size < 8 or array.group_size % 8 or array.stats_group_size < 8:
        return [
            f"bits={array.bits}, group_size={array.group_size}, stats_group_size={array.stats_group_size} "
            "is not a supported format"
        ]
    second_level = array.quantized_stats
    expected = leaf_specs(
        array.shape,
        bits=array.bits,
        group_size=array.group_size,
        stats_group_size=array.stats_group_size,
        stats_bits=(array.scale_bits, array.zero_bits) if second_level else None,
        entries=max(array.nnz, 1),
        permuted=array.perm is not None,
    )
    problems = []
    for name, want in expected.items():
        leaf = getattr(array, name)
        have = None if leaf is None else (tuple(leaf.shape), np.dtype(leaf.dtype))
        if want is None:
            if have is not None:
                problems.append(f"{name} should be absent, but is {have}")
        elif have != (want[0], np.dtype(want[1])):
            problems.append(f"{name} should be {np.dtype(want[1])} {want[0]}, but is {have}")
    return problems


def _value_problems(array: SpQRArray) -> list[str]:
    out, inner = array.shape
    problems = []
    row_ptr = np.asarray(array.outlier_row_ptr)
    if row_ptr[0] != 0 or row_ptr[out] != array.nnz or np.any(row_ptr[1:] < row_ptr[:-1]):  # differences may overflow
        problems.append(f"outlier_row_ptr does not rise from 0 to nnz={array.nnz}")
    cols = np.asarray(array.outlier_cols).astype(np.int64)
    values = np.asarray(array.outlier_values)
    if cols.min() < 0 or cols.max() >= inner:
        problems.append(f"outlier_cols are not all in 0..{inner - 1}")
    if not problems and array.nnz > 1:
        rising = np.diff(cols[: array.nnz]) > 0
        first_of_row = np.zeros(array.nnz + 1, bool)
        first_of_row[row_ptr] = True
        if not np.all(rising | first_of_row[1 : array.nnz]):
            problems.append("outlier_cols do not rise within a row")
    if np.any(values[array.nnz :] != 0):
        problems.append("an outlier entry past nnz is not zero")
    if not np.all(np.isfinite(values)):
        problems.append("an outlier value is not finite")
    if not np.all(np.isfinite(np.asarray(array.tile_stats))):
        problems.append("a statistic in tile_stats is not finite")
    if array.perm is not None and not np.array_equal(np.sort(np.asarray(array.perm)), np.arange(inner)):
        problems.append("perm is not a permutation")
    return problems
