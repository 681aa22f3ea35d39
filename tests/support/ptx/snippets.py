"""Small kernels for tests: each thread has a word of the input in ``%r2`` and writes ``%r3`` to the output."""

from __future__ import annotations

import numpy as np

from support.ptx import emulator

HEAD = """.version 8.0
.target sm_90
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
    mov.u32 %r90, %ctaid.x;
    mov.u32 %r91, %ntid.x;
    mad.lo.u32 %r92, %r90, %r91, %r1;
    mul.wide.u32 %rd3, %r1, 4;
    mul.wide.u32 %rd6, %r92, 4;
    add.s64 %rd4, %rd1, %rd6;
    add.s64 %rd5, %rd2, %rd6;
    mov.u64 %rd7, shared;
    add.s64 %rd8, %rd7, %rd3;
    ld.global.b32 %r2, [%rd4];
"""
TAIL = """
    st.global.b32 [%rd5], %r3;
    ret;
}
"""


def launch(
    body: str, values: np.ndarray, *, out: np.ndarray | None = None, grid: int = 1, **options
) -> tuple[np.ndarray, emulator.Costs]:
    """What `grid` blocks write that share the words of `values`, and what it cost.

    In the body, ``%r1`` is the thread, ``%r90`` the block; ``%rd4`` and ``%rd5`` are the addresses of the thread's
    words, ``%rd1`` and ``%rd2`` of the input and the output, ``%rd7`` of shared memory, ``%rd8`` of the thread's
    word in it.
    """
    program = emulator.parse(HEAD + body + TAIL)
    out = np.zeros_like(values) if out is None else out
    options = {"threads": values.nbytes // 4 // grid, **options}
    results, costs = emulator.launch(program, [values, out], grid=grid, **options)
    return results[1], costs


def run(body: str, values: np.ndarray, **options) -> np.ndarray:
    """Only what is written."""
    return launch(body, values, **options)[0]
