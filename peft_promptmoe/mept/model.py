# SPDX-License-Identifier: Apache-2.0
"""The MEPT tuner."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..checks import refuse_task_type
from ..engine.kernels import check_chosen
from ..engine.model_hooks import prompt_layers
from ..engine.positions import can_stand_before, no_angles
from ..engine.token_form import why_decoder_cannot_see
from ..engine.vocabulary_start import at_unit_scale, vocabulary_inputs, why_unread
from ..models.reader import text_reader
from ..models.sites import Site
from ..models.targets import is_encoder_decoder
from ..tuner import PromptTuner
from .combine import combined_config, layers_of
from .config import MEPTConfig
from .layer import MEPTLayer, experts_to_start


class MEPTModel(PromptTuner):
    """Adds routed prompt experts to the attention layers of a transformers model (arXiv 2509.00996).

    Args:
        model: the base model, any transformers model whose attention goes through the `AttentionInterface`.
        config: a [`MEPTConfig`].
        adapter_name: name of the adapter.

    Example:

        ```py
        >>> import peft_promptmoe
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification

        >>> base = AutoModelForSequenceClassification.from_pretrained("google-bert/bert-base-uncased")
        >>> model = get_peft_model(base, peft_promptmoe.MEPTConfig(task_type="SEQ_CLS"))
        >>> model.print_trainable_parameters()
        ```
    """

    prefix = "mept_"
    method = "MEPT"
    tuner_layer_cls = MEPTLayer
    prompt_layer_cls = MEPTLayer

    def resolve(self, config: MEPTConfig, sites: list[Site]) -> None:
        reads_images_only = getattr(self.model, "main_input_name", "pixel_values") == "pixel_values"
        if reads_images_only and all(site.patches is not None for site in sites):
            refuse_task_type(config)
        if config.routing == "auto":
            config.routing = "token" if any(site.by_token for site in sites) else "sample"
            config._check_dead_settings()
        if config.prompt_positions == "auto":
            config.prompt_positions = "prefix" if all(map(can_stand_before, sites)) else "unrotated"
        if config.decoder_sees_prompts == "auto":
            config.decoder_sees_prompts = not any(self._why_decoder_cannot_see(config, site) for site in sites)

    def _why_decoder_cannot_see(self, config: MEPTConfig, site: Site) -> str | None:
        """Why the decoder, if there is one, cannot attend to the prompts of the last encoder block."""
        if not is_encoder_decoder(self.model):
            return None
        if config.routing == "token":
            return "with routing='token' there is no one set of prompt tokens per sample, as with routing='sample'"
        return why_decoder_cannot_see(self.model, site)

    def initialize(self, config: MEPTConfig, adapter_name: str) -> None:
        if not config.init_weights or config.prompt_init == "random":
            return
        reader, length = text_reader(self.model), config.num_virtual_tokens
        reason = why_unread(self.model, reader, length)
        if reader is None and config.prompt_init == "auto":  # images and sounds, which have no vocabulary
            return
        layers = [m for m in prompt_layers(self.model) if isinstance(m, MEPTLayer) and adapter_name in m.prompt_config]
        inputs: dict[str, Tensor] = {}
        if reader is not None and reason is None:
            number = experts_to_start(config)
            inputs, reason = vocabulary_inputs(self.model, reader, adapter_name, number, length)
            unheard = [layer.site.name for layer in layers if layer.site.name not in inputs]
            if unheard and reason is None:
                reason = f"text alone does not reach {len(unheard)} of the prompted layers, such as {unheard[0]!r}"
        if reason is not None:
            self._say_why(config, reason)
        for layer in layers:
            if layer.site.name in inputs:
                rows = inputs[layer.site.name]
                # Real tokens keep their size behind the norm, in the block's residual stream.
                if config.start_scale == "unit" and not layer.as_tokens(adapter_name):
                    rows = at_unit_scale(layer.site, rows)
                layer.start_from(adapter_name, rows)

    def _say_why(self, config: MEPTConfig, reason: str) -> None:
        """Refuse, or warn, where prompts cannot start as layer inputs on vocabulary tokens."""
        name = type(self.model).__name__
        if config.prompt_init == "sample_vocab":
            raise ValueError(
                f"prompt_init='sample_vocab' runs {name} on num_virtual_tokens vocabulary tokens, but {reason}. Set "
                "prompt_init='auto', which starts at random where it has to, or prompt_init='random'."
            )
        warnings.warn(
            f"Prompts usually start as a model's own layer inputs on vocabulary tokens. With {name} they start at "
            f"random, which can throw a causal language model off: {reason}. Set prompt_init='random' where this is "
            "meant.",
            stacklevel=2,
        )

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add an adapter that has the static prompts of others side by side.

        In attention the rows of each count as often as its weight says: the log of the weight is added to their
        scores. With weights of 1 it is what the adapters are when all of them are active.

        Args:
            adapters: names of adapters with num_experts=1.
            weights: of each, greater than 0.
            adapter_name: of the new adapter. It is not made active.
            combination_type: "cat", the one there is.

        Raises:
            ValueError: the name is taken, or one adapter cannot stand for these: they have routers, saved modules, or
                different lengths, positions or layers. The model is as it was.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already. Delete it first, or choose another name.")
        if missing := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"There is no adapter {missing[0]!r}; there are {sorted(self.peft_config)}.")
        configs: dict[str, Any] = {name: self.peft_config[name] for name in adapters}
        self.peft_config[adapter_name] = combined_config(self.model, configs, weights, combination_type)
        self.inject_adapter(self.model, adapter_name)
        for layer in layers_of(self.model, adapter_name):
            layer.start_from(adapter_name, torch.cat([layer.static_tables(name) for name in configs]))

    def check_site(self, config: MEPTConfig, site: Site) -> None:
        if config.decoder_sees_prompts and (reason := self._why_decoder_cannot_see(config, site)):
            raise ValueError(
                f"decoder_sees_prompts=True hands the decoder prompt tokens with the encoder's output: {reason}. Set "
                "decoder_sees_prompts=False."
            )
        if config.prompt_positions == "prefix" and not can_stand_before(site):
            raise ValueError(no_angles(site))
        if config.routing == "token" and config.num_experts > 1 and not site.is_called:
            check_chosen(site.attention)
