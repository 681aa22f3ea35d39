"""Single instructions in the PTX emulator, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from support.ptx.snippets import run

LANE = np.arange(32, dtype=np.uint32)
WORDS = np.random.default_rng(0).integers(0, 1 << 32, 32, dtype=np.uint32)
FLOATS = np.random.default_rng(1).standard_normal(32).astype(np.float32) * 100
HALVES = np.random.default_rng(2).standard_normal((32, 2)).astype(np.float16)
WIDE = WORDS.astype(np.uint64)
SIGNED = WORDS.view(np.int32).astype(np.int64)


def bytes_of(words):
    return words.view(np.uint8).reshape(-1, 4)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.u32 %r3, %r2, 7;", WORDS + np.uint32(7)),
        ("sub.s32 %r3, 0, %r2;", -WORDS),
        ("mul.lo.s32 %r3, %r2, -5;", WORDS * np.uint32(2**32 - 5)),
        ("mul.hi.u32 %r3, %r2, 3000000000;", WIDE * np.uint64(3000000000) >> np.uint64(32)),
        ("mul.hi.s32 %r3, %r2, -1000000000;", SIGNED * -1000000000 >> 32),
        ("mad.hi.u32 %r3, %r2, 65536, 7;", (WORDS >> 16) + np.uint32(7)),
        ("mul.wide.s32 %rd9, %r2, -3; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r3, %rd9;", SIGNED * -3 >> 32),
        ("mad.wide.u32 %rd9, %r2, 8, %rd3; shr.u64 %rd9, %rd9, 3; cvt.u32.u64 %r3, %rd9;", WIDE + (LANE >> 1)),
        (
            "cvt.u64.u32 %rd9, %r2; shl.b64 %rd9, %rd9, 31; mul.hi.u64 %rd9, %rd9, %rd9; cvt.u32.u64 %r3, %rd9;",
            [int(w) ** 2 >> 2 & 0xFFFFFFFF for w in WORDS],
        ),
        ("div.s32 %r3, %r2, 1000;", np.trunc(SIGNED / 1000).astype(np.int64)),
        ("rem.s32 %r3, %r2, 1000;", np.fmod(SIGNED, 1000)),
        ("div.u32 %r3, %r2, 1000;", WORDS // 1000),
        ("min.s32 %r3, %r2, 5;", np.minimum(SIGNED, 5)),
        ("max.u32 %r3, %r2, 5;", np.maximum(WORDS, 5)),
        ("shr.u32 %r3, %r2, 9;", WORDS >> 9),
        ("shr.s32 %r3, %r2, 9;", SIGNED >> 9),
        ("shr.s32 %r3, %r2, 99;", np.where(SIGNED < 0, -1, 0)),
        ("shl.b32 %r3, %r2, 40;", 0 * WORDS),
        ("lop3.b32 %r3, %r2, 255, 4096, 0xEA;", (WORDS & 255) | 4096),
        ("lop3.b32 %r3, 255, %r2, %r1, 0xCA;", (WORDS & 255) | (LANE & ~np.uint32(255))),
        ("shf.l.wrap.b32 %r3, %r1, %r2, 35;", WORDS << 3 | LANE >> 29),
        ("shf.r.wrap.b32 %r3, %r2, %r1, 8;", WORDS >> 8 | LANE << 24),
        ("shf.r.clamp.b32 %r3, %r2, %r1, 40;", LANE),
        ("prmt.b32 %r3, %r2, %r1, 0x4321;", WORDS >> 8 | LANE << 24),
        ("prmt.b32 %r3, %r2, 0, 0xBBBB;", np.where(WORDS >> 31, 0xFFFFFFFF, 0)),
        ("bfe.u32 %r3, %r2, 5, 7;", WORDS >> 5 & 127),
        ("bfe.s32 %r3, %r2, 5, 7;", (SIGNED << 52 >> 57)),
        ("bfi.b32 %r3, %r1, %r2, 4, 8;", (WORDS & ~np.uint32(255 << 4)) | LANE << 4),
        ("popc.b32 %r3, %r2;", np.unpackbits(bytes_of(WORDS), axis=1).sum(axis=1)),
        ("clz.b32 %r3, %r1;", [32 - int(lane).bit_length() for lane in LANE]),
        ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};", WORDS >> 16 | WORDS << 16),
        ("mov.b32 {_, %rs2}, %r2; cvt.u32.u16 %r3, %rs2;", WORDS >> 16),
        ("cvt.u16.u32 %rs1, %r2; cvt.s32.s16 %r3, %rs1;", WORDS.astype(np.int16)),
        ("cvt.s32.s8 %r3, %r2;", WORDS.astype(np.int8)),
        ("cvt.sat.u8.s32 %r3, %r2;", np.clip(SIGNED, 0, 255)),
        ("setp.lt.u32 %p1, %r1, 5; selp.b32 %r3, %r2, 0, %p1;", np.where(LANE < 5, WORDS, 0)),
        ("setp.lt.u32 %p1|%p2, %r1, 5; selp.b32 %r3, %r2, 0, %p2;", np.where(LANE < 5, 0, WORDS)),
        (
            "setp.lt.u32 %p1, %r1, 9; setp.gt.and.u32 %p2, %r1, 5, %p1; selp.b32 %r3, %r2, 0, %p2;",
            np.where((LANE > 5) & (LANE < 9), WORDS, 0),
        ),
        (
            "setp.lt.u32 %p1, %r1, 9; setp.gt.and.u32 %p2|%p3, %r1, 20, !%p1; selp.b32 %r3, %r2, 0, %p3;",
            np.where((LANE <= 20) & (LANE >= 9), WORDS, 0),
        ),
        ("mov.u32 %r3, 1; setp.ne.s32 %p1, %r1, 3; @%p1 mov.u32 %r3, %r2;", np.where(LANE != 3, WORDS, 1)),
        ("mov.u32 %r3, 1; setp.ne.s32 %p1, %r1, 3; @!%p1 ld.global.u32 %r3, [%rd4];", np.where(LANE == 3, WORDS, 1)),
        ("shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;", WORDS[LANE ^ 1]),
        ("shfl.sync.idx.b32 %r3, %r2, 2, 7199, -1;", WORDS[LANE // 4 * 4 + 2]),
        ("shfl.sync.down.b32 %r3|%p1, %r2, 3, 31, -1; @!%p1 mov.u32 %r3, 9;", np.r_[WORDS[3:], [9, 9, 9]]),
        ("shfl.sync.up.b32 %r3|%p1, %r2, 3, 0, -1; @!%p1 mov.u32 %r3, 9;", np.r_[[9, 9, 9], WORDS[:-3]]),
        ("redux.sync.max.u32 %r3, %r2, 0xffffffff;", np.full(32, WORDS.max())),
        ("redux.sync.min.s32 %r3, %r2, -1;", np.full(32, SIGNED.min())),
        ("redux.sync.add.u32 %r3, %r1, -1;", np.full(32, 496)),
        ("setp.lt.u32 %p1, %r1, 5; vote.sync.ballot.b32 %r3, %p1, -1;", np.full(32, 31)),
        ("elect.sync %r4|%p1, -1; selp.b32 %r3, %r2, %r4, %p1;", np.where(LANE == 0, WORDS, 0)),
        ("ld.global.nc.L1::no_allocate.L2::128B.b32 %r3, [%rd4];", WORDS),
        ("ld.global.nc.L1::evict_last.v2.b32 {%r4, %r3}, [%rd1+8];", np.full(32, WORDS[3])),
        ("ld.global.v4.u32 {%r4, %r5, %r6, %r3}, [%rd1+16];", np.full(32, WORDS[7])),
        ("ld.global.u8 %rs1, [%rd4+3]; cvt.u32.u16 %r3, %rs1;", WORDS >> 24),
        ("ld.global.s8 %rs1, [%rd4+3]; cvt.s32.s16 %r3, %rs1;", SIGNED >> 24),
        ("cvta.shared.u64 %rd9, %rd8; st.b32 [%rd9], %r2; ld.shared.b32 %r3, [%rd8];", WORDS),
    ],
)
def test_words(body, expected):
    expected = np.asarray(expected).astype(np.int64) & 0xFFFFFFFF
    np.testing.assert_array_equal(run(body, WORDS), expected)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.f32 %f1, %r2, %r2;", FLOATS + FLOATS),
        ("min.f32 %f1, %r2, 0f7FC00000;", FLOATS),  # with what is no number
        ("max.NaN.f32 %f1, %r2, 0f7FC00000;", FLOATS * np.nan),
        ("mov.b32 %f2, %r2; mul.ftz.f32 %f1, %f2, 0f00400000;", FLOATS * 0),  # a subnormal number
        ("mov.b32 %f2, %r2; mul.f32 %f1, %f2, 0f00400000;", FLOATS * np.uint32(0x00400000).view(np.float32)),
        ("mul.f32 %f1, %r2, 0f3C23D70A; ex2.approx.ftz.f32 %f1, %f1;", np.exp2(FLOATS * np.float32(0.01))),
        ("rcp.approx.f32 %f1, %r2;", 1 / FLOATS),
        ("abs.f32 %f2, %r2; rsqrt.approx.f32 %f1, %f2;", (1 / np.sqrt(np.abs(FLOATS).astype(np.float64)))),
        ("div.full.f32 %f1, %r2, 0f40400000;", FLOATS / np.float32(3)),
        ("cvt.rni.f32.f32 %f1, %r2;", np.rint(FLOATS)),
        ("cvt.rzi.s32.f32 %r4, %r2; cvt.rn.f32.s32 %f1, %r4;", np.trunc(FLOATS)),
        ("cvt.rn.f16.f32 %rs1, %r2; cvt.f32.f16 %f1, %rs1;", FLOATS.astype(np.float16)),
        ("setp.ltu.f32 %p1, %r2, 0f7FC00000; selp.f32 %f1, 0f3F800000, %z, %p1;", np.ones(32)),
        ("setp.lt.f32 %p1, %r2, 0f7FC00000; selp.f32 %f1, 0f3F800000, %z, %p1;", np.zeros(32)),
        ("neg.f32 %f1, %r2;", -FLOATS),
    ],
)
def test_floats(body, expected):
    got = run(f"mov.f32 %z, 0f00000000; {body} mov.b32 %r3, %f1;", FLOATS)
    np.testing.assert_allclose(got, np.asarray(expected, np.float32), rtol=2e-7)


def test_floats_are_rounded_once():
    got = run("fma.rn.f32 %r3, %r2, %r2, %r2;", FLOATS)
    exact = FLOATS.astype(np.float64)
    np.testing.assert_array_equal(got, (exact * exact + exact).astype(np.float32))
    got = run("mul.rn.f16x2 %r4, %r2, %r2; add.rn.f16x2 %r3, %r4, %r2;", HALVES.view(np.uint32)[:, 0])
    np.testing.assert_array_equal(got.view(np.float16).reshape(-1, 2), HALVES * HALVES + HALVES)


def test_bfloat16_is_rounded_to_nearest_even():
    got = run("cvt.rn.bf16x2.f32 %r3, %r2, 0f3F800000;", FLOATS.view(np.uint32))
    bits = FLOATS.view(np.uint32).astype(np.uint64)
    want = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    np.testing.assert_array_equal(got >> 16, want)
    np.testing.assert_array_equal(got & 0xFFFF, 0x3F80)
    one = np.full(32, 0x3F803F80, np.uint32)
    np.testing.assert_array_equal(run("fma.rn.bf16x2 %r3, %r2, %r2, %r2;", one), 0x40004000)


def test_float_to_integer_saturates():
    values = np.array([3e9, -3e9, np.nan, np.inf, -np.inf, 2.5, -2.5, 2147483647.0] * 4, np.float32)
    got = run("cvt.rni.s32.f32 %r3, %r2;", values).view(np.int32)[:8]
    np.testing.assert_array_equal(got, [2**31 - 1, -(2**31), 0, 2**31 - 1, -(2**31), 2, -2, 2**31 - 1])


def matrices(rng):
    return rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16)


def test_matrix_multiply_accumulate():
    """m16n8k16 with the documented places of rows and columns, and a subnormal number."""
    a, b = matrices(np.random.default_rng(3))
    a[3] = np.float16(2**-24)
    row, column = LANE // 4, LANE % 4
    words = [
        np.stack([a[row + 8 * (i & 1), 2 * column + 8 * (i >> 1) + e] for e in (0, 1)], axis=1) for i in range(4)
    ] + [np.stack([b[2 * column + 8 * i + e, row] for e in (0, 1)], axis=1) for i in (0, 1)]
    body = "mov.f32 %z, 0f00000000;" + "".join(f"ld.global.b32 %r{10 + i}, [%rd4+{128 * i}];" for i in range(6))
    body += "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r10, %r11, %r12, %r13},"
    body += " {%r14, %r15}, {%z, %z, %z, %z};" + "".join(f"st.global.f32 [%rd5+{128 * i}], %f{i};" for i in range(4))
    given = np.concatenate([np.ascontiguousarray(word).view(np.uint32)[:, 0] for word in words])
    out = run(body + "mov.b32 %r3, %f0;", given, threads=32, out=np.zeros(128, np.float32)).reshape(4, 32)
    want = a.astype(np.float64) @ b.astype(np.float64)
    for i in range(4):
        np.testing.assert_allclose(out[i], want[row + 8 * (i >> 1), 2 * column + (i & 1)], rtol=1e-6)


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_from_shared_memory(trans):
    """Four 8 x 8 matrices of halves: lane 4r + c gets elements 2c, 2c + 1 of row r (or of column r)."""
    halves = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    body = "".join(f"ld.global.b32 %r4, [%rd4+{128 * i}]; st.shared.b32 [%rd8+{128 * i}], %r4;" for i in range(4))
    body += "bar.sync 0; mul.wide.u32 %rd9, %r1, 16; add.s64 %rd9, %rd7, %rd9;"
    body += f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%rd9];"
    body += "".join(f"st.global.b32 [%rd5+{128 * i}], %r{10 + i};" for i in range(4)) + "mov.u32 %r3, %r10;"
    got = run(body, halves.reshape(-1).view(np.uint32), threads=32).view(np.uint16).reshape(4, 8, 8)
    np.testing.assert_array_equal(got, halves.swapaxes(1, 2) if trans else halves)
