# SPDX-License-Identifier: Apache-2.0
"""Modules that hold an adapter's trained tensors, for one layer or shared by all layers of a method."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

PROMPT_CHILD = "promptmoe"


class PromptTable(nn.Module):
    """A module with one trained tensor. Call the module to get the tensor.

    Tools that shard or offload modules (FSDP, DeepSpeed, accelerate) only have the tensor available during a call.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Any:
        return kept(self.weight)


class AffineTable(PromptTable):
    """A module with a trained weight and its bias."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(weight)
        self.bias = nn.Parameter(bias)

    def forward(self) -> tuple[Tensor, Tensor]:
        return kept(self.weight), kept(self.bias)


class TensorGroup(nn.Module):
    """A module with several trained tensors by name, such as those of a dispatcher or a denoiser."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self) -> dict[str, Tensor]:
        return {name: kept(getattr(self, name)) for name in self._names}


def kept(tensor: Tensor) -> Tensor:
    """A module's tensor in a form that is still valid after the module's forward pass.

    FSDP1 replaces a parameter by a view of gathered memory, and frees this memory after the forward pass.
    """
    return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()


def put_away(matrix: Tensor) -> bool:
    """Whether a matrix is not completely in memory now, because a tool shards parameters.

    FSDP2 leaves a DTensor in its place. FSDP1 leaves a flat part, or a view of freed memory (see `kept`).
    """
    if isinstance(matrix, nn.Parameter):
        return hasattr(matrix, "full_tensor") or matrix.ndim != 2
    return matrix.untyped_storage().size() == 0


class AdapterState(nn.Module, BaseTunerLayer):
    """Base of the modules that hold the tensors of adapters next to a frozen layer of the base model."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ("prompt_config",)
    # (container, name) of a tensor that a checkpoint may lack if it has the container's other tensors, or empty.
    dispensable: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.prompt_config: dict[str, Any] = {}

    @abstractmethod
    def get_base_layer(self) -> nn.Module:
        """The frozen layer. Its device is the device of the adapters' tensors."""

    def working_adapters(self) -> list[str]:
        """The active adapters that have tensors here. Empty while adapters are disabled."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.prompt_config]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing. PEFT calls this for all layers when an adapter of another method is merged.

        Merging adapters of this package is refused by `PromptTuner.merge_adapter`.
        """

    def unmerge(self) -> None:
        """Do nothing, like `merge`."""

    @abstractmethod
    def update_layer(self, adapter: str, config: Any) -> None:
        """Add an adapter: store its config in `prompt_config` and create its tensors, in float32 on the CPU."""

    def freeze_kept(self, adapter: str) -> None:
        """Freeze the tensors of an adapter that never train. Needed after loaders that create new parameters."""
        for name in self.other_param_names:
            held = getattr(self, name)
            if isinstance(held, nn.ModuleDict) and adapter in held:
                held[adapter].requires_grad_(False)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        own = {id(parameter) for parameter in self.parameters()}
        others = [parameter for parameter in base_layer.parameters() if id(parameter) not in own]
        # A quantised layer may have no floating-point parameter. The adapter then keeps its dtype.
        dtype = next((parameter.dtype for parameter in others if parameter.is_floating_point()), None)
        return (others[0].device if others else None), dtype


class SharedLayer(AdapterState):
    """State that all layers of a method share. The base model's `ModelHooks` owns it.

    Layers hold references to it that are not registered as submodules. So it is saved once, and stays shared in a deep
    copy.

    Args:
        anchor: a frozen layer of the base model.
        width: width D of the layers.
    """

    def __init__(self, anchor: nn.Module, width: int) -> None:
        super().__init__()
        self.width = width
        self._anchor = (anchor,)  # a tuple, so that it is not registered as a submodule

    def get_base_layer(self) -> nn.Module:
        return self._anchor[0]

    def join(self, layer: Any) -> None:
        """Register a prompt layer that uses this state. Called once for each adapter of the layer."""

    def close(self) -> None:
        """Undo what this shared layer changed in the base model. Called before it is removed."""

    def report(self, adapter: str) -> Any:
        """Report on the last forward pass, for `routing_report`. None: the report is made from the layers' records."""
        return None
