# SPDX-License-Identifier: Apache-2.0
"""Exact figures of a model: FLOPs, bytes kept for the backward pass, parameters, bytes on disk, graphs when compiled.

Nothing is computed. FLOPs are counted on the meta device. Bytes are counted on fake tensors, which have storages, too,
and on which torch chooses the kernels that it would choose on a CPU. Both are counted at two small depths: each
further block adds the same, which makes full depth a matter of arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch._dynamo
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Batch = dict[str, Tensor]
DTYPES = {torch.float32: "F32", torch.int64: "I64"}


@contextmanager
def fake(*models: nn.Module) -> Iterator[None]:
    """While open, the models and all new tensors are fake ones on the CPU; the models stay fake afterwards."""
    made: dict[Tensor, Tensor] = {}  # tensors that several modules hold stay one

    def stand_in(tensor: Tensor) -> Tensor:
        if tensor not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter, trained = isinstance(tensor, nn.Parameter), tensor.requires_grad
            made[tensor] = nn.Parameter(empty, trained) if is_parameter else empty
        return made[tensor]

    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (module for model in models for module in model.modules()):
            held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in held:
                setattr(module, name, stand_in(tensor))
        yield


def at_depth(depth: int, ends: int, count: Callable[[int], dict[str, int]]) -> dict[str, int]:
    """Counts at full depth, from those of the `ends` blocks that differ from the others, and of one block more."""
    few, more = count(ends), count(ends + 1)
    return {name: found + (depth - ends) * (more[name] - found) for name, found in few.items()}


def counted(run: Callable[[], object]) -> int:
    """FLOPs of what `run` does."""
    # Counters of several torch versions do not know the fused kernel for CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def forward_flops(model: nn.Module, inputs: Batch) -> int:
    """FLOPs of one forward in evaluation."""
    trained = [parameter for parameter in model.eval().parameters() if parameter.requires_grad]
    for parameter in trained:
        # no_grad alone does not do: views of a parameter still ask for gradients there, on which the counter fails.
        parameter.requires_grad_(False)
    with torch.no_grad():
        found = counted(lambda: model(**inputs))
    for parameter in trained:
        parameter.requires_grad_(True)
    return found


def train_flops(model: nn.Module, inputs: Batch) -> int:
    """FLOPs of one training step but the optimiser's; of a forward where nothing is trained."""

    def step() -> None:
        loss = model(**inputs).loss
        if loss.requires_grad:
            loss.backward()

    model.train()
    found = counted(step)
    model.zero_grad()
    return found


def saved_bytes(model: nn.Module, inputs: Batch, beside: Iterable[nn.Module] = ()) -> int:
    """Bytes that one training forward keeps for its backward pass, parameters aside; shared storage counts once.

    `beside` are models that it runs and that are no part of it.
    """
    model.train()
    own = {parameter.untyped_storage()._cdata for part in (model, *beside) for parameter in part.parameters()}
    seen: dict[int, int] = {}
    kept = []  # keeps storages alive, so that none is counted under the number of a freed one

    def pack(tensor: Tensor) -> None:
        # Nothing is handed back: a node that kept its own output would hold the whole graph in memory for good.
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
            kept.append(storage)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        loss = model(**inputs).loss
    del loss
    return sum(seen.values())


def active_parameters(model: nn.Module) -> int:
    """Trained parameters that take part in one sample's or token's forward: of routed experts, the chosen ones."""
    active = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            *_, kind, adapter, _ = ["", "", *name.rsplit(".", 3)]
            routed = kind.endswith("mept_prompts")
            chosen = model.peft_config[adapter].top_k if routed else 0
            active += parameter.numel() * chosen // len(parameter) if routed else parameter.numel()
    return active


def stored(model: nn.Module) -> dict[str, Tensor]:
    """What a file has to hold of a trained model: PEFT's state of the adapter, or else all that was trained."""
    if isinstance(model, PeftModel):
        return get_peft_model_state_dict(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def safetensors_bytes(tensors: dict[str, Tensor]) -> int:
    """Size of the file that holds these tensors, without writing it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-length // 8) * 8 + end


def graphs(model: nn.Module, inputs: Batch, modes: tuple[bool, ...] = (True,)) -> dict[str, int]:
    """Graph breaks, and graphs in all, of compiled forwards in these modes one after the other; True is training."""
    with torch.no_grad():
        model(**inputs)  # some of what a first forward sets up is guarded by a compiled one
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for train in modes:
        model.train(train)
        with torch.set_grad_enabled(train):
            compiled(**inputs)
    return {"graph_breaks": sum(counters["graph_break"].values()), "graphs": counter.frame_count}
