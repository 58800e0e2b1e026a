"""The table of what MIPICLoss works with, checked against the tests that show each line."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).parents[1]
PAGE = HERE.parent / ".docs" / "pages" / "works-with.md"
BEGIN, END = "<!-- works-with:begin -->", "<!-- works-with:end -->"

# what, how, the tests that show it
LINES = [
    ("Cached losses (ranking, symmetric, GIST, mega-batch)", "exact, any mini-batch size, with prompts",
     ["test_cached.py::test_same_terms_and_gradients_as_uncached", "test_cached.py::test_prompts_left_out_of_pooling"]),
    ("Gradient accumulation", "exact, projections too",
     ["test_cached.py::test_gradient_accumulation",
      "test_modes.py::test_gradient_accumulation_equals_the_mean_of_the_batches"]),
    ("Several processes (DDP)", "projections need `MIPICCallback`, or are refused; `gather_across_devices` for PIC",
     ["test_distributed.py::test_two_processes_equal_one", "test_distributed.py::test_ranks_agree",
      "test_distributed.py::test_training_by_several_processes_without_the_callback_is_refused"]),
    ("Resuming",
     "bit for bit: the default without more, projections and drawn dims (`n_dims_per_step`) with `MIPICCallback`; "
     "without it, the log says that nobody keeps the projections",
     ["test_callback.py::test_all_dims_resume_without_the_callback_or_its_file",
      "test_callback.py::test_drawn_dims_of_a_loss_without_parameters",
      "test_callback.py::test_resume_is_bit_identical",
      "test_callback.py::test_projections_without_the_callback_are_told_once",
      "test_callback.py::test_a_plain_loop_resumes_from_state_dicts",
      "test_distributed.py::test_resuming_in_two_processes"]),
    ("`load_best_model_at_end`, `save_total_limit`", "with `MIPICCallback`",
     ["test_callback.py::test_load_best_model_at_end_and_save_total_limit"]),
    ("`max_grad_norm`", "covers the projections with `MIPICCallback`, logged as `projections_grad_norm`",
     ["test_callback.py::test_gradients_of_the_projections_are_clipped_and_logged"]),
    ("A learning rate for the projections", r"`learning_rate_mapping={r'^mipic_projections\.': 1e-3}`",
     ["test_callback.py::test_a_learning_rate_for_the_projections"]),
    ("Several data sets, a dict of losses", "one callback for all",
     ["test_modes.py::test_several_data_sets_with_a_dict_of_losses",
      "test_callback.py::test_a_dict_of_losses_resumes_bit_for_bit"]),
    ("bf16 autocast, models loaded in bf16", "terms and projections stay float32",
     ["test_modes.py::test_bf16_autocast", "test_modes.py::test_model_loaded_in_bf16"]),
    ("fp16", "gradient scaler on CPU tested; its CUDA path is not",
     ["test_faults.py::test_gradients_that_overflow_are_left_to_the_scaler",
      "test_faults.py::test_where_a_gradient_scaler_skips_it_is_a_warning"]),
    ("Gradient checkpointing", "both modes", ["test_modes.py::test_gradient_checkpointing"]),
    ("`torch_compile=True`", "no recompilation with varying length",
     ["test_modes.py::test_torch_compile_without_a_recompilation_storm"]),
    ("PEFT / LoRA", "projections and adapters train, the base stays frozen", ["test_modes.py::test_lora"]),
    ("Router (asymmetric models)", "routes of one shape", ["test_modes.py::test_router"]),
    ("A larger teacher (`distill_weight`)",
     "any base loss without labels of its own; static embeddings too; several processes, each within its own batch",
     ["test_distillation.py::test_term_of_the_loss", "test_distillation.py::test_cached_loss_is_the_same",
      "test_distillation.py::test_static_embeddings_can_have_a_teacher", "test_distillation.py::test_in_the_trainer",
      "test_distributed.py::test_a_teacher_in_two_processes"]),
    ("Prompts, `include_prompt=False`", "yes", ["test_modes.py::test_prompts"]),
    ("Truncation by `max_seq_length`", "yes", ["test_modes.py::test_truncation"]),
    ("Evaluation loss while training", "deterministic, all dims, no gradients",
     ["test_modes.py::test_evaluation_loss_during_training"]),
    ("`config.json` for serving engines, model card", "written by `MIPICCallback` or `set_matryoshka_config`",
     ["test_callback.py::test_the_config_says_matryoshka", "test_callback.py::test_the_model_card_lists_the_loss"]),
    ("Flattened inputs (flash attention)", "refused, with the switch that helps",
     ["test_modes.py::test_flattened_inputs_are_refused"]),
    ("FSDP", "without projections (the defaults: `lift_init=\"frozen\", pic_weight=0`); projections are refused",
     ["test_distributed.py::test_without_projections_a_sharded_model_trains",
      "test_distributed.py::test_projections_beside_what_shards_are_refused",
      "test_distributed.py::test_the_trainer_refuses_them_at_its_construction"]),
    ("DeepSpeed", "the same, tested by its name only",
     ["test_distributed.py::test_projections_beside_what_shards_are_refused"]),
    ("nan or inf in a batch", "stops the step, names term and step",
     ["test_faults.py::test_a_bad_label_names_term_and_step"]),
]  # fmt: skip


def table() -> str:
    """The table as Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {what} | {how} |" for what, how, _ in LINES)])


def test_every_line_is_shown_by_tests_that_exist():
    """Each line names at least one test function, except where it says that nothing was tested."""
    functions = {
        f"{path.name}::{node.name}"
        for path in HERE.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    for what, how, tests in LINES:
        assert bool(tests) != (how == "not tested"), what
        assert set(tests) <= functions, what


def test_the_page_has_this_table():
    """Word for word, between its two markers."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == table()
