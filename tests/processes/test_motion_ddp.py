# SPDX-License-Identifier: Apache-2.0
"""A model of flow and depth on two processes, with DDP and FSDP2: ranks agree, on a decoder's first scale too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_processes import on_two_processes

from peft_promptmoe import FlowModel, MotionModel

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "motion"))

from tiny_backbones import batch, depth_anything, dinov2

TARGETS = ["q_proj", "v_proj"]


def wrap(model: nn.Module, engine: str) -> nn.Module:
    if engine == "ddp":
        joint = "depth" in getattr(model, "tasks", ())  # without: every trained tensor has a gradient
        return DistributedDataParallel(model, find_unused_parameters=joint)
    mesh = init_device_mesh("cpu", (2,))
    for block in [module for module in model.modules() if type(module).__name__ == "Dinov2Layer"]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def flow_step(engine: str | None) -> dict[str, Any]:
    """Gradients of one step: of half of the batch on each rank, or of all of it on one process."""
    torch.manual_seed(0)
    base = FlowModel(dinov2(num_hidden_layers=4))  # no block behind the last level, 3
    config = LoraConfig(target_modules=TARGETS, modules_to_save=base.head_names, init_lora_weights=False)
    model = get_peft_model(base, config).train()
    inputs = batch("flow", size=(56, 56))
    wrapped: nn.Module = model
    if engine is not None:
        rank = torch.distributed.get_rank()
        inputs = {key: value[rank : rank + 1] for key, value in inputs.items()}
        wrapped = wrap(model, engine)
    wrapped(**inputs).loss.backward()
    return {path: full(p.grad) for path, p in model.named_parameters() if p.grad is not None}


def flow_steps() -> dict[str, dict[str, Any]]:
    return {engine: flow_step(engine) for engine in ("ddp", "fsdp2")}


def test_gradients_are_those_of_one_process_with_the_whole_batch() -> None:
    expected = flow_step(None)
    for rank in on_two_processes(flow_steps):
        for engine, found in rank.items():
            assert found.keys() == expected.keys()
            for path, gradient in expected.items():
                assert torch.allclose(found[path], gradient, atol=1e-4), f"{path} with {engine}"


def joint_start(engine: str) -> list[Tensor]:
    """The scale after a first batch that is another one on each rank, its gradient, and the scale after a second.

    On one rank nothing of the first batch is known.
    """
    torch.manual_seed(0)
    model = MotionModel(depth_anything()).train()
    inputs = batch("joint", size=(56, 56))
    second = {**inputs, "depth_labels": 2 * inputs["depth_labels"]}
    if torch.distributed.get_rank():
        inputs["depth_labels"] = torch.zeros_like(inputs["depth_labels"])
    wrapped = wrap(model, engine)
    wrapped(**inputs).loss.backward()
    found = [model.depth_scale.started.clone(), full(model.depth_scale.log_scale.grad).clone()]
    wrapped(**second).loss.backward()
    return [*found, model.depth_scale.started.clone()]


def joint_starts() -> dict[str, list[Tensor]]:
    return {engine: joint_start(engine) for engine in ("ddp", "fsdp2")}


def test_ranks_agree_on_the_first_scale_of_a_decoder() -> None:
    one, two = on_two_processes(joint_starts)
    for engine in one:
        start, gradient, later = one[engine]
        assert start not in (0, 1) and torch.equal(later, start)
        assert all(torch.equal(a, b) for a, b in zip(one[engine], two[engine], strict=True))
        assert gradient.abs() > 0
        assert torch.allclose(start, one["ddp"][0])
