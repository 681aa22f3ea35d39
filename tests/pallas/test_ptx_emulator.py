"""The emulator that runs compiled PTX: what it does not let pass, barriers, races, and what it counts."""

from __future__ import annotations

import numpy as np
import pytest
from support.ptx import emulator
from support.ptx.snippets import HEAD, TAIL, launch, run

LANE = np.arange(32, dtype=np.uint32)
WORDS = np.random.default_rng(0).integers(0, 1 << 32, 32, dtype=np.uint32)
MANY = np.random.default_rng(1).integers(0, 1 << 32, 128, dtype=np.uint32)
THREAD = np.arange(128)
NEIGHBOUR = "xor.b32 %r5, %r1, 32; mul.wide.u32 %rd9, %r5, 4; add.s64 %rd9, %rd7, %rd9;"  # a word of another warp's


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r3, [%rd4+8];", "outside every buffer"),
        ("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd4];", "outside every buffer|not a multiple of 16"),
        ("ld.shared.b32 %r3, [%rd8+232448];", "outside shared memory"),
        ("mov.u32 %r3, %r7;", "%r7 is read before it is written"),
        ("st.global.b32 [%rd5], %r2; ld.global.nc.b32 %r3, [%rd5];", "as if nothing did: ld.global.nc.b32"),
        ("mov.u32 %r3, 0; setp.eq.u32 %p1, %r1, 3; @%p1 trap;", "a trap is reached: @%p1 trap"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 bra $L_x; bar.sync 0; $L_x: mov.u32 %r3, 0;", "not all threads reach it: bar"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 bar.sync 0; mov.u32 %r3, 0;", "not all threads reach it: @%p1 bar.sync 0"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 redux.sync.max.u32 %r3, %r2, -1;", "not all threads reach it"),
        ("shfl.sync.idx.b32 %r3, %r2, 0, 31, 0xff;", "a thread that the mask does not name"),
        ("mov.u32 %r3, 0; bar.sync 0, 64;", "not all threads reach it: bar.sync 0, 64"),
        ("mov.u32 %r3, 0; barrier.cluster.wait;", "waits that has not arrived"),
    ],
)
def test_what_must_not_be_is_an_error(body, message):
    with pytest.raises(emulator.PtxError, match=message):
        run(body, WORDS)


@pytest.mark.parametrize(
    "line",
    [
        "sad.u32 %r3, %r2, %r2, %r2",
        "mul.hi.f32 %f1, %f2, %f3",
        "mul.s32 %r3, %r2, %r2",
        "mul24.lo.s32 %r3, %r2, %r2",
        "add.sat.s32 %r3, %r2, %r2",
        "add.cc.u32 %r3, %r2, %r2",
        "add.rz.f32 %f1, %f2, %f2",
        "fma.rn.sat.f32 %f1, %f2, %f2, %f2",
        "fma.rn.relu.f16x2 %r3, %r2, %r2, %r2",
        "min.xorsign.abs.f32 %f1, %f2, %f2",
        "setp.lt.b32 %p1, %r2, 5",
        "setp.lt.u32 %p1, %r2, 5, %p2",
        "setp.lt.and.u32 %p1, %r2, 5",
        "setp.lo.s32 %p1, %r2, 5",
        "cvt.rz.f16.f32 %rs1, %f2",
        "cvt.f16.f32 %rs1, %f2",
        "cvt.rn.relu.f16x2.f32 %r3, %f2, %f2",
        "cvt.rni.s32.f32 %rs1, %f2",
        "prmt.b32.f4e %r3, %r2, %r2, 1",
        "shfl.sync.bfly.b32 %r3, %r2, 1, 31",
        "shfl.bfly.b32 %r3, %r2, 1, 31",
        "ld.global.acquire.gpu.b32 %r3, [%rd4]",
        "ld.nc.b32 %r3, [%rd4]",
        "ld.local.b32 %r3, [%rd4]",
        "ld.global.v2.b32 %r3, [%rd4]",
        "ld.global.L2::cache_hint.b32 %r3, [%rd4]",
        "ld.global.b32 %r3, [%r2*4]",
        "st.async.b32 [%rd4], %r2",
        "atom.global.add.u32 %r3, [%rd4], 1",
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r3, %r4}, {%r3, %r4, %r5, %r6}, {%r3, %r4}, {%r3, %r4}",
        "cp.async.cg.shared.global [%rd8], [%rd4], 4",
        "cp.async.ca.shared.global [%rd8], [%rd4], 4, 0",
        "bar.red.popc.u32 %r3, 0, %p1",
        "bar.arrive 0",
        "mbarrier.init.shared.b64 [%rd8], 1",
        "mov.u32 %r3, %clock",
        "mov.u32 %r3, nothing",
        "mov.u32 %r3, %rd4",
        "add.u32 %rd3, %r2, %r2",
        "bra $L_nowhere",
        "call foo",
    ],
)
def test_what_is_not_known_is_refused(line):
    """Also where it is never reached."""
    with pytest.raises(emulator.PtxError) as error:
        run(f"mov.u32 %r3, 0; bra.uni $L_end; {line}; $L_end:", WORDS)
    assert line in str(error.value)


@pytest.mark.parametrize("line", [".local .b8 depot[8]", ".branchtargets $L_x"])
def test_unknown_directives_are_refused(line):
    with pytest.raises(emulator.PtxError, match="unknown"):
        emulator.parse(HEAD + line + ";" + TAIL)


def test_a_launch_fits_the_program():
    text = HEAD.replace("\n{", "\n.maxntid 64, 1, 1\n{", 1) + "mov.u32 %r3, 0;" + TAIL
    with pytest.raises(emulator.PtxError, match="allows 64 threads"):
        emulator.launch(emulator.parse(text), [WORDS, WORDS], grid=1, threads=96)
    text = text.replace(".maxntid 64, 1, 1", ".reqnctapercluster 2, 1, 1")
    with pytest.raises(emulator.PtxError, match="2 blocks a cluster"):
        emulator.launch(emulator.parse(text), [WORDS, WORDS], grid=2, threads=32)


# ---- where threads go ----


def test_loops_and_labels():
    body = """
    mov.u32 %r3, 0;
    mov.u32 %r4, 0;
$L_loop:
    add.u32 %r3, %r3, %r2;
    add.u32 %r4, %r4, 1;
    setp.le.u32 %p1, %r4, %r1;
    @%p1 bra $L_loop;
"""
    np.testing.assert_array_equal(run(body, MANY), MANY * (THREAD + 1).astype(np.uint32))


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


def test_warps_that_took_different_ways():
    """Each with shuffles and barriers of its own; they meet at two barriers that stand at different places."""
    body = """
    shr.u32 %r4, %r1, 5;
    setp.eq.u32 %p1, %r4, 0;
    @%p1 bra $L_first;
    shfl.sync.idx.b32 %r3, %r2, 3, 31, -1;
    bar.sync 1, 96;
    bar.sync 0;
    bra.uni $L_end;
$L_first:
    redux.sync.max.u32 %r3, %r2, -1;
    bar.sync 0;
$L_end:
"""
    got = run(body, MANY).reshape(4, 32)
    np.testing.assert_array_equal(got[0], MANY[:32].max())
    np.testing.assert_array_equal(got[1:], np.repeat(MANY.reshape(4, 32)[1:, 3:4], 32, axis=1))


def test_a_warp_may_end_early():
    body = "mov.u32 %r3, 1; setp.lt.u32 %p1, %r1, 32; @%p1 ret; shfl.sync.idx.b32 %r3, %r2, 0, 31, -1; bar.sync 1, 96;"
    got = run(body, MANY).reshape(4, 32)
    np.testing.assert_array_equal(got, np.repeat(np.r_[0, MANY[32::32]], 32).reshape(4, 32))
    with pytest.raises(emulator.PtxError, match="not all threads reach it: bar"):
        run(body.replace("bar.sync 1, 96", "bar.sync 0"), MANY)


def test_blocks_have_their_places():
    body = """
    mov.u32 %r4, %ctaid.y; mov.u32 %r5, %nctaid.x; mov.u32 %r6, %ctaid.x; mov.u32 %r7, %tid.y; mov.u32 %r8, %tid.x;
    mad.lo.u32 %r4, %r4, %r5, %r6; mad.lo.u32 %r9, %r7, 100, %r8; mad.lo.u32 %r3, %r4, 10000, %r9;
    mad.lo.u32 %r5, %r7, 16, %r8; mad.lo.u32 %r5, %r4, 32, %r5; mul.wide.u32 %rd9, %r5, 4; add.s64 %rd5, %rd2, %rd9;
"""
    text = emulator.parse(HEAD.replace("ld.global.b32 %r2, [%rd4];", "") + body + TAIL)
    got = emulator.launch(text, [MANY, MANY], grid=(2, 2), threads=(16, 2))[0][1]
    want = THREAD // 32 * 10000 + THREAD % 32 // 16 * 100 + THREAD % 16
    np.testing.assert_array_equal(got, want)


# ---- memory that threads share ----


def test_copies_arrive_when_they_are_awaited():
    def body(pending: int) -> str:
        return f"""
    cp.async.ca.shared.global [%rd8], [%rd4], 4;
    cp.async.commit_group;
    cp.async.wait_group {pending};
    ld.shared.b32 %r3, [%rd8];
"""

    np.testing.assert_array_equal(run(body(0), WORDS), WORDS)
    assert np.all(run(body(1), WORDS) == 0xFFFFFFFF)


EXCHANGE = "st.shared.b32 [%rd8], %r2; bar.sync 0;" + NEIGHBOUR + "ld.shared.b32 %r3, [%rd9];"


@pytest.mark.parametrize(
    ("body", "racing"),
    [
        (EXCHANGE, None),
        (EXCHANGE.replace("bar.sync 0;", ""), "ld.shared.b32"),
        (EXCHANGE.replace("bar.sync 0", "bar.sync 0, 128"), None),
        (EXCHANGE.replace("bar.sync 0;", "bar.warp.sync -1;"), "ld.shared.b32"),
        # what was read is written again, with a barrier and without
        (EXCHANGE + "bar.sync 0; st.shared.b32 [%rd8], %r3;", None),
        (EXCHANGE + "st.shared.b32 [%rd8], %r3;", "st.shared.b32"),
        # one word for all: read by all, written by some
        ("st.shared.b32 [%rd7], %r2; mov.u32 %r3, 0;", "st.shared.b32"),
        (
            "mov.u32 %r3, 0; setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.b32 [%rd7], %r2; bar.sync 0;"
            "ld.shared.b32 %r3, [%rd7]; @%p1 st.shared.b32 [%rd7], %r2;",
            "st.shared.b32",
        ),
        # the first warp is at the barrier when the others read one word; then another writes it
        (
            "mov.u32 %r3, 0; st.shared.b32 [%rd8], %r2; bar.sync 0; setp.ge.u32 %p1, %r1, 32; @%p1 bra $L_read;"
            "bar.sync 0; bra.uni $L_end; $L_read: ld.shared.b32 %r3, [%rd7]; bar.sync 0; $L_end:"
            "setp.eq.u32 %p2, %r1, 64; @%p2 st.shared.b32 [%rd7], %r2;",
            None,
        ),
        # halves of a word belong to different warps
        (
            "shl.b32 %r4, %r1, 2; sub.u32 %r4, %r4, 126; shl.b32 %r5, %r1, 2; cvt.u16.u32 %rs1, %r2;"
            "setp.lt.u32 %p1, %r1, 32; selp.b32 %r4, %r5, %r4, %p1; setp.lt.u32 %p2, %r1, 64; cvt.u64.u32 %rd9, %r4;"
            "add.s64 %rd9, %rd7, %rd9; @%p2 st.shared.b16 [%rd9], %rs1; mov.u32 %r3, 0;",
            None,
        ),
        # a barrier of two warps puts two in order, not all four
        (
            "st.shared.b32 [%rd8], %r2; shr.u32 %r4, %r1, 6; bar.sync %r4, 64;"
            + NEIGHBOUR
            + "ld.shared.b32 %r3, [%rd9];",
            None,
        ),
        (
            "st.shared.b32 [%rd8], %r2; shr.u32 %r4, %r1, 6; bar.sync %r4, 64;"
            + NEIGHBOUR.replace("32", "64", 2).replace("b64", "b32").replace("u64", "u32")
            + "ld.shared.b32 %r3, [%rd9];",
            "ld.shared.b32",
        ),
        # who only arrives writes; who waits reads
        (
            "mov.u32 %r3, 0; setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.b32 [%rd8], %r2; @%p1 bar.arrive 1, 128;"
            "@!%p1 bar.sync 1, 128; @!%p1 ld.shared.b32 %r3, [%rd7];",
            None,
        ),
        (
            "mov.u32 %r3, 0; setp.lt.u32 %p1, %r1, 32; @%p1 bar.arrive 1, 128; @%p1 st.shared.b32 [%rd8], %r2;"
            "@!%p1 bar.sync 1, 128; @!%p1 ld.shared.b32 %r3, [%rd7];",
            "ld.shared.b32",
        ),
    ],
)
def test_races_between_warps(body, racing):
    if racing is None:
        run(body, MANY)
    else:
        with pytest.raises(emulator.PtxError, match=f"a race.*{racing}"):
            run(body, MANY)
    run(body, MANY, races=False)


CLUSTER = """
    st.shared.b32 [%rd8], %r2;
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    mov.u32 %r4, %cluster_ctarank;
    xor.b32 %r4, %r4, 1;
    cvta.shared.u64 %rd9, %rd8;
    mapa.u64 %rd10, %rd9, %r4;
    ld.b32 %r3, [%rd10];
    cvt.u32.u64 %r5, %rd8;
    mapa.shared::cluster.u32 %r6, %r5, %r4;
    ld.shared::cluster.b32 %r7, [%r6];
    add.u32 %r3, %r3, %r7;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
"""


def test_blocks_of_a_cluster_read_each_others_memory():
    got = run(CLUSTER, MANY, grid=4, cluster=2)
    np.testing.assert_array_equal(got, 2 * MANY.reshape(2, 2, 32)[:, ::-1].reshape(-1))
    relaxed = CLUSTER.replace("arrive.aligned", "arrive.relaxed.aligned")  # enough for who has only read
    np.testing.assert_array_equal(run(relaxed, MANY, grid=4, cluster=2), got)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("arrive.release", "arrive.relaxed", "a race.*ld.b32"),
        ("    barrier.cluster.arrive.aligned;\n    barrier.cluster.wait.aligned;\n", "", "another block may still use"),
        ("barrier.cluster.wait.acquire.aligned", "bar.sync 0", "a race.*ld.b32|arrives twice"),
        ("xor.b32 %r4, %r4, 1", "add.u32 %r4, %r4, 7", "outside the cluster"),
    ],
)
def test_clusters_that_do_wrong(old, new, message):
    body = CLUSTER.replace(old, new)
    assert body != CLUSTER
    with pytest.raises(emulator.PtxError, match=message):
        run(body, MANY, grid=4, cluster=2)


def test_a_block_that_ended_has_no_memory():
    text = HEAD + "mov.u32 %r4, %cluster_ctarank; setp.eq.u32 %p1, %r4, 1; @%p1 ret; cvt.u32.u64 %r5, %rd8;"
    text += "mapa.shared::cluster.u32 %r6, %r5, 1; ld.shared::cluster.b32 %r3, [%r6];" + TAIL
    with pytest.raises(emulator.PtxError, match="a block that has ended"):
        emulator.launch(emulator.parse(text), [MANY, MANY], grid=2, threads=32, cluster=2)


def test_what_the_launch_before_writes_is_waited_for():
    program = emulator.parse(HEAD + "griddepcontrol.wait; mov.u32 %r3, %r2;" + TAIL)
    emulator.launch(program, [WORDS, WORDS], grid=1, threads=32, early=[0])
    with pytest.raises(emulator.PtxError, match=r"before griddepcontrol\.wait: ld"):
        emulator.launch(program, [WORDS, WORDS], grid=1, threads=32, early=[])


# ---- costs ----


@pytest.mark.parametrize(
    ("stride", "kind", "wavefronts"),
    [
        (4, "b32", 1),
        (8, "b32", 2),
        (128, "b32", 32),
        (0, "b32", 1),
        (132, "b32", 1),
        (16, "v4.b32", 4),
        (32, "v4.b32", 8),
    ],
)
def test_bank_conflicts(stride, kind, wavefronts):
    registers = "{%r3, %r4, %r5, %r6}" if "v4" in kind else "%r3"
    body = f"mul.wide.u32 %rd9, %r1, {stride}; add.s64 %rd9, %rd7, %rd9; ld.shared.{kind} {registers}, [%rd9];"
    _, costs = launch(body, WORDS)
    assert costs.wavefronts.sum() == wavefronts
    assert costs.least_wavefronts.sum() == (4 if "v4" in kind else 1)
    assert costs.conflicts == wavefronts - costs.least_wavefronts.sum()
    assert costs.worst_lines()[0] == (f"ld.shared.{kind} {registers}, [%rd9]", wavefronts, costs.least_wavefronts.sum())


def test_instructions_by_warp_and_phase():
    """The first warp goes round a loop twice, the second three times; then comes a barrier."""
    body = """
    shr.u32 %r4, %r1, 5;
    add.u32 %r4, %r4, 2;
$L_loop:
    sub.u32 %r4, %r4, 1;
    setp.gt.u32 %p1, %r4, 0;
    @%p1 bra $L_loop;
    bar.sync 0;
    xor.b32 %r3, %r2, 5;
    bar.sync 0;
"""
    _, costs = launch(body, MANY, grid=2)
    np.testing.assert_array_equal(costs.instructions["sub.u32"], [[2, 3, 2, 3], [0] * 4, [0] * 4])
    np.testing.assert_array_equal(costs.by_phase("xor"), [[0] * 4, [1] * 4, [0] * 4])
    np.testing.assert_array_equal(costs.by_phase("bar"), [[1] * 4, [1] * 4, [0] * 4])
    np.testing.assert_array_equal(costs.by_phase()[1:], [[2] * 4, [2] * 4])  # after the last: a store, the end
    assert costs.issued == costs.by_phase().sum()


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (32, 32), (0, 1), (8, 8)])
def test_sectors_of_device_memory(stride, sectors):
    body = f"mul.wide.u32 %rd9, %r1, {stride}; add.s64 %rd9, %rd1, %rd9; ld.global.nc.b32 %r3, [%rd9];"
    _, costs = launch(body, np.zeros(1024, np.uint32), threads=32)
    assert costs.sectors["ld.global.nc.b32"] == sectors
    assert costs.least_sectors["ld.global.nc.b32"] == (1 if stride == 0 else 4)
    assert costs.sectors["st.global.b32"] == 4
