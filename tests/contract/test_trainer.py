# SPDX-License-Identifier: Apache-2.0
"""The stock Trainer: evaluation, the best model at the end, resuming; one case per kind of model and routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Batch, Case, assert_equal, each_case, one_per_column, predict
from peft import PeftModel
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

CHOSEN = {("bert", "sample"), ("modernbert", "token"), ("t5", "sample"), ("llama", "token"), ("gpt2", "sample")}
CHOSEN |= {("vit", "adaptive"), ("timm_vit", "adaptive"), ("vit", "sample")}

_FIELDS = TrainingArguments.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"


def chosen(case: Case) -> bool:
    return (case.architecture_name, case.variant_name) in CHOSEN


def waits(case: Case) -> bool:
    """The others of the contract, which only the full run trains."""
    return not chosen(case)


def wanted(case: Case) -> bool:
    return chosen(case) or one_per_column(case)


def trainer_for(case: Case, model: PeftModel, folder: Path, **settings: Any) -> Trainer:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "max_steps": 4,
        "seed": 3,
    } | settings
    samples = [case._sample(5 + i % 4, seed=i) for i in range(12)]

    def collate(rows: list[Batch]) -> Batch:
        return case.collate(rows, pad_to=8)

    seq2seq = case.task_type == "SEQ_2_SEQ_LM"
    arguments = (Seq2SeqTrainingArguments if seq2seq else TrainingArguments)(**options)
    kind = Seq2SeqTrainer if seq2seq else Trainer
    return kind(model, arguments, train_dataset=samples, eval_dataset=samples[:4], data_collator=collate)


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@each_case(wanted, slow=waits)
def test_evaluation_and_the_best_model_at_the_end(case: Case, tmp_path: Path) -> None:
    model = case.model()
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_for(case, model, tmp_path, **settings, eval_steps=1, save_steps=1)
    trainer.train()
    losses = {int(row["step"]): row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert sorted(losses) == [1, 2, 3, 4]
    worst = max(losses, key=losses.__getitem__)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[worst], abs=1e-6)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{worst}")
    kept = PeftModel.from_pretrained(case.base(), tmp_path / f"checkpoint-{worst}")
    assert_equal(predict(model.eval(), case.batch()), predict(kept, case.batch()), "logits of the best checkpoint")
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(losses[worst], abs=1e-6)


@each_case(wanted, slow=waits)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_resuming_gives_the_weights_of_an_unbroken_run(case: Case, tmp_path: Path, checkpointing: bool) -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, CHECKPOINTING: checkpointing}
    whole = case.model()
    trainer_for(case, whole, tmp_path / "whole", **settings).train()
    broken = case.model()
    trainer_for(case, broken, tmp_path / "whole", **settings).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
    )
    expected, found = weights(whole), weights(broken)
    assert expected.keys() == found.keys() and expected
    for name, weight in expected.items():
        assert_equal(found[name], weight, name)
        assert not torch.equal(weight, dict(case.model().named_parameters())[name])


@each_case(lambda case: chosen(case) and case.method.balance is not None)
def test_the_balance_loss_reaches_the_optimizer(case: Case, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "max_steps": 2, "optim": "sgd"}
    plain, balanced = case.model(), case.model(**{str(case.method.balance): 0.5})
    for model in (plain, balanced):
        trainer_for(case, model, tmp_path, **settings).train()
    changed = [name for name, weight in weights(plain).items() if not torch.equal(weight, weights(balanced)[name])]
    assert [name for name in changed if str(case.method.router) in name]


@each_case(chosen)
def test_bf16_training(case: Case, tmp_path: Path) -> None:
    model = case.model()
    trainer = trainer_for(case, model, tmp_path, bf16=True, save_strategy="no")
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4 and all(0 < loss < 100 for loss in losses)
    assert all(weight.dtype == torch.float32 and torch.isfinite(weight).all() for weight in weights(model).values())
