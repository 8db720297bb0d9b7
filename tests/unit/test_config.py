# SPDX-License-Identifier: Apache-2.0
"""Every method's config refuses every bad value at once, naming the field."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from transformers import HfArgumentParser

from peft_promptmoe import MEPTConfig, PMoEConfig, ProMotionConfig, VAPTConfig
from peft_promptmoe.config import MAX_SLOTS_PER_LAYER, PromptConfig
from peft_promptmoe.vapt.config import MAX_PIXELS, MAX_WIDTH

NAN, INF = math.nan, math.inf
NO_INTEGERS = (True, False, 1.0, 1.5, NAN, INF, "3", "", [1], {}, b"1", 1 + 0j)
NO_NUMBERS = (True, False, "0.1", "", [0.1], {}, 1 + 0j)
NO_BOOLS = (0, 1, "True", "", 1.0, [True])
NO_NAMES = (0, True, 1.5, ["sample"], {})

# Field, and values that are not of its kind or out of its range.
COMMON: dict[str, tuple[Any, ...]] = {
    "num_virtual_tokens": (*NO_INTEGERS, None, 0, -1, MAX_SLOTS_PER_LAYER + 1, 10**9, 10**30),
    "init_weights": (*NO_BOOLS, None),
    "layers_to_transform": (
        *(True, 1.5, NAN, "3", -1, [-1], [True], [0, "1"], [1.0], [None], {"a": 1}, [0] * 10_001, range(10**12)),
    ),
    "target_modules": (3, True, 1.5, [1], ["a", None], b"a", "(", "a{2,1}", "a{99999999999}"),
    "exclude_modules": (3, True, 1.5, [1], ["a", None], b"a", "["),
    "trainable_token_indices": (
        *(3, True, "3", [], [1.0], [True], ["1"], [-1], [2, 2], (1, 2), [2**63]),
        *({"embed_tokens": 3}, {"embed_tokens": []}, {1: [3]}, {"embed_tokens": [None]}),
    ),
    "modules_to_save": (3, True, "classifier", [1], [None], ["ok", "(?P<x"]),
    "layers_pattern": (3, True, [1], {"a": 1}, "*", ["("]),
    "inference_mode": (0, 1, None, "True", [True]),
    "check_base_weights": (*NO_BOOLS, None),
    "base_record": (
        *(3, True, "bert", [1], {"type": 3}, {"width": "8"}, {"depth": True}, {"num_labels": 2.0}),
        *({"weights": "00"}, {"weights": {"a": 1}}, {"weights": {1: "0000"}}, {"weights": {"a": "xyz0"}}),
        *({"weights": {"a": "0000" * 65}}, {"weights": {"a": "000"}}, {"weights": {str(i): "0000" for i in range(9)}}),
    ),
}
BAD: dict[str, tuple[Any, ...]] = COMMON | {
    "num_experts": (*NO_INTEGERS, None, 0, -1, 10**7, 10**30),
    "top_k": (*NO_INTEGERS, None, 0, -1, 5, 10**9),
    "num_shared_experts": (*NO_INTEGERS, None, -1, 10**7, 10**30),
    "routing": (*NO_NAMES, None, "", "Sample", "tokens", "none"),
    "router_norm": (*NO_BOOLS, None),
    "router_centering": (*NO_BOOLS, None),
    "renormalize_top_k": (*NO_BOOLS, None),
    "router_noise": (*NO_NUMBERS, None, NAN, INF, -INF, -0.1),
    "router_dropout": (*NO_NUMBERS, None, NAN, INF, -0.1, 1.0, 2),
    "balance_loss_weight": (*NO_NUMBERS, None, NAN, INF, -INF, -1e-9, 2**63),
    "prompt_positions": (*NO_NAMES, None, "", "suffix"),
    "decoder_sees_prompts": (*NO_BOOLS, None),
    "prompt_scale": (*NO_NUMBERS, None, NAN, INF, 0, 0.0, -1.0, 10**30, 10**400),
    "init_std": (True, False, None, "matched", "", NAN, INF, -1.0, [0.1]),
    "prompt_weights": (3, True, "1", (1.0,), [True], ["1"], [0.0], [-1.0], [NAN], [INF], [1.0], [1.0, 2.0], []),
    "prompt_init": (*NO_NAMES, None, "", "zeros", "Random"),
    "start_scale": (*NO_NAMES, None, "", "Unit", 1, 1.0),
}
BAD_VAPT: dict[str, tuple[Any, ...]] = COMMON | {
    "bottleneck_dim": (*NO_INTEGERS, None, 0, -1, MAX_WIDTH + 1, 10**30),
    "kernel_size": (*NO_INTEGERS, None, 0, -1, MAX_PIXELS + 1, 10**30),
    "padding": (*NO_INTEGERS, None, -1, MAX_PIXELS + 1, 10**30),
    "use_conv": (*NO_BOOLS, None),
    "channelwise_kernel": (*NO_BOOLS, None),
    "use_projector": (*NO_BOOLS, None),
    "share_projector": (*NO_BOOLS, None),
    "learnable_scale": (*NO_BOOLS, None),
    "projector_scale": (*NO_NUMBERS, None, NAN, INF, 0, 0.0, -1.0),
    "activation": (*NO_NAMES, None, "", "ReLU", "attention", "silu"),
    "num_static_layers": (True, False, 1.0, NAN, "", "All", "3", None, -1, [1]),
    "prompt_dropout": (*NO_NUMBERS, None, NAN, INF, -0.1, 1.0, 2),
    "channel_dropout": (*NO_NUMBERS, None, NAN, INF, -0.1, 1.0, 2),
    "projector_dropout": (*NO_NUMBERS, None, NAN, INF, -0.1, 1.0, 2),
    "image_size": (True, 1.5, NAN, "32", 0, -1, MAX_PIXELS + 1, [], [32], [32, 0], [32, 32, 32], [32, "32"], {32: 32}),
    "resample_grid": (*NO_BOOLS, None),
    "backbone_eval": (*NO_BOOLS, None),
}
TABLES: dict[type[PromptConfig], dict[str, tuple[Any, ...]]] = {MEPTConfig: BAD, VAPTConfig: BAD_VAPT}


def short(value: Any) -> str:
    return f"{type(value).__name__}:{str(value)[:12]}"


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        pytest.param(config, name, value, id=f"{config.__name__}-{name}={short(value)}")
        for config, table in TABLES.items()
        for name, values in table.items()
        for value in values
    ],
)
def test_bad_value_names_the_field(config: type[PromptConfig], name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        config(**{name: value})
    assert name in str(caught.value)


@pytest.mark.parametrize("config", TABLES)
def test_every_own_field_is_in_the_table(config: type[PromptConfig]) -> None:
    peft = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    assert {field.name for field in dataclasses.fields(config)} - peft == TABLES[config].keys()


def test_top_k_above_num_experts() -> None:
    with pytest.raises(ValueError, match="top_k must be from 1 to 2, got 3"):
        MEPTConfig(num_experts=2, top_k=3)
    assert MEPTConfig(num_experts=3, top_k=3).top_k == 3


def test_renormalized_single_gate_is_dead() -> None:
    with pytest.raises(ValueError, match=r"renormalize_top_k=True with top_k=1.*top_k of at least 2"):
        MEPTConfig(renormalize_top_k=True, top_k=1)
    assert MEPTConfig(renormalize_top_k=True, top_k=2).renormalize_top_k
    assert MEPTConfig(renormalize_top_k=True, top_k=1, num_experts=1).renormalize_top_k  # no router


def test_starved_router_warns() -> None:
    with pytest.warns(UserWarning, match="almost no gradient in pre-norm models"):
        MEPTConfig(routing="sample", top_k=1, num_shared_experts=0)
    for settings in ({"routing": "token"}, {"routing": "sample", "num_experts": 1}, {"routing": "sample", "top_k": 2}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            MEPTConfig(num_shared_experts=0, **settings)


def test_slots_are_bounded_together() -> None:
    with pytest.raises(ValueError, match=r"num_experts.*num_virtual_tokens is 16500 slots"):
        MEPTConfig(num_experts=164, num_shared_experts=1, num_virtual_tokens=100)


def test_layers_pattern_alone() -> None:
    with pytest.raises(ValueError, match="layers_to_transform"):
        MEPTConfig(layers_pattern="layers")


def test_good_values_at_the_edges() -> None:
    config = MEPTConfig(
        num_virtual_tokens=1,
        num_experts=1,
        num_shared_experts=0,
        router_noise=0,
        router_dropout=0,
        init_std=0,
        layers_to_transform=0,
        balance_loss_weight=1,
    )
    assert config.layers_to_transform == 0
    assert MEPTConfig(layers_to_transform=[2, 0]).layers_to_transform == [2, 0]
    assert MEPTConfig(target_modules="all.*").target_modules == "all.*"


def test_good_values_of_vapt_at_the_edges() -> None:
    config = VAPTConfig(
        num_virtual_tokens=1,
        bottleneck_dim=1,
        kernel_size=1,
        num_static_layers=0,
        prompt_dropout=0,
        channel_dropout=0.99,
    )
    assert not config.is_static(0)
    assert VAPTConfig(num_static_layers="all").is_static(99)
    assert VAPTConfig(image_size=32).image_size == [32, 32]
    assert VAPTConfig(image_size=(32, 48)).to_dict()["image_size"] == [32, 48]  # type: ignore[arg-type]


def test_defaults_are_valid_and_saved_sorted() -> None:
    config = MEPTConfig(target_modules=["z", "y", "x"], exclude_modules=["q", "p"])
    assert config.target_modules == {"x", "y", "z"}
    written = config.to_dict()
    assert written["target_modules"] == ["x", "y", "z"] and written["exclude_modules"] == ["p", "q"]
    for pair in itertools.permutations(["c", "b", "a"]):
        assert MEPTConfig(target_modules=list(pair)).to_dict()["target_modules"] == ["a", "b", "c"]


# -- types and help ---------------------------------------------------------------------------------------------------

METHODS = (MEPTConfig, VAPTConfig, PMoEConfig, ProMotionConfig)
CHOICES: dict[type[Any], dict[str, tuple[Any, ...]]] = {
    MEPTConfig: {
        "routing": ("auto", "sample", "token"),
        "prompt_positions": ("auto", "prefix", "unrotated"),
        "prompt_init": ("auto", "sample_vocab", "random"),
        "start_scale": ("unit", "inputs"),
        "decoder_sees_prompts": ("auto", True, False),
    },
    VAPTConfig: {"activation": ("relu", "gelu", "sigmoid", "softmax", "identity")},
    PMoEConfig: {
        "dispatcher": ("token", "expert", "attention", "mean", "none"),
        "fusion": ("concat", "mean", "logits"),
    },
    ProMotionConfig: {"denoiser": ("both", "attention", "tokens"), "proposal": ("bank", "pool")},
}


@pytest.mark.parametrize("config", METHODS)
def test_choices_are_in_the_types(config: type[Any]) -> None:
    hints = get_type_hints(config)
    found = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
    assert found == CHOICES[config]
    for name, choices in found.items():
        for choice in choices:
            more = {"experts": ["a"]} if name == "dispatcher" else {}
            assert getattr(config(**{name: choice}, **more), name) == choice
        with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
            config(**{name: "no such choice"})


@pytest.mark.parametrize("config", METHODS)
def test_command_lines_make_configs(config: type[Any], tmp_path: Any) -> None:
    parser = HfArgumentParser(config)
    assert parser.parse_args_into_dataclasses([])[0] == config()
    text = [part for name, choices in CHOICES[config].items() for part in (f"--{name}", str(choices[-1]))]
    text += ["--layers_to_transform", "0", "2", "--target_modules", "self_attn", "--modules_to_save", "a", "b"]
    (made,) = parser.parse_args_into_dataclasses(text)
    assert {name: getattr(made, name) for name in CHOICES[config]} == {n: c[-1] for n, c in CHOICES[config].items()}
    assert made.layers_to_transform == [0, 2] and made.target_modules == "self_attn"
    assert made.modules_to_save == ["a", "b"]
    made.save_pretrained(tmp_path)
    assert config.from_pretrained(tmp_path) == made
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses([f"--{next(iter(CHOICES[config]))}", "no such choice"])


@pytest.mark.parametrize(
    ("config", "text", "name", "value"),
    [
        (MEPTConfig, "0.02", "init_std", 0.02),
        (MEPTConfig, "match", "init_std", "match"),
        (VAPTConfig, "3", "num_static_layers", 3),
        (VAPTConfig, "all", "num_static_layers", "all"),
    ],
)
def test_numbers_or_words_on_command_lines(config: type[Any], text: str, name: str, value: Any) -> None:
    assert getattr(HfArgumentParser(config).parse_args_into_dataclasses([f"--{name}", text])[0], name) == value


def test_lists_on_command_lines() -> None:
    def made(config: type[Any], *text: str) -> Any:
        return HfArgumentParser(config).parse_args_into_dataclasses(list(text))[0]

    assert made(VAPTConfig, "--image_size", "32", "48").image_size == [32, 48]
    assert made(PMoEConfig, "--experts", "facebook/dino-vitb16", "timm/x").experts == [
        "facebook/dino-vitb16",
        "timm/x",
    ]


@pytest.mark.parametrize("config", METHODS)
def test_help_names_every_field(config: type[Any]) -> None:
    lines = [line.strip().split(":")[0] for line in str(config.__doc__).splitlines() if ":" in line]
    named = {name for line in lines for name in line.split(", ")}
    assert {field.name for field in dataclasses.fields(config) if field.init} - named == set()
