# SPDX-License-Identifier: Apache-2.0
"""Modules that hold trained tensors: one tensor, or what all layers of a method share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

PROMPT_CHILD = "promptmoe"


class PromptTable(nn.Module):
    """A trained tensor as a module of its own, which is what wrappers that shard or offload modules expect.

    They have the tensor at hand while the module is called, so it is read by calling.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Any:
        return kept(self.weight)


class AffineTable(PromptTable):
    """A trained weight and its bias."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(weight)
        self.bias = nn.Parameter(bias)

    def forward(self) -> tuple[Tensor, Tensor]:
        return kept(self.weight), kept(self.bias)


class TensorGroup(nn.Module):
    """Several trained tensors by name, such as those of a dispatcher or a denoiser."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self) -> dict[str, Tensor]:
        return {name: kept(getattr(self, name)) for name in self._names}


def kept(tensor: Tensor) -> Tensor:
    """A module's tensor as it may be read after the module's forward.

    In the place of a parameter FSDP1 puts a view of what it has gathered, and frees that when the forward is over.
    """
    return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()


def put_away(matrix: Tensor) -> bool:
    """Whether an engine that shards parameters has at most a part of a matrix at hand now.

    FSDP2 leaves a DTensor in its place, FSDP1 a flat part, or the view of freed memory that `kept` tells of.
    """
    if isinstance(matrix, nn.Parameter):
        return hasattr(matrix, "full_tensor") or matrix.ndim != 2
    return matrix.untyped_storage().size() == 0


class AdapterState(nn.Module, BaseTunerLayer):
    """A module that holds adapters' tensors beside a frozen layer of the base model."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ("prompt_config",)
    # The container and name of a tensor that a checkpoint may lack when it has the container's others; else empty.
    dispensable: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.prompt_config: dict[str, Any] = {}

    @abstractmethod
    def get_base_layer(self) -> nn.Module:
        """The frozen layer, which says on which device the tensors belong."""

    def working_adapters(self) -> list[str]:
        """Active adapters that have tensors here; none while adapters are disabled."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.prompt_config]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: PEFT's loop over all layers passes here when an adapter of another method is merged.

        `PromptTuner.merge_adapter` and its like refuse to merge adapters of this package.
        """

    def unmerge(self) -> None:
        """Do nothing, as `merge`."""

    @abstractmethod
    def update_layer(self, adapter: str, config: Any) -> None:
        """Add an adapter: keep its config in `prompt_config` and make its tensors, in float32 on the CPU."""

    def freeze_kept(self, adapter: str) -> None:
        """Freeze what an adapter has that never trains; loaders that make new parameters thaw it."""
        for name in self.other_param_names:
            held = getattr(self, name)
            if isinstance(held, nn.ModuleDict) and adapter in held:
                held[adapter].requires_grad_(False)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        own = {id(parameter) for parameter in self.parameters()}
        others = [parameter for parameter in base_layer.parameters() if id(parameter) not in own]
        # A quantised layer may have no floating parameter; then the adapter keeps the dtype it was made in.
        dtype = next((parameter.dtype for parameter in others if parameter.is_floating_point()), None)
        return (others[0].device if others else None), dtype


class SharedLayer(AdapterState):
    """State that all layers of a method share, owned once by the base model's `ModelHooks`.

    Layers hold references that are not registered, so that it is stored once and stays tied under a deep copy.

    Args:
        anchor: a frozen layer of the base model.
        width: D of the layers.
    """

    def __init__(self, anchor: nn.Module, width: int) -> None:
        super().__init__()
        self.width = width
        self._anchor = (anchor,)  # a tuple, so that it is no child

    def get_base_layer(self) -> nn.Module:
        return self._anchor[0]

    def join(self, layer: Any) -> None:
        """Hear of a prompt layer that shares; called once for each adapter of the layer."""

    def close(self) -> None:
        """Take away what the shared layer has changed on the base model, before it goes."""

    def report(self, adapter: str) -> Any:
        """What `routing_report` shows of the last forward; None where the layers' own records say it all."""
        return None
