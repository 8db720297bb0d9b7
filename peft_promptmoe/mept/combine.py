# SPDX-License-Identifier: Apache-2.0
"""Combines several static prompts into one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..config import check_number
from ..engine.model_hooks import prompt_layers
from .config import MEPTConfig
from .layer import MEPTLayer


def layers_of(model: nn.Module, adapter: str) -> list[MEPTLayer]:
    """The layers in which an adapter has prompts."""
    return [m for m in prompt_layers(model) if isinstance(m, MEPTLayer) and adapter in m.prompt_config]


def combined_config(
    model: nn.Module, configs: dict[str, MEPTConfig], weights: Sequence[float], combination_type: str
) -> MEPTConfig:
    """Make the config of an adapter that concatenates the prompts of several adapters.

    Args:
        model: the model with the adapters.
        configs: configs of the adapters, by name.
        weights: one weight per adapter.
        combination_type: "cat".

    Raises:
        ValueError: the adapters cannot be combined.
    """
    if combination_type != "cat":
        raise ValueError(
            f"combination_type must be 'cat', got {combination_type!r}. Prompts can only be concatenated: their "
            "effect on attention is not linear in their rows."
        )
    if not configs or len(configs) != len(weights):
        raise ValueError(
            f"There are {len(configs)} different adapters and {len(weights)} weights. Pass one weight per adapter."
        )
    for weight in weights:
        check_number("weights", weight, 0.0, open_low=True)
    first, *others = configs.values()
    for name, config in configs.items():
        if config.num_experts > 1:
            raise ValueError(
                f"Adapter {name!r} has a router over {config.num_experts} experts, and routers cannot be combined. "
                "Combine static prompts (num_experts=1), or activate the adapters together with set_adapter."
            )
        if config.modules_to_save or config.trainable_token_indices:
            raise ValueError(
                f"Adapter {name!r} has saved modules or tokens, which cannot be combined. Use adapters without them."
            )
        if config.decoder_sees_prompts is True:
            raise ValueError(
                f"The decoder sees the prompts of {name!r} as tokens, which cannot be weighted. Use "
                "decoder_sees_prompts=False."
            )
    for setting in ("num_virtual_tokens", "prompt_positions"):
        if any(getattr(other, setting) != getattr(first, setting) for other in others):
            raise ValueError(
                f"The adapters have different values of {setting}, so they cannot be combined. Use adapters with the "
                "same."
            )
    found = [{layer.site.name for layer in layers_of(model, name)} for name in configs]
    if any(each != found[0] for each in found):
        raise ValueError(
            "The adapters have prompts in different layers, so they cannot be combined. Use adapters of the same "
            "layers."
        )
    counted: list[float] = []
    for (name, config), weight in zip(configs.items(), weights, strict=True):
        own = config.prompt_weights or [1.0] * len(layers_of(model, name)[0].static_tables(name))
        counted += [float(weight) * each for each in own]
    return replace(
        first,
        routing="token",
        num_shared_experts=len(counted) - 1,
        prompt_weights=None if all(weight == 1.0 for weight in counted) else counted,
        prompt_init="random",
        init_weights=True,
    )
