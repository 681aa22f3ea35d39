"""Tensor cores: the product with up to 64 rows of x in one launch, through Pallas's Mosaic GPU backend.

The kernel is written per thread (`pallas_kernels.machine`), its phases are in `pallas_kernels.spqr_matmul.mosaic`:

1. Each warp loads its first words of W into registers; nothing waits for them yet.
2. x goes to shared memory as float16 in the order of operand B, each row divided by a power of two.
3. Outliers are multiplied from shared memory, in the time that the words take.
4. Each warp decodes and multiplies its steps and loads the words of later ones.
5. The warps of a tile, then the thread blocks of a cluster, add up through shared memory, in a fixed order.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels import machine
from pallas_kernels.machine import Word
from pallas_kernels.spqr_matmul import tuning
from pallas_kernels.spqr_matmul.device import target
from pallas_kernels.spqr_matmul.formats import TILE, Format
from pallas_kernels.spqr_matmul.fragments import num_steps
from pallas_kernels.spqr_matmul.mosaic import activations, reduce
from pallas_kernels.spqr_matmul.mosaic.outliers import Outliers
from pallas_kernels.spqr_matmul.mosaic.plan import MAX_ROWS, MosaicConfig, Plan
from pallas_kernels.spqr_matmul.mosaic.scattered import Scattered
from pallas_kernels.spqr_matmul.mosaic.steps import Steps, zero_sum
from pallas_kernels.spqr_matmul.mosaic.thread import Thread

# Any: what older JAX has not, and what has no types of its own.
plgpu: Any = mosaic_gpu

__all__ = ["MAX_ROWS", "multiply", "plan_of"]


def plan_of(
    n: int,
    rows: int,
    columns: int,
    formats: tuple[Format, ...],
    capacity: int,
    config: MosaicConfig | None = None,
    *,
    mixed: bool = False,
    x_dtype: Any = jnp.bfloat16,
    out_dtype: Any = jnp.bfloat16,
) -> Plan:
    """The plan of a product; arguments as of :func:`multiply`.

    Raises:
      ValueError: it cannot be cut so; says why.
    """
    chosen = config or MosaicConfig(blocks=rows // TILE)
    sizes = {jnp.dtype(jnp.bfloat16): 2, jnp.dtype(jnp.float32): 4}
    if jnp.dtype(x_dtype) not in sizes or jnp.dtype(out_dtype) not in sizes:
        raise ValueError(f"x and the result must be bfloat16 or float32, got {x_dtype} and {out_dtype}")
    plan = Plan(
        n, rows, columns, formats, mixed, capacity, sizes[jnp.dtype(x_dtype)], sizes[jnp.dtype(out_dtype)], chosen
    )
    if config is None:
        plan = dataclasses.replace(plan, config=tuning.mosaic_config(target(), plan))
    if why := plan.why_impossible():
        raise ValueError(why)
    return plan


def multiply(
    words: jax.Array,
    spans: jax.Array | None,
    entries: jax.Array,
    starts: jax.Array,
    index: jax.Array,
    x: jax.Array,
    *,
    rows: int,
    formats: tuple[Format, ...],
    config: MosaicConfig | None = None,
    out_dtype: Any = jnp.bfloat16,
    interpret: Any = False,
) -> jax.Array:
    """x W' with matrix `index` of a stack in the "fragments" layout.

    Args:
      words: int32 [count, tiles, steps, step_words], or with spans [total].
      spans: int32 [count, tiles, 2] where formats are mixed, else None.
      entries, starts: int32, the outliers.
      index: int32 [1], which matrix; the kernel reads it, so nothing is copied.
      x: bfloat16 or float32 [n, columns], in the packed order, at most 64 rows, columns a multiple of 16.
      rows: of W, padded to whole tiles.
      formats: one, or all that spans name.
      config: how the work is cut; None to choose for the default device.
      out_dtype: bfloat16 or float32.
      interpret: must be false: Pallas's interpreter cannot run what is written per thread.

    Returns:
      [n, rows]. Products are in float16, sums in float32; a row of x is multiplied as if it were divided
      by a power of two first. Equal arguments give equal bits.

    Raises:
      ValueError: the arguments do not fit.
      NotImplementedError: `interpret` is not false.
    """
    if interpret is not False:
        raise NotImplementedError("mosaic_gpu: the kernel is written per thread and cannot be interpreted")
    n, columns = x.shape
    mixed, capacity = spans is not None, entries.shape[1]
    plan = plan_of(n, rows, columns, formats, capacity, config, mixed=mixed, x_dtype=x.dtype, out_dtype=out_dtype)
    if spans is None and words.shape[1:] != (plan.all_tiles, num_steps(plan.columns), formats[0].step_words):
        raise ValueError(f"words {words.shape} are no {rows} x {plan.columns} in {formats[0]}")
    arrays = {"index": index, "words": words, "entries": entries, "starts": starts, "x": x}
    if spans is not None:
        arrays["spans"] = spans
    return _launch(arrays, plan=plan)


@functools.partial(jax.jit, static_argnames="plan", inline=False)
def _launch(arrays: dict[str, jax.Array], plan: Plan) -> jax.Array:
    """The launch; jitted so that a program with many equal products lowers one."""
    names = sorted(arrays)

    def kernel(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def body(ctx: Any, *plain: Any) -> None:
            del ctx
            *buffers, shared = plain
            _body(Thread(plan, dict(zip([*names, "out"], buffers, strict=True)), shared))

        body(*refs)
        if plan.config.pdl:  # over by now: here so that Pallas marks the launch as one that may begin early
            plgpu.griddepcontrol_wait()

    cluster = plan.config.cluster
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((plan.n, plan.rows), jnp.float32 if plan.out_bytes == 4 else jnp.bfloat16),
        scratch_types=[plgpu.SMEM((plan.shared_words,), jnp.int32)],
        grid=(plan.config.blocks,),
        grid_names=("rows",),
        num_threads=plan.config.warps // 4,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({"cluster": (cluster,), "cluster_names": ("part",)} if cluster > 1 else {}),
    )(*(arrays[name] for name in names))


def _body(thread: Thread) -> None:
    """What a thread does."""
    plan = thread.plan
    steps, sparse = _Formats(thread), _Sparse(thread)
    if plan.chunks == 1:
        ahead = steps.ahead(0)
        carried = sparse.start()
        early = sparse.early(carried)
        activations.store_powers(thread)
        activations.store_chunk(thread, 0)
        machine.barrier()
        carried = sparse.add(0, carried, early)
        state = steps.run(0, ahead, sparse.scattered)
    else:
        activations.store_powers(thread)

        def chunk(i: Word, carried: Any) -> Any:
            sums, state = carried
            ahead = steps.ahead(i)
            machine.barrier()  # the chunk before has been read
            activations.store_chunk(thread, i)
            machine.barrier()
            sums = sparse.add(i, sums, [])
            part = steps.run(i, ahead, sparse.scattered)
            return sums, [a + b for a, b in zip(state, part, strict=True)]

        carried, state = machine.loop(0, plan.chunks, 1, (sparse.start(), zero_sum() * plan.tiles_b), chunk)
    sparse.finish(carried)
    if plan.wide:
        machine.barrier()  # the warps' sums go where x was
    reduce.store_parts(thread, state)
    machine.barrier()
    reduce.finish(thread)


class _Sparse:
    """The outliers, one by one or added to the weights; what is carried from chunk to chunk is sums, or an entry."""

    def __init__(self, thread: Thread) -> None:
        self.thread = thread
        self.scattered = Scattered(thread) if thread.plan.scattered else None
        self._outliers = Outliers(thread)
        self._last = machine.word(0)
        self._bounds: Any = None

    def start(self) -> Any:
        if self.scattered is None:
            if self.thread.plan.chunks == 1:
                self._bounds = self._outliers.bounds(0)
            return self._outliers.zeros()
        first, self._last = self.scattered.bounds()
        self.scattered.clear()
        return first

    def early(self, carried: Any) -> list[Word]:
        """Loads what can be loaded before x is there."""
        if self.scattered is None:
            return self._outliers.early(*self._bounds)
        self.scattered.load(0, carried, self._last)
        return []

    def add(self, chunk: Word | int, carried: Any, early: list[Word]) -> Any:
        """Goes on with a chunk."""
        if self.scattered is None:
            return self._outliers.add(chunk, carried, self._bounds or self._outliers.bounds(chunk), early)
        if self.thread.plan.chunks == 1:
            return carried
        return self.scattered.load(chunk, carried, self._last)

    def finish(self, carried: Any) -> None:
        if self.scattered is None:
            self._outliers.store(carried)


class _Formats:
    """The steps of a warp's tile, whose format is data where formats are mixed; all lanes of a warp take one branch."""

    def __init__(self, thread: Thread) -> None:
        self.thread = thread
        self.steps = [Steps(thread, form) for form in thread.plan.formats]
        self.words = max(s.count for s in self.steps)

    def _switch(self, like: Any, branches: list[Any]) -> Any:
        """branches[format_index]()."""
        if len(branches) == 1:
            return branches[0]()
        chosen = self.thread.format_index.equals(len(branches) - 1)
        return machine.branch(chosen, like, branches[-1], lambda: self._switch(like, branches[:-1]))

    def ahead(self, chunk: Word | int) -> list[list[Word]]:
        """The words of the first steps; of formats with fewer, the last are zeros."""

        def of(steps: Steps) -> list[list[Word]]:
            return [words + [machine.word(0)] * (self.words - steps.count) for words in steps.ahead(chunk)]

        like = [[machine.word(0)] * self.words] * self.thread.plan.config.depth
        return self._switch(like, [functools.partial(of, s) for s in self.steps])

    def run(self, chunk: Word | int, ahead: list[list[Word]], scattered: Scattered | None) -> list[machine.Float]:
        """The accumulators at the end."""

        def of(steps: Steps) -> list[machine.Float]:
            return steps.run(chunk, [words[: steps.count] for words in ahead], scattered)

        plan, branches = self.thread.plan, [functools.partial(of, s) for s in self.steps]
        nothing = zero_sum() * plan.tiles_b
        if plan.config.warps % plan.tiles == 0:
            return self._switch(nothing, branches)
        # warps that are left over do not multiply zeros: others need the units
        return machine.branch(
            self.thread.has_work, nothing, lambda: self._switch(nothing, branches), lambda: zero_sum() * plan.tiles_b
        )
