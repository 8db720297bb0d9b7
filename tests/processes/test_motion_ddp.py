# SPDX-License-Identifier: Apache-2.0
"""A model of flow and depth on two processes: ranks agree, on a decoder's first scale too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from two_processes import on_two_processes

from peft_promptmoe import FlowModel, MotionModel

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "motion"))

from tiny_backbones import batch, depth_anything, dinov2

TARGETS = ["q_proj", "v_proj"]


def flow_step(rank_alone: int | None = None) -> dict[str, Any]:
    """Gradients of one step: of half of the batch on each rank, or of all of it on one process."""
    torch.manual_seed(0)
    base = FlowModel(dinov2(num_hidden_layers=4))  # no block behind the last level, 3
    config = LoraConfig(target_modules=TARGETS, modules_to_save=base.head_names, init_lora_weights=False)
    model = get_peft_model(base, config).train()
    inputs = batch("flow", size=(56, 56))
    if rank_alone is None:
        rank = torch.distributed.get_rank()
        inputs = {key: value[rank : rank + 1] for key, value in inputs.items()}
        wrapped: Any = DistributedDataParallel(model)  # no unused parameters: every trained tensor has a gradient
    else:
        wrapped = model
    wrapped(**inputs).loss.backward()
    return {path: p.grad for path, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_one_process_with_the_whole_batch() -> None:
    expected = flow_step(rank_alone=0)
    for found in on_two_processes(flow_step):
        assert found.keys() == expected.keys()
        for path, gradient in expected.items():
            assert torch.allclose(found[path], gradient, atol=1e-4), path


def joint_start() -> tuple[torch.Tensor, torch.Tensor]:
    """The scale after a first batch that is another one on each rank; on one, nothing of it is known."""
    torch.manual_seed(0)
    model = MotionModel(depth_anything()).train()
    inputs = batch("joint", size=(56, 56))
    if torch.distributed.get_rank():
        inputs["depth_labels"] = torch.zeros_like(inputs["depth_labels"])
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    wrapped(**inputs).loss.backward()
    return model.depth_scale.log_scale.detach(), model.depth_scale.log_scale.grad


def test_ranks_agree_on_the_first_scale_of_a_decoder() -> None:
    one, two = on_two_processes(joint_start)
    assert one[0] != 0 and torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
