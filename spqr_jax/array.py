"""`SpQRArray`: a weight matrix as packed codes, two levels of statistics and outliers.

The dequantization formula of the whole project is written once, in
:meth:`SpQRArray.statistics` and :meth:`SpQRArray.to_dense`; every kernel is
tested against it.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.errors import SpQRError
from spqr_jax.invariants import layout_problems, value_problems
from spqr_jax.layout import ArrayLayout, column_dtype, entry_capacity
from spqr_jax.packing import unpack_codes
from spqr_jax.quantized import QuantizedMatrix

_OUTLIER_BITS = 32  # a 16-bit value and a 16-bit column, as the paper counts


@dataclasses.dataclass(frozen=True, repr=False)
class SpQRArray(QuantizedMatrix):
    """A quantized matrix W [out, in] that acts as a linear operator on activations.

    Make one with `quantize_weight` or `quantize`, multiply by it with `linear` or ``x @ array.T``. It is a pytree whose
    structure depends on its shape and format only: arrays of one shape and format with equally long outlier lists can
    be stacked with `jax.tree.map` (see `with_capacity`).

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
    6. `outlier_cols` (uint16, or int32 with more than 65536 inputs) and `outlier_values` (float16) have at least
       max(nnz, 1) entries. Columns are in permuted order and below `in`. An entry past `nnz` has the value 0.
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

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (64, 32))
      >>> array = spqr_jax.quantize_weight(w, None, spqr_jax.SpQRConfig.rtn(bits=4))
      >>> array.shape, array.bits, array.nnz
      ((64, 32), 4, 0)
      >>> array
      SpQRArray((64, 32), bits=4, group_size=16)
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

    # ---- what it is -------------------------------------------------------------------

    def __repr__(self) -> str:
        second = "" if not self.quantized_stats else f", stats_bits={self.scale_bits}"
        return f"SpQRArray({self.shape}, bits={self.bits}, group_size={self.group_size}{second})"

    @property
    def nnz(self) -> int:
        """Number of outliers, read from `outlier_row_ptr`. Not available on traced arrays."""
        if isinstance(self.outlier_row_ptr, jax.core.Tracer):
            raise SpQRError("nnz is data: inside jit, use outlier_row_ptr[-1]")
        return int(np.asarray(self.outlier_row_ptr)[-1])

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
        """Bits per weight that a checkpoint stores, of all leaves, without the unused entries of the outlier list."""
        return 8 * self.stored_bytes / self.size

    @property
    def stored_bytes(self) -> int:
        """Bytes that a checkpoint stores, `nbytes` without the unused entries of the outlier list."""
        unused = self.outlier_cols.shape[0] - max(self.nnz, 1)
        entry = np.dtype(self.outlier_cols.dtype).itemsize + np.dtype(self.outlier_values.dtype).itemsize
        return self.nbytes - unused * entry

    @property
    def rows(self) -> Any:
        """Row of each entry of `outlier_cols`, int32 [entries]; entries past the last outlier count as row 0."""
        return _rows(self.outlier_row_ptr, self.outlier_cols.shape[0])

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
        return _dense_jit(self, np.dtype(dtype))

    def to_dense_exactly(self) -> np.ndarray:
        """Dequantizes the whole matrix on the host, with every product and sum rounded by itself.

        `to_dense` may fuse a product and a sum, as the compiler likes, and then differs from this in the last bit. The
        solver gives calibration text exactly these values, so a run that goes on can make them again.

        Returns:
          float32 [out, in], its columns in the original order.
        """
        array = jax.tree.map(np.asarray, self)
        (out, inner), (scale, zero) = self.shape, array.statistics()
        groups = scale.shape[1]
        codes = unpack_codes(array.codes, self.bits)[:, : groups * self.group_size].astype(np.float32)
        dense = codes.reshape(out, groups, self.group_size)
        dense -= zero[..., None]
        dense *= scale[..., None]
        dense = dense.reshape(out, -1)[:, :inner]
        dense[self._host_rows(), array.outlier_cols[: self.nnz]] += array.outlier_values[: self.nnz].astype(np.float32)
        if array.perm is None:
            return dense
        original = np.empty_like(dense)
        original[:, array.perm] = dense
        return original

    def multiply(self, x: jax.Array) -> jax.Array:
        """y = x Wᵀ through the dense matrix, in the type of `x`: [..., in] -> [..., out]."""
        self._check_input(x)
        return jax.lax.dot_general(
            x, self.to_dense(x.dtype), (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=x.dtype
        )

    def take_rows(self, index: jax.Array) -> jax.Array:
        """Rows of the matrix, float32 [..., in]; indices outside 0..out-1 are clipped."""
        return jnp.take(self.to_dense(), index, axis=0, mode="clip")

    def with_capacity(self, entries: int) -> SpQRArray:
        """The same matrix with an outlier list of another length.

        Args:
          entries: entries of the new list, at least max(nnz, 1). Unused entries have the value 0.

        Returns:
          The array with `outlier_cols` and `outlier_values` of this length, on the device where they were.
        """
        length = self.outlier_cols.shape[0]
        if entries == length:
            return self
        if entries < max(self.nnz, 1):
            raise SpQRError(f"an outlier list of {entries} entries cannot hold {self.nnz} outliers")

        def resized(leaf: Any) -> Any:
            resized_leaf = np.zeros(entries, leaf.dtype)
            kept = min(entries, length)
            resized_leaf[:kept] = np.asarray(leaf)[:kept]
            return jax.device_put(resized_leaf) if isinstance(leaf, jax.Array) else resized_leaf

        return dataclasses.replace(
            self, outlier_cols=resized(self.outlier_cols), outlier_values=resized(self.outlier_values)
        )

    def trimmed(self) -> SpQRArray:
        """The same matrix without unused outlier entries, as a checkpoint stores it."""
        return self.with_capacity(max(self.nnz, 1))

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
        problems = layout_problems(self)
        if not problems and all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(self)):
            problems = value_problems(self)
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
    meta_fields=["shape", "bits", "group_size", "stats_group_size", "scale_bits", "zero_bits"],
)


def _rows(row_ptr: Any, entries: int) -> jax.Array:
    """Row of each entry, int32 [entries]; 0 past the last outlier, where the value is 0."""
    entry = jnp.arange(entries, dtype=jnp.int32)
    rows = jnp.searchsorted(row_ptr, entry, side="right", method="scan").astype(jnp.int32) - 1
    return jnp.where(entry < row_ptr[-1], rows, 0)


@partial(jax.jit, static_argnums=1)
def _dense_jit(array: SpQRArray, dtype: Any) -> jax.Array:
    """The matrix by its definition; compiled once for each shape, format and capacity."""
    scale, zero = array.statistics()
    groups = scale.shape[1]
    codes = unpack_codes(array.codes, array.bits).astype(jnp.float32)
    codes = codes[:, : groups * array.group_size].reshape(array.shape[0], groups, array.group_size)
    dense = scale[..., None] * (codes - zero[..., None])
    dense = dense.reshape(array.shape[0], -1)[:, : array.shape[1]]
    dense = dense.at[array.rows, array.outlier_cols.astype(jnp.int32)].add(
        array.outlier_values.astype(jnp.float32), mode="promise_in_bounds"
    )
    if array.perm is not None:
        column = jnp.arange(array.shape[1], dtype=jnp.int32)
        place = jnp.zeros_like(column).at[array.perm.astype(jnp.int32)].set(column, unique_indices=True)
        dense = jnp.take(dense, place, axis=1)
    return dense.astype(dtype)


# ---- building one -----------------------------------------------------------------------


def pack_array(
    layout: ArrayLayout,
    *,
    codes: Any,
    scale_codes: Any,
    zero_codes: Any,
    tile_stats: Any,
    row_ptr: np.ndarray,
    cols: np.ndarray,
    values: np.ndarray,
    perm: np.ndarray | None,
    bits: int,
    stats_group_size: int,
    stats_bits: int,
) -> SpQRArray:
    """Puts a solver's output together.

    Args:
      layout: of the matrix, from :func:`array_layout`.
      codes, scale_codes, zero_codes, tile_stats: packed, as the leaves of
        :class:`SpQRArray` of the same names.
      row_ptr: int32 [out + 1], outliers before each row.
      cols: integers [nnz], columns of the outliers, permuted; sorted by row, then by column.
      values: float16 [nnz], what the outliers add.
      perm: integers [in], or None for the identity.
      bits: bits a code.
      stats_group_size: rows a tile.
      stats_bits: bits of a scale or zero code; 16 without a second level.
    """
    nnz, inner = len(cols), layout.shape[1]
    padding = (0, entry_capacity(nnz) - nnz)
    return SpQRArray(
        codes=codes,
        scale_codes=scale_codes,
        zero_codes=zero_codes,
        tile_stats=tile_stats,
        # Put there, not made by jnp.asarray, which compiles a program for each number of outliers.
        outlier_cols=jax.device_put(np.pad(cols.astype(column_dtype(inner)), padding)),
        outlier_values=jax.device_put(np.pad(values.astype(np.float16), padding)),
        outlier_row_ptr=jax.device_put(row_ptr.astype(np.int32)),
        perm=None if perm is None else jax.device_put(np.asarray(perm).astype(column_dtype(inner))),
        shape=layout.shape,
        bits=bits,
        group_size=layout.group_size,
        stats_group_size=stats_group_size,
        scale_bits=stats_bits,
        zero_bits=stats_bits,
    )
