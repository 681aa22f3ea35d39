"""Quantizes tiny models on meshes of virtual devices: ``python -m support.mesh_runs JSON`` in a process of its own.

The JSON holds: ``devices`` of this process; ``meshes``, numbers of devices, 0 for no mesh; ``cases``; ``hosts``, for
`start_hosts`, or null; ``fail``, the process that is to fail in the end, or null. Prints a digest for each case and
mesh, and with ``hosts`` what `from_first` gave.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]


def begin(**settings: Any) -> subprocess.Popen:
    """Starts a process; `result` waits for it."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={settings['devices']}"
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "support.mesh_runs", json.dumps(settings)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hosts(count: int) -> list[str]:
    """What `start_hosts` takes, for so many processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{free.getsockname()[1]},{count},{index}" for index in range(count)]


def printed(out: str) -> dict[str, dict[str, Any]]:
    """Digests by case and mesh."""
    return json.loads(out.splitlines()[-1])


def result(process: subprocess.Popen, seconds: int = 300) -> dict[str, dict[str, Any]]:
    """Digests by case and mesh."""
    out, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors[-3000:]
    return printed(out)


def main(settings: dict[str, Any]) -> None:
    import jax

    from spqr_jax.stream.hosts import ALONE, start_hosts
    from spqr_jax.stream.mesh import parse_mesh

    together = start_hosts(settings["hosts"]) if settings.get("hosts") else ALONE
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    digests: dict[str, dict[str, Any]] = {}
    mesh = None
    with together.watched(lambda: False, lambda: None):
        for case in settings["cases"]:
            for count in settings["meshes"]:
                mesh = parse_mesh(f"data={count}") if count else None
                digests.setdefault(case, {})[str(count)] = _digest(case, mesh)
        if settings.get("hosts"):
            digests["from first"] = _from_first(together)
        print(json.dumps(digests), flush=True)
        if settings.get("fail") == jax.process_index():
            raise RuntimeError("on purpose")
        if settings.get("fail") is not None:
            _digest(settings["cases"][-1], mesh)  # which waits for the process that has failed


def _from_first(together: Any) -> dict[str, str]:
    """What reaches every process: of a short and a long message, of an error, and of a call inside a call."""
    import numpy as np

    from spqr_jax import SpQRError

    def refuse() -> None:
        raise SpQRError("refused")

    answers = {"short": together.from_first(lambda: together.from_first(os.getpid))}
    answers["long"] = int(together.from_first(lambda: np.random.default_rng().integers(0, 99, 10**6)).sum())
    try:
        together.from_first(refuse)
    except SpQRError as error:
        answers["error"] = str(error)
    return answers


def _digest(case: str, mesh: Any) -> dict[str, Any]:
    """The SHA-256 of all arrays of the quantized model and of its statistics; the output errors apart from them.

    XLA cuts the sums of an output error into as many parts as the process has threads, and it has more of them with
    more virtual devices.
    """
    import jax
    import numpy as np

    from spqr_jax.job.job import Job
    from spqr_jax.models.decoder import random_decoder
    from spqr_jax.stream.blocks import TreeSource
    from support.problems import random_tokens

    model, config = _case(case)
    batches = [random_tokens((2, 24), seed) for seed in range(5)] + [random_tokens((1, 24), 9)]
    sink = _sink(model)
    report = Job(TreeSource(random_decoder(model, seed=0)), sink, batches, config, mesh=mesh).run()
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(sink.params()):
        digest.update(np.asarray(leaf).tobytes())
    for layer in report.layers:
        stats = dataclasses.replace(layer.stats, output_error=0.0)
        digest.update(json.dumps(dataclasses.asdict(stats)).encode())
    return {"bytes": digest.hexdigest(), "errors": [layer.stats.output_error for layer in report.layers]}


def _case(name: str) -> tuple[Any, Any]:
    from spqr_jax import SpQRConfig
    from support.problems import TINY

    plain = dataclasses.replace(TINY, num_layers=1, intermediate_size=400)  # a Hessian of two panels
    if name == "plain":
        return plain, SpQRConfig(bits=3, drift_correction=0.5)
    if name == "target and tied head":
        tied = dataclasses.replace(plain, tied_head=True, num_layers=2)
        return tied, SpQRConfig.preset(target_bits=4.6, head_bits=8, calibration_dtype="float32")
    experts = dataclasses.replace(TINY, num_layers=1, num_experts=3, experts_per_token=2, expert_size=48)
    return experts, SpQRConfig(bits=3, calibration_dtype="bfloat16", drift_correction=0.5)


def _sink(model: Any) -> Any:
    from spqr_jax.stream.blocks import TreeSink

    return TreeSink(model)


def memory(count: int) -> dict[str, int]:
    """Bytes that one of `count` devices holds of what is spread: from compiled programs, which are not run.

    What every device holds whole is left out: inputs of two chunks of text, and the factor U.
    """
    import jax
    import jax.numpy as jnp

    from spqr_jax import SpQRConfig, devices
    from spqr_jax.solver import columns
    from spqr_jax.solver.panel_hessian import add_panels, panel_slots
    from spqr_jax.solver.solve import column_spec
    from spqr_jax.stream.mesh import parse_mesh

    def held(compiled: Any) -> int:
        used = compiled.memory_analysis()
        return (
            used.argument_size_in_bytes + used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
        )

    def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    mesh, width, tokens, rows = parse_mesh(f"data={count}"), 4096, 64, 8192
    cut, whole = devices.cut_along(mesh), devices.EVERYWHERE
    program = devices.mesh_jit(
        mesh, lambda panels, seen, x: add_panels(mesh, panels, seen, x[0]), (cut, whole, cut), (cut, whole),
        donate_argnums=(0, 1),
    )  # fmt: skip
    panels = shape(count, *panel_slots(width, count), width)
    gram = held(program.lower(panels, shape(), shape(count, tokens, width)).compile())
    text = jax.sharding.NamedSharding(mesh, cut).shard_shape((8, 2, 1024, width))  # a wave of eight, or eight of one
    config, inner = SpQRConfig(), 512
    spec, here = column_spec(config, config.group_size, True), rows // count
    choices = columns.RowChoices(shape(here), shape(here))
    loop = jax.jit(columns.all_columns, static_argnums=4)
    loop = loop.lower(shape(inner, here), shape(inner, inner), shape(inner, dtype=bool), choices, spec).compile()
    return {
        "activations": 4 * math.prod(text),
        "Hessian": gram - 2 * 4 * tokens * width,
        "column loop": held(loop) - 4 * inner**2,
        "block": _block_bytes(mesh),
    }


def _block_bytes(mesh: Any) -> int:
    """What the program of a block's widest stage is given of the block, in bytes a device."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from spqr_jax.models.attention import positions
    from spqr_jax.models.config import BlockKind
    from spqr_jax.models.decoder import State, plain_linear
    from spqr_jax.models.weights import abstract_block
    from spqr_jax.stream.mesh_activations import advance_program
    from spqr_jax.stream.mesh_blocks import BlockLayout, MeshBlocks
    from support.problems import TINY

    model = dataclasses.replace(TINY, num_layers=1, hidden_size=256, intermediate_size=1000)
    zeros = jax.tree.map(lambda weight: np.zeros(weight.shape, np.float32), abstract_block(model, BlockKind()))
    block, layout = MeshBlocks(mesh, model).put(zeros)
    assert layout == BlockLayout.of(model, zeros)
    state = State(jnp.zeros((mesh.size, 1, 2, 256)))
    where = positions(model, 2, jnp.zeros(1, jnp.int32), jnp.int32(0))
    given = []
    for stage in (0, 2):
        program = advance_program(mesh, model, layout, stage, plain_linear).lower(block, state, where).compile()
        given.append(program.memory_analysis().argument_size_in_bytes)
    return max(given)


def panels(count: int) -> tuple[float, bool]:
    """Rows that `count` devices solve as accelerators do: the part that is as without a mesh, and if it is finite."""
    import jax.numpy as jnp
    import numpy as np

    from spqr_jax import SpQRConfig
    from spqr_jax.layout import array_layout
    from spqr_jax.solver import mesh_columns, pieces
    from spqr_jax.solver import panels as local
    from spqr_jax.solver.columns import RowChoices
    from spqr_jax.solver.row_pieces import Cutting
    from spqr_jax.solver.solve import column_spec
    from spqr_jax.stream.mesh import parse_mesh

    config, inner, rows = SpQRConfig(bits=3), 64, 96 + 208  # of two matrices
    spec = column_spec(config, config.group_size, True)
    spec = dataclasses.replace(spec, grid=dataclasses.replace(spec.grid, at_once=True), rows_at_once=16)
    random = np.random.default_rng(0)
    w = random.standard_normal((128, rows)).astype(np.float32)
    w[inner:] = 0  # a panel's padding
    u = jnp.asarray(np.eye(128) + np.triu(0.1 * random.standard_normal((128, 128)), 1), jnp.float32)
    choices = RowChoices(np.full(rows, 0.3, np.float32), np.full(rows, 7, np.float32))
    layouts = tuple(array_layout((out, inner), config.group_size, 16) for out in (96, 208))
    options = (True, config.stats_bits, config.stats_group_size)
    place, valid = random.permutation(inner), np.arange(128) < inner
    alone = local.solve_columns(jnp.asarray(w), u, valid, choices, spec)
    expected, _ = pieces.cut(alone, place, layouts, *options)
    cutting = Cutting(layouts[0], *options, place)
    whole, figures = mesh_columns.solve_columns(
        parse_mesh(f"data={count}"), w, u, valid, choices, spec, cutting, rows
    )  # fmt: skip
    same = []
    for piece, other in zip(cutting.split(whole, layouts), expected, strict=True):
        assert [field.shape for field in piece] == [field.shape for field in other]
        same.append(np.mean(piece.codes == np.asarray(other.codes)))
        same.append(np.mean(piece.tile_stats == np.asarray(other.tile_stats)))
        same.append(np.mean(np.isclose(piece.dense, other.dense, atol=1e-3)))
    return float(min(same)), bool(figures.finite)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "memory" in given:
        print(json.dumps({str(count): memory(count) for count in given["memory"]}))
    elif "panels" in given:
        print(json.dumps(panels(given["panels"])))
    else:
        main(given)
