"""Quantized matrices as the Pallas kernels' packing takes them."""

from __future__ import annotations

import jax
import numpy as np

from pallas_kernels import spqr_matmul
from spqr_jax.array import SpQRArray
from spqr_jax.products.pallas import part_of


def part(array: SpQRArray) -> spqr_matmul.Part:
    """The arrays of a matrix, on the host: nothing is compiled."""
    return part_of(jax.tree.map(np.asarray, array))


def prepared(layout: spqr_matmul.Layout, *arrays: SpQRArray) -> spqr_matmul.Prepared:
    """Matrices that share the order of the first, joined."""
    return spqr_matmul.prepare(layout, [part(array) for array in arrays], arrays[0].perm)
