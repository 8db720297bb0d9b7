# SPDX-License-Identifier: Apache-2.0
"""FSDP on two processes, which each hold half of every weight: the training of one process, or a refusal.

accelerate offers FSDP on accelerators only, so these are the calls of torch that it makes there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Batch, Case, assert_equal, predict
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from two_processes import on_two_processes

STEPS = 3
BERT, T5, LLAMA = (
    Case("mept", name, routing, "sdpa") for name, routing in (("bert", "sample"), ("t5", "sample"), ("llama", "token"))
)
T5_TOKEN = Case("mept", "t5", "token", "sdpa")
GPT2 = Case("mept", "gpt2", "token", "sdpa")
VIT, TIMM = (Case("vapt", name, "adaptive", "sdpa") for name in ("vit", "timm_vit"))
UNITS = Case("promotion", "dinov2_backbone", "units", "sdpa")
PMOE = Case("pmoe", "vit", "dinov2", "sdpa")


def blocks(case: Case, model: PeftModel) -> list[nn.Module]:
    """The blocks of the base model, as accelerate finds them."""
    names = {"Block"} if case.architecture.timm else set(model.get_base_model()._no_split_modules)
    found = [module for module in model.modules() if type(module).__name__ in names]
    assert len(found) >= 2
    return found


def wrap(case: Case, model: PeftModel, engine: str) -> nn.Module:
    if engine.startswith("fsdp2"):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in blocks(case, model) if engine == "fsdp2" else ():
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    original = engine == "fsdp1"
    kinds = {type(block) for block in blocks(case, model)}
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=kinds)
    # PEFT's policy makes a unit of every trained tensor, because such a unit trains whole or not at all.
    policy = policy if original else fsdp_auto_wrap_policy(model)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu")
    )


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors, gathered from both processes."""
    if not isinstance(model, FullyShardedDataParallel):
        return {name: full(p).clone() for name, p in model.named_parameters() if p.requires_grad}
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        named = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in model.named_parameters()}
        return {name: p.detach().clone() for name, p in named.items() if p.requires_grad}


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor().detach() if hasattr(tensor, "full_tensor") else tensor.detach()


def batches(case: Case, halved: bool) -> Iterator[Batch]:
    for seed in range(STEPS):
        batch = case.batch((8, 8, 8, 8), seed=seed)
        batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
        yield {name: x.chunk(2)[dist.get_rank()] for name, x in batch.items()} if halved else batch


def train(case: Case, engine: str | None, settings: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Mean losses and trained tensors; with an engine each process takes its half of the batch."""
    # In float64, where nothing but an error is as large as the bounds: prompts move by 25 times their gradient.
    model: nn.Module = case.model(**{name: value for name, value in settings.items() if name not in LOADED}).double()
    for name, tensor in model.state_dict().items() if LOADED.items() <= settings.items() else ():
        if "router_center" in name:  # as a file that was trained before has it
            tensor.copy_(torch.ones_like(tensor))
    if engine is not None:
        model = wrap(case, model, engine)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for batch in batches(case, halved=engine is not None):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    mean = torch.stack(losses)
    if engine is not None:
        dist.all_reduce(mean)
        mean /= 2
    return mean.tolist(), whole(model)


LOADED = {"has_loaded_centres": True}
EVERY = ("fsdp2", "fsdp1", "fsdp1-peft")
TRAINS = {
    BERT: EVERY,
    LLAMA: EVERY,
    VIT: EVERY,
    GPT2: ("fsdp2",),
    T5: ("fsdp2",),
    T5_TOKEN: ("fsdp2",),
    TIMM: ("fsdp2",),
    UNITS: ("fsdp2",),
}


def train_with_each(case: Case, engines: tuple[str, ...]) -> list[tuple[list[float], dict[str, Tensor]]]:
    return [train(case, engine, {}) for engine in engines]


@pytest.mark.parametrize("case", TRAINS, ids=str)
def test_two_processes_train_as_one(case: Case) -> None:
    losses, weights = train(case, None, {})
    start = case.model().state_dict()
    for rank in on_two_processes(train_with_each, case, TRAINS[case]):
        for engine, (found_losses, found) in zip(TRAINS[case], rank, strict=True):
            torch.testing.assert_close(found_losses, losses, rtol=1e-6, atol=1e-6)
            assert found.keys() == weights.keys()
            for name, weight in weights.items():
                difference, change = (float((weight - other[name]).abs().max()) for other in (found, start))
                assert difference <= 1e-6 < change, f"{name} differs by {difference:.3g} with {engine}"


# -- saving -----------------------------------------------------------------------------------------------------------


def save_sharded(case: Case, folder: Path) -> dict[str, Tensor]:
    """Save as accelerate does: gather on all, write on rank 0."""
    model = wrap(case, case.model(), "fsdp2")
    model(**case.batch())
    tensors = {name: full(tensor) for name, tensor in model.state_dict().items()}
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=tensors)
    return get_peft_model_state_dict(model, state_dict=tensors)


def train_sharded_banks(settings: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Banks as they would be saved after three steps, and as they are in evaluation."""
    model = wrap(UNITS, UNITS.model(**settings), "fsdp2").train()
    for batch in batches(UNITS, halved=True):
        model(**batch).loss.backward()
    saved = {name: full(t).clone() for name, t in model.state_dict().items() if "promotion_bank" in name}
    model.eval()
    return saved, {name: full(p).clone() for name, p in model.named_parameters() if "promotion_bank" in name}


def test_sharded_banks_move_as_those_of_one_process() -> None:
    alone = UNITS.model().train()
    for seed in range(STEPS):
        alone(**UNITS.batch((8, 8, 8, 8), seed=seed)).loss.backward()
    alone.eval()
    expected = {name: p.detach() for name, p in alone.named_parameters() if "promotion_bank" in name}
    ranks = on_two_processes(train_sharded_banks, {})
    for saved, kept in ranks:
        assert saved.keys() == kept.keys() == expected.keys()
        for name, bank in expected.items():
            torch.testing.assert_close(kept[name], bank, rtol=1e-5, atol=1e-5)
            assert_equal(saved[name], kept[name], name)
            assert_equal(kept[name], ranks[0][1][name], name)


@pytest.mark.parametrize("case", [BERT, VIT, UNITS], ids=str)
def test_a_sharded_model_saves_the_whole_adapter(case: Case, tmp_path: Path) -> None:
    on_two_processes(save_sharded, case, tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert_equal(predict(loaded, case.batch()), predict(case.model(), case.batch()), "logits of the saved adapter")


# -- what does not work -----------------------------------------------------------------------------------------------


REFUSED = {
    PMOE: [
        ("fsdp2", {}, "FSDP keeps those of"),
        ("fsdp2", {"carry_prompts": False}, "FSDP keeps those of"),
        ("fsdp1", {}, "FSDP keeps those of"),
    ],
    T5: [
        ("fsdp1", {}, "Shard this model with FSDP2"),
        ("fsdp1-peft", {}, "Shard this model with FSDP2"),
    ],
    BERT: [
        ("fsdp2", {"router_centering": True}, "set router_centering=False"),
        ("fsdp1", {"router_centering": True}, "set router_centering=False"),
        ("fsdp2", {"router_centering": True, **LOADED}, "set router_centering=False"),
        ("fsdp1", {"router_centering": True, **LOADED}, "set router_centering=False"),
    ],
    UNITS: [
        ("fsdp1", {}, "Shard with FSDP2"),
        ("fsdp2-one-unit", {}, "Shard each block"),
    ],
}


def fail_with_each(case: Case) -> list[str]:
    messages = []
    for engine, settings, _ in REFUSED[case]:
        with pytest.raises(RuntimeError) as caught:
            train(case, engine, settings)
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_other_blocks_read_cannot_be_put_away(case: Case) -> None:
    for rank in on_two_processes(fail_with_each, case):
        for message, (*_, expected) in zip(rank, REFUSED[case], strict=True):
            assert expected in message
