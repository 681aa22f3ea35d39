"""Values and instructions of one GPU thread, for kernels that Pallas's Mosaic GPU backend takes as inline MLIR.

A kernel that is written per thread needs few things: words, floats, pairs of float16, loads, stores, shuffles, `mma`,
loops and barriers. This module names them, so that a kernel reads like the CUDA program that it becomes:

    lane = thread & 31
    row = lane >> 2
    words = load(base.at(lane * 4, 4), 4, when=row < rows)

Words, floats and pairs have Python's operators, and Python's numbers may stand on either side. Importing this module
loads Mosaic GPU, which not every JAX has: import it inside functions, or from modules that are themselves imported
inside functions.
"""

from __future__ import annotations

from pallas_kernels.machine.control import (
    barrier,
    block_index,
    branch,
    cluster_barrier,
    for_each,
    if_,
    loop,
    thread_index,
    warp_barrier,
)
from pallas_kernels.machine.dialects import instruction, statement
from pallas_kernels.machine.instructions import (
    and_or,
    as_bfloat16,
    as_pair,
    exp2,
    fma,
    fma_pair,
    from_lane,
    from_xor_lane,
    larger,
    larger_bfloat16,
    merge,
    mma,
    mma_half,
    product,
    reciprocal,
    tree_sum,
    warp_maximum,
    warp_sum,
)
from pallas_kernels.machine.memory import (
    CONSTANT,
    PLAIN,
    STREAMED,
    Address,
    Shared,
    load,
    load_half,
    store,
    store_half,
    wait_for_launch_before,
)
from pallas_kernels.machine.values import (
    Bool,
    Float,
    Pair,
    Value,
    Word,
    choose,
    half_bits,
    halves,
    maximum,
    minimum,
    number,
    select,
    word,
)

__all__ = [
    "CONSTANT",
    "PLAIN",
    "STREAMED",
    "Address",
    "Bool",
    "Float",
    "Pair",
    "Shared",
    "Value",
    "Word",
    "and_or",
    "as_bfloat16",
    "as_pair",
    "barrier",
    "block_index",
    "branch",
    "choose",
    "cluster_barrier",
    "exp2",
    "fma",
    "fma_pair",
    "for_each",
    "from_lane",
    "from_xor_lane",
    "half_bits",
    "halves",
    "if_",
    "instruction",
    "larger",
    "larger_bfloat16",
    "load",
    "load_half",
    "loop",
    "maximum",
    "merge",
    "minimum",
    "mma",
    "mma_half",
    "number",
    "product",
    "reciprocal",
    "select",
    "statement",
    "store",
    "store_half",
    "thread_index",
    "tree_sum",
    "wait_for_launch_before",
    "warp_barrier",
    "warp_maximum",
    "warp_sum",
    "word",
]
