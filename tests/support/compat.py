"""What is also tested with the newest Python and JAX: all that touches what differs, and one or two tests a surface.

Files whose tests are all taken: those about Orbax, XLA's FFI, Pallas, custom derivatives and batching rules, Flax,
and what installs or imports. Of the others a few tests stand for the rest, whose results depend on no version.
"""

from __future__ import annotations

import pytest

from support import ROOT

ALL = None
COMPAT: dict[str, set[str] | None] = {
    "test_imports.py": ALL,
    "test_packaging.py": ALL,
    "test_compile_cache.py": ALL,
    "test_array.py": {
        "test_to_dense_is_the_formula",
        "test_linear_multiplies_by_the_dense_matrix",
        "test_it_is_a_pytree",
    },
    "test_packing.py": {"test_round_trip_is_exact_and_wastes_nothing", "test_numpy_and_jitted_jax_agree"},
    "native/test_cpu_kernels.py": ALL,
    "pallas/test_pallas_kernels.py": ALL,
    "pallas/test_pallas_lowering.py": ALL,
    "models/test_attention.py": ALL,
    "formats/test_checkpoint.py": ALL,
    "integrations/test_flax.py": ALL,
    "docs/test_tutorials.py": {"test_the_flax_tutorial_runs"},
    "solver/test_solver.py": {
        "test_matches_spqr_written_from_the_paper",
        "test_spqr_beats_gptq_beats_round_to_nearest",
        "test_any_size_works",
        "test_hessian_is_streamed",
    },
    "solver/test_grid.py": {"test_search_is_never_worse_than_minmax_on_what_it_minimizes"},
    "solver/test_baselines.py": {"test_adaround_rounds_up_or_down_and_nowhere_else"},
    "solver/test_drift.py": {"test_the_move_solves_the_damped_normal_equations"},
    "mesh/test_meshes.py": {"test_eight_devices_hold_a_sixth_each_of_what_one_holds"},
    "quantize/test_quantize.py": {
        "test_every_matrix_is_quantized_and_nothing_else",
        "test_calibration_in_bfloat16_sees_nearly_the_same",
        "test_any_forward_function",
    },
    "quantize/test_budget.py": {"test_the_sensitivity_is_the_gradient_of_the_loss", "test_rules_hold_under_a_target"},
    "quantize/test_tune.py": {"test_its_gradient_is_that_of_the_formula"},
    "models/test_models.py": {
        "test_left_padding_changes_nothing",
        "test_safetensors_round_trip",
        "test_gguf_types_dequantize",
    },
    "models/test_experts.py": {"test_both_ways_give_the_formula", "test_gradients_are_those_of_the_formula"},
    "models/test_generate.py": {
        "test_the_cache_changes_nothing",
        "test_quantized_models_generate_what_they_dequantize_to",
        "test_draws_follow_the_distribution",
    },
    "models/test_data.py": {"test_pydoc_halves_do_not_touch", "test_corpora_are_read_by_their_protocol"},
    "models/test_tokenizer.py": {"test_merges_bytes_and_specials"},
    "evaluate/test_perplexity.py": {"test_it_is_exp_of_the_mean_loss"},
    "evaluate/test_fidelity.py": {"test_every_figure_is_that_of_float64"},
    "evaluate/test_continuations.py": {"test_scores_are_those_of_the_whole_text"},
    "evaluate/test_analysis.py": {"test_every_matrix_is_looked_at"},
    "formats/test_formats.py": {"test_exports_are_read_back_bit_for_bit", "test_export_writes_a_model_with_its_card"},
    "cli/test_cli.py": {
        "test_quantize_shows_each_block_and_writes_what_it_says",
        "test_inspect_reads_everything_back",
        "test_generate_streams_text_and_reports",
        "test_an_interrupted_quantize_can_go_on_or_leaves_nothing",
        "test_help_lists_the_commands",
    },
}


def _name(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT / "tests").as_posix()


def mark(items: list[pytest.Item]) -> None:
    """Marks them `compat`.

    Raises:
      UsageError: a name above is no test of its file.
    """
    seen: dict[str, set[str]] = {}
    for item in items:
        file, name = _name(item), getattr(item, "originalname", item.name)
        seen.setdefault(file, set()).add(name)
        if file in COMPAT and (COMPAT[file] is ALL or name in COMPAT[file]):
            item.add_marker(pytest.mark.compat)
    wrong = [
        f"{file}::{name}" for file, names in COMPAT.items() if file in seen for name in (names or set()) - seen[file]
    ]
    if wrong and not _are_selected(items):
        raise pytest.UsageError(f"tests/support/compat.py names tests that are not there: {', '.join(sorted(wrong))}")


def _are_selected(items: list[pytest.Item]) -> bool:
    """Whether the command line names single tests, so that the others of a file are not collected."""
    return any("::" in str(argument) for argument in items[0].config.args) if items else True
