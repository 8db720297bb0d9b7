# SPDX-License-Identifier: Apache-2.0
"""What a long life brings: adapters that come and go by the thousand, hundreds of steps, routers that collapse."""

from __future__ import annotations

import gc
import math
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import PROMPT_CHILD, Batch, Case, each_case, fit, one_per_architecture
from experts import expert
from peft import get_peft_model
from test_switching import census
from torch import nn
from transformers import Dinov2Model, Trainer, TrainingArguments

from peft_promptmoe import RoutingCallback

# -- adapters that come and go ----------------------------------------------------------------------------------------

OFTEN = [
    Case("mept", "bert", "sample", "sdpa"),
    Case("vapt", "vit", "adaptive", "sdpa"),
    Case("pmoe", "vit", "dinov2", "sdpa"),
]
SELDOM = [
    Case("mept", "llama", "token", "sdpa"),
    Case("mept", "t5", "sample", "sdpa"),
    Case("vapt", "timm_vit", "adaptive", "sdpa"),
]
WARM = 10  # lives until all caches of torch and transformers are full


def live(case: Case, base: nn.Module, shared: list[nn.Module]) -> None:
    """One life of two adapters on a base model: attach, train, switch, train, delete, unload."""

    def config(**settings: Any) -> Any:
        return case.config(**settings, **({"experts": shared} if shared else {}))

    batch = fit(base, case.batch())
    model = get_peft_model(base, config()).train()
    model.add_adapter("other", config(**case.method.other))
    for adapter in ("default", "other", "default"):
        model.set_adapter(adapter)
        model(**batch).loss.backward()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), model.disable_adapter():
        model(**batch)
    model.delete_adapter("other")
    model.unload()
    base.requires_grad_(True)


def held() -> tuple[Counter[str], int]:
    """Objects alive by type, and the bytes of all tensors among them."""
    gc.collect()
    alive = gc.get_objects()
    size = sum(o.numel() * o.element_size() for o in alive if isinstance(o, torch.Tensor))
    return Counter(type(o).__name__ for o in alive), size


def check_lives(case: Case, cycles: int) -> None:
    """Many lives on one base model leave no object, no tensor and no hook behind."""
    base = case.base()
    shared: list[nn.Module] = [Dinov2Model.from_pretrained(expert("dinov2"))] if case.method_name == "pmoe" else []
    live(case, base, shared)
    before = census(base), [census(module) for module in shared]
    for _ in range(WARM):
        live(case, base, shared)
    held()  # looking at an object may itself make some, once
    objects, size = held()
    for _ in range(cycles):
        live(case, base, shared)
    later, later_size = held()
    assert (census(base), [census(module) for module in shared]) == before
    assert not [name for name, _ in base.named_modules() if PROMPT_CHILD in name]
    assert later_size == size, f"{later_size - size} bytes of tensors are left"
    more = {name: later[name] - objects[name] for name in later if later[name] - objects[name] >= cycles // 2}
    assert not more, f"objects are left of every life: {more}"


@pytest.mark.parametrize("case", [*OFTEN, *(pytest.param(case, marks=pytest.mark.slow) for case in SELDOM)], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_fifty_lives_leave_nothing(case: Case) -> None:
    check_lives(case, 50 - WARM)


@pytest.mark.slow
@pytest.mark.parametrize("case", OFTEN, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_a_thousand_lives_in_the_same_memory(case: Case) -> None:
    check_lives(case, 900)
    tracemalloc.start()
    check_lives(case, 10)
    gc.collect()
    first = tracemalloc.get_traced_memory()[0]
    check_lives(case, 50)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    assert grown < 50_000, f"{grown} bytes are left of fifty lives"


# -- hundreds of steps ------------------------------------------------------------------------------------------------


def check_steps(case: Case, steps: int) -> list[float]:
    """Losses of training under bfloat16 autocast, which stays finite and leaves the adapter in float32."""
    settings = case.method.noisy | ({case.method.balance: 0.1} if case.method.balance and case.reads_text else {})
    model = case.model(**settings).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**case.batch(seed=step % 4)).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained), f"step {step}"
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(map(math.isfinite, losses))
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in trained)
    return losses


@each_case(one_per_architecture)
def test_ten_steps_in_bfloat16(case: Case) -> None:
    check_steps(case, 10)


@pytest.mark.slow
@each_case()
def test_two_hundred_steps_in_bfloat16(case: Case) -> None:
    losses = check_steps(case, 200)
    assert sum(losses[-20:]) < 0.97 * sum(losses[:20])


# -- routers that collapse --------------------------------------------------------------------------------------------


def one_domain(count: int) -> list[Batch]:
    """Texts of one small vocabulary, labelled by their first token: nothing that experts could share out by itself."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(8, 20, (count, 8), generator=generator)
    return [{"input_ids": ids, "labels": ids[0] % 3} for ids in texts]


def train_routed(folder: Path, balance: float) -> tuple[list[dict[str, float]], list[str]]:
    """Log of a training with the stock Trainer, and the warnings of collapse."""
    case = Case("mept", "bert", "sample", "sdpa")
    model = case.model(top_k=1, balance_loss_weight=balance)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        max_steps=60,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=one_domain(256), callbacks=[RoutingCallback()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(warning.message) for warning in caught if "send nearly everything" in str(warning.message)]
    return [row for row in trainer.state.log_history if "loss" in row], told


def test_collapse_is_told_and_the_balance_loss_prevents_it(tmp_path: Path) -> None:
    log, told = train_routed(tmp_path, balance=0.0)
    assert log[-1]["routing/min_entropy"] < 0.1 and log[-1]["routing/max_load"] > 0.95
    assert len(told) == 1 and "balance_loss_weight" in told[0]
    balanced, silence = train_routed(tmp_path, balance=0.3)
    assert not silence
    assert min(row["routing/min_entropy"] for row in balanced) > 0.6
    assert balanced[-1]["loss"] < balanced[0]["loss"] - 0.1 and log[-1]["loss"] < log[0]["loss"] - 0.1
