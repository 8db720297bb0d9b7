# SPDX-License-Identifier: Apache-2.0
"""The contract: what a trusted adapter library promises, row by row, and the tests that hold it.

`python -m pytest tests/contract tests/parity --matrix CONTRACT.md` runs them and writes rows x columns; a column is a
method on an architecture. A behaviour that a column cannot have is named here with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from cases import ARCHITECTURES, METHODS, Case

METHOD_NAMES = {"mept": "MEPT", "vapt": "VAPT", "pmoe": "pMoE", "promotion": "ProMotion"}


class Column(NamedTuple):
    """A method on an architecture; for pMoE also the backbones beside it."""

    method: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        beside = f" + {self.variant}" if self.variant else ""
        return f"{METHOD_NAMES[self.method]} {self.architecture}{beside}"

    @property
    def task_type(self) -> str:
        return ARCHITECTURES[self.architecture].task_type

    @property
    def generates(self) -> bool:
        return ARCHITECTURES[self.architecture].generates


def column_of(case: Case) -> Column:
    return Column(case.method_name, case.architecture_name, case.variant_name if case.method_name == "pmoe" else "")


_COLUMNS = [
    Column(method, architecture, variant)
    for method, entry in METHODS.items()
    for architecture, variants in entry.variants.items()
    for variant in (variants if method == "pmoe" else [""])
]
COLUMNS = [column for column in _COLUMNS if not ARCHITECTURES[column.architecture].for_its_head]
# Models that are here for a head of several layers, and the rows that depend on how a head is built.
HEAD_COLUMNS = [column for column in _COLUMNS if column not in COLUMNS]
HEAD_ROWS = (14, 15)

# Why a column cannot have a behaviour; None if it can.
Exemption = Callable[[Column], str | None]


def only_text(column: Column) -> str | None:
    return "images have no padding" if column.task_type == "IMAGE" else None


def only_attention(column: Column) -> str | None:
    return (
        None
        if METHODS[column.method].joins_attention
        else "pMoE and ProMotion work on whole blocks, not inside attention"
    )


def only_with_own_losses(column: Column) -> str | None:
    method = METHODS[column.method]
    return None if method.balance or method.auxiliary else "VAPT and pMoE have no auxiliary losses"


def only_compilable(column: Column) -> str | None:
    return (
        "torch.compile cannot trace this DPT, because transformers collects its hidden states under a lock"
        if column.architecture == "dpt_vit"
        else None
    )


def nothing(column: Column) -> str | None:
    return None


@dataclass(frozen=True)
class Row:
    """One promise.

    Attributes:
        number: as in the contract.
        behaviour: what is promised.
        tests: names of the test functions that hold it.
        exempt: which columns cannot have it, and why.
        refusals: names of the test functions that hold it by one clear error.
    """

    number: int
    behaviour: str
    tests: tuple[str, ...] = ()
    exempt: Exemption = nothing
    refusals: tuple[str, ...] = ()


ROWS = [
    Row(
        1,
        "the same seed gives the same start",
        ("test_the_same_seed_gives_the_same_start",),
    ),
    Row(2, "only the adapter and the head are trained", ("test_only_the_adapter_and_the_head_train",)),
    Row(3, "every trained tensor gets a gradient", ("test_every_trained_tensor_gets_a_gradient",)),
    Row(4, "training does not change the base model", ("test_training_changes_nothing_of_the_base_model",)),
    Row(5, "save and load: the same logits, bit for bit", ("test_save_and_load_gives_the_same_logits",)),
    Row(
        6,
        "save, load in another process, save again: the same bytes",
        ("test_saving_again_from_another_process_gives_the_same_bytes",),
    ),
    Row(
        7,
        "names of tensors in the adapter file stay the same in all versions",
        ("test_saved_names_are_those_of_the_manifest",),
    ),
    Row(
        8,
        "the adapter's name is not in the adapter file",
        ("test_the_adapter_name_leaves_no_trace_in_the_files", "test_names_that_contain_each_other_stay_apart"),
    ),
    Row(
        9,
        "loading with is_trainable=True continues the loss curve",
        ("test_trainable_reload_continues_the_loss_curve",),
    ),
    Row(
        10,
        "Trainer: evaluation, load_best_model_at_end, resuming from a checkpoint",
        (
            "test_evaluation_and_the_best_model_at_the_end",
            "test_resuming_gives_the_weights_of_an_unbroken_run",
            "test_bf16_training",
        ),
    ),
    Row(
        11,
        "the ways of PEFT and transformers to add, save, load and push an adapter",
        (
            "test_peft_config_from_pretrained",
            "test_auto_peft_model_is_bit_exact",
            "test_load_set_and_delete_adapter",
            "test_inject_adapter_in_model",
            "test_transformers_add_load_switch_delete",
            "test_transformers_saves_what_it_was_given",
            "test_transformers_from_pretrained_of_an_adapter_folder",
            "test_transformers_from_pretrained_of_an_adapter_folder_with_head",
            "test_push_to_hub_and_the_card_of_what_was_pushed",
            "test_the_snippet_of_the_saved_card_runs",
        ),
    ),
    Row(
        12,
        "several adapters: switching, deleting, independence",
        (
            "test_adapters_are_independent_and_can_be_deleted",
            "test_deleting_the_active_adapter_makes_another_active",
            "test_two_active_adapters_add_their_prompts",
        ),
    ),
    Row(13, "adapter disabled: the base model's output, bit for bit", ("test_disabled_equals_the_base_model",)),
    Row(
        14,
        "after unload(): the base model's output, no hook or module left",
        (
            "test_unload_gives_the_base_model_back",
            "test_unload_keeps_the_trained_head_and_disable_uses_the_original",
        ),
    ),
    Row(15, "an exception in a forward pass leaves nothing behind", ("test_an_exception_in_forward_leaves_nothing",)),
    Row(
        16,
        "the output is as long as the labels; position ids and token type ids count",
        (
            "test_the_output_has_the_length_of_the_labels",
            "test_position_ids_are_honoured",
            "test_token_type_ids_are_honoured",
        ),
    ),
    Row(
        17,
        "padding on the right or left changes nothing",
        (
            "test_padding_on_the_right_changes_nothing",
            "test_padding_on_the_left_changes_nothing",
            "test_padding_on_the_left_changes_no_hidden_state",
            "test_a_left_padded_batch_equals_its_samples",
        ),
        only_text,
    ),
    Row(
        18, "a sample gets the same output alone and in a batch", ("test_a_sample_alone_equals_the_sample_in_a_batch",)
    ),
    Row(
        19,
        "generate: the same tokens with and without cache; other models: as many features as the base model",
        (
            "test_cached_equals_uncached",
            "test_a_static_cache_equals_a_dynamic_one",
            "test_beams_run",
            "test_sampling_runs",
            "test_generation_equals_steps_by_hand",
            "test_decoding_in_chunks_equals_one_forward",
            "test_rows_follow_what_is_done_to_a_cache",
            "test_rows_follow_what_is_done_to_a_static_cache",
            "test_generation_runs_in_training_mode_without_gradients",
            "test_features_are_as_many_as_the_base_models",
        ),
    ),
    Row(
        20,
        "gradient checkpointing, re-entrant or not: the same gradients",
        ("test_checkpointing_gives_the_same_gradients",),
    ),
    Row(
        21,
        "half precision and autocast: finite values, adapter in float32",
        ("test_a_half_precision_base_keeps_the_adapter_in_fp32", "test_autocast_is_finite_and_near"),
    ),
    Row(
        22,
        "torch.compile: no graph breaks, the same results as eager",
        ("test_compiled_training_equals_eager", "test_compiled_evaluation_equals_eager"),
        only_compilable,
    ),
    Row(
        23,
        "prompts in attention equal prompts through the whole block, to 1e-12 where models compute in float64",
        (
            "test_static_rows_equal_rows_through_the_block",
            "test_direct_is_harvest",
            "test_direct_is_harvest_for_images",
        ),
        only_attention,
    ),
    Row(
        24,
        "the same results as a reference written as loops in float64",
        (
            "test_routed_rows_equal_a_loop_through_the_block",
            "test_token_routed_rows_equal_all_experts_rows_under_a_gated_mask",
            "test_equals_oracle",
            "test_equals_oracle_in_stages",
            "test_blocks_of_other_families",
            "test_on_timm",
        ),
    ),
    Row(
        25,
        "auxiliary losses: in the gradient, off in evaluation, without padding, right under gradient accumulation",
        (
            "test_the_balance_loss_reaches_routers_and_is_not_in_the_reported_loss",
            "test_the_balance_loss_is_the_gradient_of_what_is_reported",
            "test_the_balance_loss_survives_accumulation_and_scaling",
            "test_the_balance_loss_is_the_same_in_tuples",
            "test_the_balance_loss_is_off_in_evaluation_and_for_one_expert",
            "test_padding_does_not_count_in_the_balance_loss",
            "test_checkpointing_gives_the_same_gradients_of_a_balance_loss",
            "test_own_losses_are_in_the_gradient_and_not_in_the_reported_loss",
            "test_own_losses_survive_accumulation_and_scaling",
            "test_own_losses_survive_checkpointing",
            "test_own_losses_survive_compilation",
            "test_own_losses_are_off_in_evaluation",
            "test_own_losses_are_told",
        ),
        only_with_own_losses,
    ),
    Row(
        26,
        "evaluation is deterministic; noise is added in training only",
        ("test_evaluation_repeats_itself", "test_noise_of_training_is_off_in_evaluation"),
    ),
    Row(
        27,
        "adding and loading adapters on the meta device",
        (
            "test_meta_device_load_gives_the_same_logits",
            "test_an_adapter_is_made_without_memory_and_filled_later",
            "test_an_adapter_is_injected_without_memory",
        ),
    ),
    Row(
        28,
        "deep copies, pickles, state_dict",
        (
            "test_deep_copies_are_independent",
            "test_a_pickled_config_is_equal",
            "test_the_whole_model_can_be_pickled",
            "test_a_trained_base_model_state_dict_round_trip",
        ),
    ),
    Row(
        29,
        "several threads, on one model or on two: the results of one thread",
        (
            "test_four_threads_on_one_model_give_the_results_of_one",
            "test_two_models_in_two_threads_do_not_meet",
            "test_threads_that_generate_with_one_model_get_the_tokens_of_one",
        ),
    ),
    Row(
        30,
        "a config that does not fit the model: one error, the model is unchanged",
        refusals=("test_layers_that_do_not_exist_are_refused", "test_what_a_method_refuses"),
    ),
    Row(
        31,
        "merging: one error",
        refusals=("test_merging_is_refused", "test_what_only_some_methods_can_is_refused"),
    ),
    Row(
        32,
        "several adapters in one batch: each sample gets the output of its own adapter",
        (
            "test_each_sample_gets_its_own_adapter",
            "test_each_sample_gets_its_own_adapter_of_one_shape",
            "test_each_sample_generates_by_its_own_adapter",
        ),
        refusals=("test_wrong_names_are_refused", "test_mixed_batches_are_refused"),
    ),
    Row(
        33,
        "hooks that replace tensors, as DeepSpeed ZeRO-3's do, change nothing",
        ("test_hooks_that_hand_other_tensors_on_change_nothing",),
    ),
]

# Tables of the parity tests: architectures by the names that tests have for them.
_TEXT = {"t5_sees": "t5", "t5_drops": "t5", "gemma3_text": "gemma3"}
_TOWERS = {
    "vit_eager": "vit",
    "vit_wide": "vit",
    "timm": "timm_vit",
    "timm_wide": "timm_vit",
    "timm_average": "timm_avg",
    "timm.layers.attention.Attention": "timm_vit",
}


def _text_column(params: dict[str, Any]) -> list[Column]:
    name = params.get("family_name", params.get("name"))
    return _known(Column("mept", _TEXT.get(name, name)))


def _image_columns(params: dict[str, Any]) -> list[Column]:
    name = _TOWERS.get(params["name"], params["name"])
    return _known(Column("mept", name), Column("vapt", name))


def _tower_column(params: dict[str, Any]) -> list[Column]:
    return _known(Column("vapt", _TOWERS.get(params["name"], params["name"])))


def _mixtures(architecture: str) -> Callable[[dict[str, Any]], list[Column]]:
    return lambda params: [column for column in COLUMNS if column[:2] == ("pmoe", architecture)]


def _unit_columns(params: dict[str, Any]) -> list[Column]:
    """A unit is the same code behind every block; the backbone and DPT are of the family of one of the towers."""
    towers = {"default": ["vit", "dpt_vit"], "dinov2": ["dinov2_backbone"], "timm_average": ["timm_avg"]}
    return _known(*[Column("promotion", name) for name in towers.get(params["name"], ["vit"])])


def _stages_column(params: dict[str, Any]) -> list[Column]:
    return _known(Column("promotion", params["name"]))


def _known(*columns: Column) -> list[Column]:
    return [column for column in columns if column in COLUMNS]


# What a test without a case is about: by its file and name.
OTHERS: dict[tuple[str, str], Callable[[dict[str, Any]], list[Column]]] = {
    ("test_mept_parity", "test_equals_oracle"): _text_column,
    ("test_direct_is_harvest", "test_direct_is_harvest"): _text_column,
    ("test_direct_is_harvest", "test_direct_is_harvest_for_images"): _image_columns,
    ("test_vapt_parity", "test_equals_oracle"): _tower_column,
    ("test_vapt_parity", "test_blocks_of_other_families"): _tower_column,
    ("test_pmoe_parity", "test_equals_oracle"): _mixtures("vit"),
    ("test_promotion_parity", "test_equals_oracle"): _unit_columns,
    ("test_promotion_parity", "test_equals_oracle_in_stages"): _stages_column,
    ("test_pmoe_parity", "test_on_timm"): _mixtures("timm_vit"),
}


class Cell(NamedTuple):
    """A promise to a column, and whether a test holds it by a refusal."""

    row: int
    column: str
    refused: bool


def cells_of(file: str, function: str, params: dict[str, Any]) -> list[Cell]:
    """The cells that a test is of; none for tests of something else."""
    rows = [row for row in ROWS if function in (*row.tests, *row.refusals)]
    case = params.get("case")
    if isinstance(case, Case):
        columns = [column_of(case)]
    elif (file, function) in OTHERS:
        columns = OTHERS[file, function](params)
    else:
        return []
    return [Cell(row.number, str(column), function in row.refusals) for row in rows for column in columns]
