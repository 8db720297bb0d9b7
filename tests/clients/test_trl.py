# SPDX-License-Identifier: Apache-2.0
"""TRL: its trainers run beside LoRA, and auxiliary losses reach routers with the gradient that they should have."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel
from small import WORDS, adapted, adapters, gradients, largest_difference, llama, tokenizer
from torch import Tensor
from transformers import LlamaForSequenceClassification, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from peft_promptmoe import MEPTConfig, auxiliary_loss

CLIENT = "trl"
WEIGHT = 10.0


def words(*numbers: int) -> str:
    return " ".join(WORDS[number % len(WORDS)] for number in numbers)


PROMPTS = [words(i, 3 * i + 1, 5 * i + 2, *range(i % 3)) for i in range(8)]
GOOD = [" " + words(7 * i + 3, 2 * i) for i in range(8)]
BAD = [" " + words(11 * i + 5, i, 4 * i) for i in range(8)]
PREFERENCES = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}
ROWS: dict[str, dict[str, list[Any]]] = {
    "sft": {"prompt": PROMPTS, "completion": GOOD},
    "dpo": PREFERENCES,
    "kto": {"prompt": PROMPTS, "completion": GOOD[:4] + BAD[4:], "label": [True] * 4 + [False] * 4},
    "grpo": {"prompt": PROMPTS},
    "rloo": {"prompt": PROMPTS},
    "reward": {"chosen": GOOD, "rejected": BAD},
}


def reward(completions: list[str], **_: Any) -> list[float]:
    """No two answers of a group are worth the same, so that there is something to learn."""
    return [float(sum(ord(letter) for letter in text) % 17) for text in completions]


TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sft": (SFTTrainer, SFTConfig, {"completion_only_loss": True}),
    "dpo": (DPOTrainer, DPOConfig, {}),
    "kto": (KTOTrainer, KTOConfig, {}),
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 4, "max_completion_length": 5, "beta": 0.0}),
    "rloo": (RLOOTrainer, RLOOConfig, {"num_generations": 4, "max_completion_length": 5, "beta": 0.0}),
    "reward": (RewardTrainer, RewardConfig, {}),
}


def by_hand(trainer: Any, divides: bool) -> Any:
    """The trainer as the warning and the documentation advise."""

    class Trainer(trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, **kwargs)
            return loss + auxiliary_loss(model) / (self.current_gradient_accumulation_steps if divides else 1)

    return Trainer


class Gradients(TrainerCallback):
    """Those of the first optimiser step, before they are clipped."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not hasattr(self, "found"):
            self.found = gradients(model)


def trainer(kind: str, config: Any, folder: Path, hand: bool = False, steps: int = 1, **settings: Any) -> Any:
    made, arguments, own = TRAINERS[kind]
    args = arguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_grad_norm=1e6,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        logging_steps=1,
        **own,
        **settings,
    )
    made = by_hand(made, divides=kind == "grpo") if hand else made
    judge = {"reward_funcs": reward} if kind in ("grpo", "rloo") else {}
    model = adapted(base_of(kind), config)
    data = datasets.Dataset.from_dict(ROWS[kind])
    return made(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **judge)


def base_of(kind: str) -> Any:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(llama(num_labels=1).config) if kind == "reward" else llama()


def routed(weight: float = 0.0) -> MEPTConfig:
    settings = {"num_virtual_tokens": 4, "num_experts": 3, "router_noise": 0.0, "routing": "token"}
    return MEPTConfig(task_type="CAUSAL_LM", init_weights=False, balance_loss_weight=weight, **settings)


class Recorder:
    """What a model was called with while it learned, so that the same forwards can be run again."""

    def __init__(self, model: Any) -> None:
        self.calls: list[dict[str, Tensor]] = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and model.training:
            assert not args
            self.calls.append({name: kwargs[name].clone() for name in ("input_ids", "attention_mask")})


def balance_gradients(model: Any, calls: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a balance loss of weight 1 adds to the gradient of the model's own loss, a mean over `calls`."""
    total: dict[str, Tensor] = {}
    for weight, sign in ((1.0, 1.0), (0.0, -1.0)):
        fresh = adapted(llama(), routed(weight)).train()
        fresh.load_state_dict(model)
        for call in calls:
            (fresh(**call, labels=call["input_ids"]).loss * sign / len(calls)).backward()
        for name, value in gradients(fresh).items():
            total[name] = total.get(name, 0) + value
    return total


@pytest.mark.parametrize("accumulated", [1, 2], ids=["one-batch", "two-batches"])
@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo", "rloo"])
@pytest.mark.filterwarnings("ignore:.*auxiliary losses have no effect")
def test_auxiliary_losses_by_hand(kind: str, accumulated: int, tmp_path: Path) -> None:
    """With `auxiliary_loss(model)` in `compute_loss`, the gradient is the trainer's own plus the balance loss's, once.
    Without it, the gradient is the trainer's own, and a warning says so.
    """
    found = {}
    for name, weight, hand in (("task", 0.0, False), ("forgotten", WEIGHT, False), ("by hand", WEIGHT, True)):
        made = trainer(kind, routed(weight), tmp_path, hand=hand, gradient_accumulation_steps=accumulated)
        tensors = made.model.state_dict().items()  # without the copy that DPO and KTO take as their reference
        before = {key: value.clone() for key, value in tensors if ".ref." not in key}
        callback, recorder = Gradients(), Recorder(made.model)
        made.add_callback(callback)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made.train()
        told = any("auxiliary losses have no effect" in str(one.message) for one in caught)
        assert told == (name == "forgotten")
        assert len(recorder.calls) == accumulated
        found[name] = callback.found
    assert largest_difference(found["forgotten"], found["task"]) == 0
    expected = {
        key: found["task"][key] + WEIGHT * value for key, value in balance_gradients(before, recorder.calls).items()
    }
    assert largest_difference(found["by hand"], expected) < 1e-4
    routers = {key for key in expected if "router" in key}
    assert routers and all(largest_of(found["by hand"][key] - found["task"][key]) > 1e-3 for key in routers)
    after = made.model.state_dict()
    assert all(largest_of(after[key] - before[key]) > 1e-4 for key in routers)


@pytest.mark.parametrize("method", ["lora", "static", "sample", "token"])
@pytest.mark.parametrize("kind", list(TRAINERS))
def test_trainers_train_and_save(kind: str, method: str, tmp_path: Path) -> None:
    """SFT, DPO, KTO, GRPO, RLOO and Reward trainers, two steps each: every tensor of the adapter changes, the base
    model does not, and the saved adapter gives the same logits on a fresh base model.
    """
    config = adapters("SEQ_CLS" if kind == "reward" else "CAUSAL_LM")[method]
    made = trainer(kind, config, tmp_path / "out", steps=2)
    before = {name: value.clone() for name, value in made.model.named_parameters()}
    learned = {name for name, value in made.model.named_parameters() if value.requires_grad}
    made.train()
    moved = {name for name, value in made.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == learned
    made.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(base_of(kind), tmp_path / "adapter").eval()
    ids = torch.tensor([[9, 12, 31, 8, 40]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, made.model.eval()(input_ids=ids).logits)


def largest_of(values: Tensor) -> float:
    return float(values.abs().max())
