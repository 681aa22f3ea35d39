"""The "fragments" layout: where each field is, and that XLA reads the matrix back, in every format."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from support.arrays import dense, random_array
from support.parts import part, prepared

from pallas_kernels import spqr_matmul
from pallas_kernels.spqr_matmul import entries, fragments
from pallas_kernels.spqr_matmul.formats import Format
from spqr_jax.packing import unpack_codes

FORMS = {
    "3 bits": ((40, 600), {}),
    "2 bits, groups of 48": ((16, 304), {"bits": 2, "group_size": 48}),
    "4 bits, groups of 32": ((33, 1050), {"bits": 4, "group_size": 32}),
    "8 bits, groups of 64, float16": ((20, 300), {"bits": 8, "group_size": 64, "stats_bits": None}),
    "8 bits": ((48, 272), {"bits": 8}),
    "3 bits, float16": ((7, 33), {"stats_bits": None}),
    "1 bit, groups of 128": ((17, 256), {"bits": 1, "group_size": 128}),
    "6 bits, statistics of 6 bits": ((20, 520), {"bits": 6, "stats_bits": 6}),
    "tiles of 32, statistics of 4 bits": ((70, 96), {"tile": 32, "stats_bits": 4}),
    "tiles of 8, one group a row": ((24, 80), {"tile": 8, "group_size": 80}),
    "no outliers, identity order": ((64, 256), {"outliers": 0.0, "permuted": False}),
    "many outliers": ((16, 768), {"outliers": 0.4}),
}
FORMATS = [Format(*form) for form in itertools.product((2, 3, 4, 8), (16, 8), ("nibbles", "halves"))]
ROUNDED = {"6 bits, statistics of 6 bits": 1e-3, "tiles of 8, one group a row": 1e-3}  # scales become float16


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_fields_of_a_step(form):
    """Every code has bits of its own, and lies in a float16's mantissa after at most one shift of its plane."""
    assert form.step_words % 16 == form.code_words % 16 == 0
    taken: set[tuple[int, int]] = set()
    shifts: dict[int, set[int]] = {}
    for block in range(16):
        field = form.field(block)
        if field is None:
            assert (form.width, block, form.position(block)) == (3, 15, 6)
            bits = {(plane, 15) for plane in range(3)}
        else:
            assert field.position >= 0
            shifts.setdefault(field.plane, set()).add(field.shift)
            bits = {(field.plane, field.bit + i) for i in range(form.width)}
        assert form.position(block) + form.width <= 10
        assert not taken & bits
        taken |= bits
    assert taken == {(plane, bit) for plane in range(form.width) for bit in range(16)}
    assert all(len(found - {0}) <= 1 for found in shifts.values())


def test_sizes_of_a_step():
    sizes = {form: form.step_words for form in FORMATS}
    assert sizes[Format(3, 16, "nibbles")] == 480
    assert sizes[Format(3, 8, "nibbles")] == 384 + 48
    assert sizes[Format(4, 16, "halves")] == 512 + 256
    assert sizes[Format(8, 8, "halves")] == 1024 + 128


def code_at(words, form, row, column):
    """One code, from the description of the layout."""
    h, r = divmod(row % 16, 8)
    block, k = divmod(column % 256, 16)
    v, c, e = k >> 3, k >> 1 & 3, k & 1
    step = words[row // 16, column // 256].view(np.uint32)
    half = [int(step[128 * plane + 4 * (4 * r + c) + h + 2 * v]) >> 16 * e & 0xFFFF for plane in range(form.width)]
    field = form.field(block)
    if field is None:
        return sum((half[plane] >> 15) << plane for plane in range(form.width))
    return half[field.plane] >> field.bit & (1 << form.width) - 1


def statistics_at(words, form, row, group):
    """Scale and zero point of a group of a step, from the description of the layout."""
    h, r = divmod(row % 16, 8)
    lines = form.groups // 8
    step, g = divmod(group, form.groups)
    v, c, e = g >> 3, g >> 1 & 3, g & 1
    values = words[row // 16, step].view(np.uint32)[form.code_words :]
    halves = values.view(np.float16).astype(np.float32)
    lane = 4 * r + c
    if form.statistics == "halves":
        at = (
            (lambda which: 128 * which + 4 * lane + h + 2 * v)
            if lines == 2
            else (lambda which: 4 * lane + h + 2 * which)
        )
        return halves[2 * at(0) + e], halves[2 * at(1) + e]
    word = int(values[2 * lane + h] >> 8 * v) if lines == 2 else int(values[lane] >> 8 * h)
    byte = word >> 16 * e & 0xFF
    first = 4 * form.groups + (4 * (2 * c + v) if lines == 2 else 4 * c)
    ss, sz, zs, zz = (halves[2 * (first + which) + e] for which in range(4))
    return ss * ((byte & 15) - sz), zs * ((byte >> 4) - zz)


@pytest.mark.parametrize("name", FORMS)
def test_a_matrix_in_words(name):
    shape, form = FORMS[name]
    array = random_array(shape, **form)
    matrix = prepared("fragments", array)
    [held] = matrix.formats
    words = np.asarray(matrix.words)[0]
    assert words.shape == (-(-shape[0] // 16), -(-shape[1] // 256), held.step_words)
    assert (matrix.parts, matrix.inner, matrix.count, matrix.shape) == ((shape[0],), shape[1], 1, shape)

    rng = np.random.default_rng(0)
    codes = unpack_codes(np.asarray(array.codes), array.bits)
    scale, zero = (np.asarray(statistics, np.float32) for statistics in jax.tree.map(np.asarray, array).statistics())
    for _ in range(200):
        row, column = (int(rng.integers(size)) for size in shape)
        assert code_at(words, held, row, column) == codes[row, column]
        got = statistics_at(words, held, row, column // held.group_columns)
        group = column // array.group_size
        np.testing.assert_allclose(got, (scale[row, group], zero[row, group]), rtol=ROUNDED.get(name, 1e-5), atol=1e-5)

    @jax.jit
    def read(matrix, rows, x):
        with jax.default_matmul_precision("highest"):
            product = spqr_matmul.matmul(x, matrix, implementation="xla")
        return spqr_matmul.dequantize(matrix), spqr_matmul.take_rows(matrix, rows), product

    rows = np.array([[0, shape[0] - 1], [shape[0] // 2, 10_000], [-3, 1]])
    x = rng.standard_normal((2, shape[1])).astype(np.float32)
    want = dense(array)
    tolerance = ROUNDED.get(name, 2e-6)
    for got, exact in zip(read(matrix, rows, x), (want, want[np.clip(rows, 0, shape[0] - 1)], x @ want.T), strict=True):
        assert got.shape == exact.shape
        assert np.linalg.norm(np.asarray(got) - exact) < tolerance * np.linalg.norm(exact)


def test_padding_weighs_nothing():
    array = random_array((5, 270))
    matrix = prepared("fragments", array)
    [form] = matrix.formats
    weights = np.asarray(jax.jit(lambda words: fragments.decode(fragments.by_row(words[0], form), form))(matrix.words))
    assert weights.shape == (1, 16, 512)
    assert np.all(weights[:, :5, :272].any(axis=1))
    assert not np.any(weights[..., 272:])


# ---- outliers -------------------------------------------------------------------------------------------------------


def test_places_of_columns():
    columns = np.arange(entries.MAX_COLUMNS)
    places = entries.place(columns)
    np.testing.assert_array_equal(np.sort(places), columns)
    np.testing.assert_array_equal(entries.column_at(places), columns)
    assert entries.place(512 + 16 * 11 + 8 + 2 * 3 + 1) == 512 + 32 * 3 + 8 * 3 + 4 + 2 + 1


@pytest.mark.parametrize("inner", [33, 1300])
def test_entries_by_row_and_quarter(inner):
    array = random_array((40, inner), outliers=0.1)
    matrix = prepared("fragments", array)
    held, starts = np.asarray(matrix.entries)[0].view(np.uint32), np.asarray(matrix.starts)[0]
    assert starts.shape == (4 * 48 + 1,)
    assert starts[-1] == np.asarray(array.outlier_row_ptr)[-1]
    assert held.size == entries.capacity(starts[-1])
    assert not np.any(held[starts[-1] :])
    steps = -(-inner // 256)
    got = np.zeros((48, inner), np.float32)
    for row, quarter in itertools.product(range(48), range(4)):
        span = held[starts[4 * row + quarter] : starts[4 * row + quarter + 1]]
        columns = entries.column_at((span & 0xFFFF).astype(np.int64))
        assert np.all(columns // 256 // -(-steps // 4) == quarter)
        assert np.all(np.diff(columns) > 0)
        got[row, columns] = (span >> 16).astype(np.uint16).view(np.float16)
    given = part(array)
    want = np.zeros((48, inner), np.float32)
    total = starts[-1]
    rows = np.repeat(np.arange(40), np.diff(given.row_ptr))
    want[rows, np.asarray(given.cols)[:total]] = np.asarray(given.values)[:total]
    np.testing.assert_array_equal(got, want)


def test_capacity_takes_few_values():
    sizes = [entries.capacity(n) for n in range(0, 100_000, 7)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 150
    assert all(n <= size <= max(64, n * 17 / 16 + 64) for n, size in zip(range(0, 100_000, 7), sizes, strict=True))
