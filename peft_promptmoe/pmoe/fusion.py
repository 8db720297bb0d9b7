# SPDX-License-Identifier: Apache-2.0
"""Adds the further experts' features to the base model's classifier."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.inspection import parameter_names
from .config import PMoEConfig
from .experts.features import encode, fit_pixels
from .shared import PMoEShared


class Fusion:
    """Hooks on the base model, to get its images, and on its classifier, to add the experts' features.

    Args:
        shared: the state that the experts share.
    """

    def __init__(self, shared: PMoEShared) -> None:
        self.shared = shared
        self._pixels: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def open(self) -> None:
        """Add the hooks on the base model and on its classifier."""
        model, head = self.shared.base()
        self._handles = [model.register_forward_hook(self._without_prompts)]
        if head is None:
            return
        module = model.get_submodule(head)
        self._handles += [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model, always_call=True),
            module.register_forward_pre_hook(self._before_head),
            module.register_forward_hook(self._after_head),
        ]

    def shut(self) -> None:
        """Remove the hooks. PEFT copies a classifier to train it, and would copy its hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def working_adapter(self) -> str | None:
        """The active adapter if it has further experts, else None. Layers refuse several active adapters."""
        working = [name for name in self.shared.working_adapters() if self.shared.members[name]]
        return working[0] if working else None

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.working_adapter() is not None:
            self._pixels[caller()] = args[0] if args else kwargs[parameter_names(model)[0]]

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._pixels.pop(caller(), None)

    def _without_prompts(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Remove the prompts from the first of transformers' hidden states, the input of the first block."""
        adapter = next(iter(self.shared.working_adapters()), None)
        first = self.shared.find(None, 0)
        if adapter is None or first is None or adapter not in first.prompt_config:
            return None
        prompts = self.shared.prompt_config[adapter].num_virtual_tokens
        start = self.shared.patches(None).prefix

        def narrow(states: Any) -> Any:
            """Change hidden states only: tuples whose first item has more tokens than the others."""
            if not isinstance(states, (tuple, list)) or len(states) < 2 or not all(map(_is_tokens, states[:2])):
                return states
            if states[0].shape[1] != states[1].shape[1] + prompts:
                return states
            kept = torch.cat([states[0][:, :start], states[0][:, start + prompts :]], dim=1)
            return type(states)([kept, *states[1:]])

        if isinstance(output, tuple):
            return tuple(narrow(part) for part in output)
        if getattr(output, "hidden_states", None) is not None:
            output["hidden_states"] = narrow(output.hidden_states)
        return output

    def _seen(self) -> Tensor:
        pixels = self._pixels.get(caller())
        if pixels is None:
            raise RuntimeError(
                "The classifier was called outside a forward pass of the model, so the further experts have no image. "
                "Call the whole model, or disable the adapter."
            )
        return pixels

    def _before_head(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        adapter = self.working_adapter()
        if adapter is None or self.shared.prompt_config[adapter].fusion != "mean":
            return None
        features = [args[0], *(feature for feature, _ in expert_features(self.shared, adapter, self._seen()))]
        return (torch.stack([feature.to(args[0].dtype) for feature in features]).mean(dim=0), *args[1:])

    def _after_head(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        adapter = self.working_adapter()
        if adapter is None or self.shared.prompt_config[adapter].fusion == "mean":
            return None
        features = [feature for feature, _ in expert_features(self.shared, adapter, self._seen())]
        weight = self.shared.pmoe_fusion[adapter]()
        maps = weight.split([feature.shape[-1] for feature in features], dim=1)
        read = [F.linear(feature.to(part.dtype), part) for feature, part in zip(features, maps, strict=True)]
        parts = torch.stack([output.to(weight.dtype), *read])
        logits = parts.sum(dim=0)
        if self.shared.training:
            self.shared.last_decision.pop(adapter, None)
        else:
            chosen = logits.detach().argmax(dim=-1)
            self.shared.last_decision[adapter] = parts.detach().take_along_dim(chosen[None, :, None], dim=2)[..., 0].T
        if self.shared.prompt_config[adapter].fusion == "logits":
            logits = logits / len(parts)
        return logits.to(output.dtype)


def expert_features(shared: PMoEShared, adapter: str, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Feature (B, D_k) and patch tokens (B, N_k, D_k) of each further expert.

    Args:
        shared: the state that the experts share.
        adapter: name of the adapter.
        pixels: (B, channels, rows, columns) images as the base model gets them.
    """
    config: PMoEConfig = shared.prompt_config[adapter]
    incoming = _normalisation(config.image_mean, config.image_std)
    found = []
    for key, record in zip(shared.members[adapter], shared.records[adapter], strict=True):
        expert, patches = shared.experts[key], shared.patches(key)
        weight = patches.embedding.weight
        size = None if record.size is None else (record.size[0], record.size[1])
        fitted = fit_pixels(pixels, incoming, _normalisation(record.mean, record.std), size).to(weight.device)
        fitted = fitted.to(weight.dtype) if weight.is_floating_point() else fitted
        if torch.is_grad_enabled() and checkpoints(shared.base()[0]):
            pair = checkpoint(encode, expert.module, patches, fitted, use_reentrant=False)
        else:
            pair = encode(expert.module, patches, fitted)
        found.append((pair[0].to(pixels.device), pair[1].to(pixels.device)))
    return found


def _is_tokens(state: Any) -> bool:
    return isinstance(state, Tensor) and state.ndim == 3


def caller() -> int:
    """Id of the calling thread: forward passes in several threads must not see each other's images."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def checkpoints(model: Any) -> bool:
    """Whether the model uses gradient checkpointing. Its further experts then use it, too."""
    return model.training and any(
        getattr(module, "gradient_checkpointing", False) or getattr(module, "grad_checkpointing", False)
        for module in model.modules()
    )


def _normalisation(mean: list[float] | None, std: list[float] | None) -> tuple[list[float], list[float]] | None:
    return None if mean is None or std is None else (mean, std)
