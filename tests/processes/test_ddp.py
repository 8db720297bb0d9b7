# SPDX-License-Identifier: Apache-2.0
"""The stock Trainer on two processes (DDP): losses and weights of one process on the same batches, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from cases import METHODS, Case, assert_equal, each_case, predict
from peft import PeftModel
from safetensors.torch import load_file
from test_trainer import trainer_for, weights
from two_processes import on_two_processes

CHOSEN = {("bert", "sample"), ("t5", "sample"), ("llama", "token"), ("vit", "adaptive"), ("vit", "dinov2")}
CHOSEN |= {("dinov2_backbone", "units")}
STEPS, SAVED, BATCH = 4, 2, 4


def chosen(case: Case) -> bool:
    return (case.architecture_name, case.variant_name) in CHOSEN


def train(case: Case, folder: Path, processes: int, resume: bool = False) -> dict[str, Any]:
    """What one process knows after training: losses as logged, trained tensors, and what wrapped the model."""
    model = case.model()
    trainer = trainer_for(
        case,
        model,
        folder,
        per_device_train_batch_size=BATCH // processes,
        ddp_find_unused_parameters=False,
        eval_strategy="no",
        max_steps=STEPS,
        save_steps=SAVED,
        # Adam divides by what it has seen of a gradient, so rounding of a tiny one would show in full.
        optim="sgd",
        # The Trainer multiplies the loss by the number of processes for every model that takes keyword arguments, also
        # where its loss does not divide by `num_items_in_batch` (BERT, T5), with or without an adapter.
        average_tokens_across_devices=case.is_causal_lm,
    )
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}") if resume else None)
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "weights": weights(model),
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def train_twice(case: Case, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """An unbroken run on two processes, and one that goes on from its checkpoint."""
    return train(case, folder, 2), train(case, folder, 2, resume=True)


def assert_near(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["wrapper"] == "DistributedDataParallel"
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-6, atol=1e-6)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        difference = float((found["weights"][name] - weight).abs().max())
        assert difference <= 1e-6, f"{name} differs by {difference:.3g}"


@each_case(chosen)
def test_two_processes_train_as_one(case: Case, tmp_path: Path) -> None:
    alone = train(case, tmp_path / "alone", 1)
    start = weights(case.model())
    assert all(not torch.equal(weight, start[name]) for name, weight in alone["weights"].items())
    for whole, resumed in (ranks := on_two_processes(train_twice, case, tmp_path / "both")):
        assert_near(whole, alone)
        for name, weight in ranks[0][0]["weights"].items():
            assert_equal(whole["weights"][name], weight, f"{name} of the two processes")
            assert_equal(resumed["weights"][name], weight, f"{name} after resuming")
    check_checkpoints(case, tmp_path / "both", ranks[0][0])


def check_checkpoints(case: Case, folder: Path, trained: dict[str, Any]) -> None:
    """Rank 0 has saved a checkpoint that loads as any adapter does, and there is one trace of a second process."""
    kept = folder / f"checkpoint-{STEPS}"
    assert json.loads((kept / "trainer_state.json").read_text())["global_step"] == STEPS
    tensors = load_file(kept / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert sorted(path.name for path in kept.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    loaded = PeftModel.from_pretrained(case.base(), kept, is_trainable=True)
    for name, weight in weights(loaded).items():
        assert_equal(weight, trained["weights"][name], f"{name} after loading")
    assert torch.isfinite(predict(loaded.eval(), case.batch())).all()


def train_with_centres(case: Case, folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """Router centres after training."""
    model = case.model(router_centering=True)
    settings = {"eval_strategy": "no", "save_strategy": "no", "max_steps": STEPS, "optim": "sgd"}
    settings |= {"per_device_train_batch_size": BATCH // processes, "average_tokens_across_devices": False}
    trainer_for(case, model, folder, ddp_find_unused_parameters=False, **settings).train()
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "center" in name}


def test_router_centres_are_the_means_of_all_processes(tmp_path: Path) -> None:
    """All have the same, which is what one process has on the same batches."""
    case = Case("mept", "bert", "sample", "sdpa")
    alone = train_with_centres(case, tmp_path / "alone", 1)
    assert all(bool(centre.any()) for centre in alone.values())
    first, second = on_two_processes(train_with_centres, case, tmp_path / "both", 2)
    for name, centre in alone.items():
        assert_equal(first[name], second[name], f"{name} of the two processes")
        torch.testing.assert_close(first[name], centre, rtol=0, atol=1e-6)


UNITS = Case("promotion", "dinov2_backbone", "units", "sdpa")
KINDS = [{}, {"reseed_after": 1}, {"init_weights": True}]


def train_banks(settings: dict[str, Any], folder: Path, processes: int) -> dict[str, torch.Tensor]:
    """Banks after training."""
    model = UNITS.model(**settings)
    more = {"per_device_train_batch_size": BATCH // processes, "eval_strategy": "no", "save_strategy": "no"}
    trainer_for(UNITS, model, folder, ddp_find_unused_parameters=False, optim="sgd", **more).train()
    model.eval()
    return {name: p.detach().clone() for name, p in model.named_parameters() if "promotion_bank" in name}


def train_all_banks(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [train_banks(settings, folder, 2) for settings in KINDS]


def test_banks_are_equal_on_all_processes_and_those_of_one(tmp_path: Path) -> None:
    """A start and far patches are those of the first process, so there one process with all samples has others."""
    first, second = on_two_processes(train_all_banks, tmp_path)
    for settings, one, two in zip(KINDS, first, second, strict=True):
        for name, bank in one.items():
            assert_equal(two[name], bank, f"{name} with {settings}")
            assert (bank if name.endswith("idle") else bank.abs().amax(dim=1)).min() >= 0.0
    alone = train_banks({}, tmp_path, 1)
    start = dict(UNITS.model().named_parameters())
    for name, bank in alone.items():
        torch.testing.assert_close(first[0][name], bank, rtol=1e-5, atol=1e-5)
        assert (bank - start[name]).abs().max() > 1e-3


def test_every_method_takes_part() -> None:
    methods = {mark.values[0].method_name for mark in each_case(chosen).args[1]}
    assert methods == METHODS.keys()
