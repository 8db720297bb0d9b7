# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed: two processes train as one does that has both batches, with nothing of the model whole on either."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from small import VOCABULARY, adapted, adapters, fill, llama, vit
from two_processes import on_two_processes

CLIENT = "deepspeed"
STEPS, RATE = 3, 0.05


def settings(stage: int) -> dict[str, Any]:
    """Everything is sharded, however small."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    own = {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}  # which is 1 where nothing is said
    return {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, **own}


def batch(task: str | None, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    if task is None:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    ids = torch.randint(8, VOCABULARY, (2, 8), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(7)  # of what is drawn: the router's noise, dropout
    output = model(**inputs)
    loss: torch.Tensor = output.loss if "labels" in inputs else output.logits.square().mean()
    return loss


def reference(model: Any, task: str | None) -> list[float]:
    """Plain SGD on the mean of both ranks' gradients."""
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, RATE), []
    for step in range(STEPS):
        loss = loss_of(model, batch(task, step))
        loss.backward()
        for value in trained:
            value.grad = torch.zeros_like(value) if value.grad is None else value.grad
            dist.all_reduce(value.grad)
            value.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def sharded(model: Any, task: str | None, stage: int) -> list[float]:
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage))
    losses = []
    for step in range(STEPS):
        loss = loss_of(engine, batch(task, step))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def compare(task: str | None, kind: str, stage: int) -> dict[str, Any]:
    """Losses of one process's reference and of the engine, and how much of the model this process holds."""
    deepspeed.init_distributed(dist_backend="gloo")
    make = vit if task is None else llama
    models = [adapted(make(), adapters(task)[kind]).train() for _ in range(2)]
    for model in models:
        fill(model)
    found = {"expected": reference(models[0], task), "found": sharded(models[1], task, stage)}
    return found | {"held": sum(value.numel() for value in models[1].parameters())}


@pytest.mark.parametrize("stage", [2, 3], ids=["zero2", "zero3"])
@pytest.mark.parametrize(("task", "kind"), [("CAUSAL_LM", "token"), ("CAUSAL_LM", "static"), (None, "vapt")])
def test_losses_are_those_of_one_process(task: str | None, kind: str, stage: int) -> None:
    """ZeRO-2 and ZeRO-3 on two processes: the losses of three steps equal those of plain SGD on the mean gradient."""
    for rank in on_two_processes(compare, task, kind, stage):
        assert rank["found"] == pytest.approx(rank["expected"], rel=1e-4)
        assert len(set(rank["expected"])) == STEPS
        assert (rank["held"] == 0) == (stage == 3)
