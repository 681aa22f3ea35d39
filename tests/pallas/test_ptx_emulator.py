"""The emulator that runs compiled PTX: what it computes, and what it does not let pass."""

from __future__ import annotations

import numpy as np
import pytest
from support.ptx import emulator

HEAD = """.version 8.0
.target sm_80
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<99>;
    .reg .f32 %f<9>, %z;
    .reg .b64 %rd<99>;
    .shared .align 16 .b8 shared;
    ld.param.u64 %rd1, [kernel_param_0];
    ld.param.u64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.b32 %r2, [%rd4];
"""
TAIL = """
    st.global.b32 [%rd5], %r3;
    ret;
}
"""


def launch(body: str, values, threads=32, out=None, **options):
    values = np.asarray(values)
    program = emulator.parse(HEAD + body + TAIL)
    out = np.zeros_like(values) if out is None else out
    results, costs = emulator.launch(program, [values, out], **{"grid": 1, "threads": threads, **options})
    return results[1], costs


def run(body: str, values, threads=32, out=None, **options):
    return launch(body, values, threads, out, **options)[0]


LANE = np.arange(32, dtype=np.uint32)
WORDS = np.random.default_rng(0).integers(0, 1 << 32, 32, dtype=np.uint32)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.u32 %r3, %r2, 7;", lambda w: w + np.uint32(7)),
        ("sub.s32 %r3, 0, %r2;", lambda w: -w),
        ("shr.u32 %r3, %r2, 9;", lambda w: w >> 9),
        ("shr.s32 %r3, %r2, 9;", lambda w: (w.view(np.int32) >> 9).view(np.uint32)),
        ("shl.b32 %r3, %r2, 40;", lambda w: np.zeros_like(w)),
        ("lop3.b32 %r3, %r2, 255, 4096, 0xEA;", lambda w: (w & 255) | 4096),
        (
            "lop3.b32 %r3, 255, %r2, %r1, 0xCA;",
            lambda w: (w & 255) | (np.arange(32, dtype=np.uint32) & ~np.uint32(255)),
        ),
        ("shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;", lambda w: w[np.arange(32) ^ 1]),
        ("shfl.sync.idx.b32 %r3, %r2, 2, 7199, -1;", lambda w: w[np.arange(32) // 4 * 4 + 2]),
        ("setp.lt.u32 %p1, %r1, 5; selp.b32 %r3, %r2, 0, %p1;", lambda w: np.where(LANE < 5, w, 0)),
        (
            "mov.u32 %r3, 1; setp.ne.s32 %p1, %r1, 3; @%p1 mov.u32 %r3, %r2;",
            lambda w: np.where(np.arange(32) != 3, w, 1),
        ),
        ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};", lambda w: w >> 16 | w << 16),
    ],
)
def test_instructions(body, expected):
    np.testing.assert_array_equal(run(body, WORDS), expected(WORDS).astype(np.uint32))


def test_floats_are_rounded_once():
    values = np.random.default_rng(1).standard_normal(32).astype(np.float32)
    got = run("fma.rn.f32 %r3, %r2, %r2, %r2;", values)
    exact = values.astype(np.float64)
    np.testing.assert_array_equal(got, (exact * exact + exact).astype(np.float32))
    halves = np.random.default_rng(2).standard_normal(64).astype(np.float16)
    got = run("mul.rn.f16x2 %r4, %r2, %r2; add.rn.f16x2 %r3, %r4, %r2;", halves.view(np.uint32))
    np.testing.assert_array_equal(got.view(np.float16), halves * halves + halves)


def test_loops_and_labels():
    body = """
    mov.u32 %r3, 0;
    mov.u32 %r4, 0;
$L_loop:
    add.u32 %r3, %r3, %r2;
    add.u32 %r4, %r4, 1;
    setp.lt.u32 %p1, %r4, 5;
    @%p1 bra $L_loop;
"""
    np.testing.assert_array_equal(run(body, WORDS), WORDS * np.uint32(5))


def test_threads_part_and_meet_again():
    body = """
    setp.lt.u32 %p1, %r1, 5;
    @%p1 bra $L_few;
    add.u32 %r3, %r2, 1;
    bra.uni $L_all;
$L_few:
    add.u32 %r3, %r2, 2;
$L_all:
    bar.sync 0;
    shfl.sync.bfly.b32 %r3, %r3, 1, 31, -1;
"""
    want = WORDS + np.where(LANE < 5, 2, 1).astype(np.uint32)
    np.testing.assert_array_equal(run(body, WORDS), want[LANE ^ 1])


def test_matrix_multiply_accumulate():
    """m16n8k16 with the documented places of rows and columns."""
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16)
    lane = np.arange(32)
    row, col = lane // 4, lane % 4
    registers = [a[row + 8 * (i & 1)][lane, :].reshape(32, 16) for i in range(4)]
    words = [
        np.stack([registers[i][lane, 2 * col + 8 * (i >> 1) + e] for e in (0, 1)], axis=1).view(np.uint32)[:, 0]
        for i in range(4)
    ]
    words += [
        np.stack([b[2 * col + 8 * i + e, row] for e in (0, 1)], axis=1).copy().view(np.uint32)[:, 0] for i in (0, 1)
    ]
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%rd4+{128 * i}];" for i in range(6))
    body = loads + (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r10, %r11, %r12, %r13},"
        " {%r14, %r15}, {%z, %z, %z, %z};"
        + "".join(f"st.global.f32 [%rd5+{128 * i}], %f{i};" for i in range(4))
        + "mov.f32 %r3, %f0;"
    )
    body = "mov.f32 %z, 0f00000000;" + body
    out = run(body, np.concatenate(words), out=np.zeros(128, np.float32)).reshape(4, 32)
    want = a.astype(np.float64) @ b.astype(np.float64)
    for i in range(4):
        np.testing.assert_allclose(out[i], want[row + 8 * (i >> 1), 2 * col + (i & 1)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r3, [%rd4+8];", "outside every buffer"),
        ("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd4];", "outside every buffer|not a multiple of 16"),
        ("mov.u32 %r3, %r7;", "%r7 is read before it is written"),
        ("sad.u32 %r3, %r2, %r2, %r2;", "unknown: sad"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 bra $L_x; bar.sync 0; $L_x: mov.u32 %r3, 0;", "not all threads reach it"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 bar.sync 0; mov.u32 %r3, 0;", "not all threads reach it"),
    ],
)
def test_what_must_not_be_is_an_error(body, message):
    with pytest.raises(emulator.PtxError, match=message):
        run(body, WORDS)


def test_copies_arrive_when_they_are_awaited():
    def program(pending: int) -> str:
        return f"""
    mov.u64 %rd6, shared;
    add.s64 %rd7, %rd6, %rd3;
    cp.async.ca.shared.global [%rd7], [%rd4], 4;
    cp.async.commit_group;
    cp.async.wait_group {pending};
    ld.shared.b32 %r3, [%rd7];
"""

    np.testing.assert_array_equal(run(program(0), WORDS), WORDS)
    assert np.all(run(program(1), WORDS) == 0xFFFFFFFF)
