# SPDX-License-Identifier: Apache-2.0
"""Hostile and broken folders of ProMotion: banks, denoisers and sizes that are not what config or model say."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_adapter_folders import ENTRIES, FILE, Tensors, assert_untouched, snapshot, spoil
from torch import Tensor
from transformers import ViTConfig, ViTModel

from peft_promptmoe import ProMotionConfig

SETTINGS: dict[str, Any] = {"num_prototypes": 3, "bottleneck_dim": 8, "layers_to_transform": [0, 1]}
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def make_base() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4
    )
    return ViTModel(config, add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two units of width 8 with three prototypes, as they are after training."""
    folder = tmp_path_factory.mktemp("good")
    get_peft_model(make_base(), ProMotionConfig(init_weights=False, **SETTINGS)).save_pretrained(folder)
    return folder


def first(tensors: Tensors, part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def put(part: str, change: Callable[[Tensor], Tensor], name: str | None = None) -> Callable[[Tensors], Tensors]:
    """The first tensor whose name has `part`, changed, in its place or under another name."""

    def spoiled(tensors: Tensors) -> Tensors:
        key = first(tensors, part)
        return tensors | {key if name is None else key.replace(part, name): change(tensors[key]).clone().contiguous()}

    return spoiled


BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "banks_missing": (without("promotion_bank"), {}, "lacks 2 of the"),
    "denoisers_missing": (without("promotion_denoiser"), {}, "lacks"),
    "gain_missing": (without("gain"), {}, "lacks 2 of the"),
    "bank_of_nan": (put("promotion_bank", lambda t: t * torch.nan), {}, "not finite"),
    "bank_of_inf": (put("promotion_bank", lambda t: t / 0.0), {}, "not finite"),
    "bank_of_more": (put("promotion_bank", lambda t: t.repeat(2, 1)), {}, r"shape \(6, 8\)"),
    "bank_of_integers": (put("promotion_bank", lambda t: t.long()), {}, "has dtype torch.int64"),
    "bank_flat": (put("promotion_bank", torch.flatten), {}, r"shape \(24,\)"),
    "two_denoising_steps": (put("subspace", lambda t: t.repeat(2, 1, 1)), {}, r"shape \(2, 8, 8\)"),
    "gain_of_inf": (put("gain", lambda t: t + torch.inf), {}, "not finite"),
    "idle_counts": (put("promotion_bank.weight", lambda t: t[:, :1], "promotion_bank.idle"), {}, "no place for"),
    "unit_of_another_block": (put("layers.0", lambda t: t, "layers.9"), {}, "no place for"),
    "config_of_more_prototypes": (dict, {"num_prototypes": 4}, r"\(3, 8\) in the adapter file and \(4, 8\)"),
    "config_of_narrower_units": (dict, {"bottleneck_dim": 4}, r"in the adapter file and \(4, 16\)"),
    "config_of_no_denoiser": (dict, {"denoise_steps": 0, "denoise_weight": 0.0}, "no place for.*denoiser"),
    "config_of_attention_alone": (dict, {"denoiser": "attention"}, "no place for.*denoiser"),
    "config_of_pools": (
        dict,
        {"proposal": "pool", "num_prototypes": 4, "bank_momentum": None},
        "no place for.*promotion_bank",
    ),
    "config_of_fewer_units": (dict, {"layers_to_transform": [0]}, "no place for"),
    "config_that_reseeds": (dict, {"reseed_after": 3}, "lacks 2 of the"),
}


@pytest.mark.parametrize("entry", ["from_pretrained", "low_cpu_mem", "load_adapter"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_units(case: str, entry: str, good: Path, tmp_path: Path) -> None:
    change, config, message = BROKEN[case]
    folder = spoil(good, tmp_path / "bad", change(load_file(good / FILE)), **config)
    base = make_base()
    model: Any = PeftModel.from_pretrained(base, good, adapter_name="first") if entry == "load_adapter" else base
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        ENTRIES[entry](model, folder)
    assert_untouched(base, before)
    expected = PeftModel.from_pretrained(make_base(), good)
    loaded = ENTRIES[entry](model, good)
    if entry == "load_adapter":
        model.set_adapter("second")
        loaded = model
    with torch.no_grad():
        assert torch.equal(loaded.eval()(PIXELS).last_hidden_state, expected(PIXELS).last_hidden_state)


HOSTILE = [
    *(
        (field, value)
        for field in ("num_prototypes", "bottleneck_dim")
        for value in (0, -1, 10**7, 10**30, True, 4.0, "8")
    ),
    *(("denoise_steps", value) for value in (-1, 10**5, 10**12, "1")),
    *((field, 10**9) for field in ("estimation_rounds", "sinkhorn_rounds", "num_heads")),
    *(("sinkhorn_eps", value) for value in (0.0, -1.0, float("nan"), float("inf"))),
    *(("noise_std", value) for value in (0.0, float("inf"), "1")),
    ("bank_momentum", float("nan")),
    ("bank_momentum", 2.0),
    ("reseed_after", 10**12),
    ("read_top", 0),
    ("read_top", 99),
    ("denoiser", "__import__('os')"),
    ("proposal", ["bank"]),
    ("layers_to_transform", [0, 10**12]),
    ("layers_to_transform", [-1]),
]


@pytest.mark.parametrize(("field", "value"), [pytest.param(f, v, id=f"{f}={v!r:.16}") for f, v in HOSTILE])
def test_hostile_sizes(field: str, value: Any, good: Path, tmp_path: Path) -> None:
    """Refused by name, before anything of their size is made."""
    folder = spoil(good, tmp_path / "bad", **{field: value})
    base = make_base()
    before = snapshot(base)
    tracemalloc.start()
    try:
        with pytest.raises((TypeError, ValueError), match=field):
            PeftModel.from_pretrained(base, folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20
    assert_untouched(base, before)


def test_sizes_that_are_too_large_together_allocate_no_tensor(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    base, plain = make_base(), torch.nn.Linear.reset_parameters
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: (made.append(self), plain(self))[1])
    for name, sizes in {
        "bank": {"num_prototypes": 16_384, "bottleneck_dim": 4_096},
        "steps": {"denoise_steps": 1_000, "bottleneck_dim": 512},
    }.items():
        with pytest.raises(ValueError, match=f"bottleneck_dim={sizes['bottleneck_dim']}"):
            PeftModel.from_pretrained(base, spoil(good, tmp_path / name, **sizes))
    assert not made
