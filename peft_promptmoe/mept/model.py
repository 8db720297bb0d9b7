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
    """MEPT tuner: adds routed prompt experts to the attention layers of a model (arXiv 2509.00996).

    Args:
        model: the base model: a transformers model whose attention uses the `AttentionInterface` or is otherwise
            supported, or a vision transformer of timm.
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
        """Why a decoder cannot attend to the prompts of the last encoder block. None if it can, or there is none."""
        if not is_encoder_decoder(self.model):
            return None
        if config.routing == "token":
            return "routing='token' does not make one set of prompt tokens per sample, as routing='sample' does"
        return why_decoder_cannot_see(self.model, site)

    def initialize(self, config: MEPTConfig, adapter_name: str) -> None:
        if not config.init_weights or config.prompt_init == "random":
            return
        reader, length = text_reader(self.model), config.num_virtual_tokens
        reason = why_unread(self.model, reader, length)
        if reader is None and config.prompt_init == "auto":  # models of images and audio have no vocabulary
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
                # Rows that are real tokens also enter the block's residual stream, so their size matters.
                if config.start_scale == "unit" and not layer.as_tokens(adapter_name):
                    rows = at_unit_scale(layer.site, rows)
                layer.start_from(adapter_name, rows)

    def _say_why(self, config: MEPTConfig, reason: str) -> None:
        """Refuse, or warn, if prompts cannot be initialised with layer inputs of vocabulary tokens."""
        name = type(self.model).__name__
        if config.prompt_init == "sample_vocab":
            raise ValueError(
                f"prompt_init='sample_vocab' runs {name} on num_virtual_tokens vocabulary tokens, but {reason}. Set "
                "prompt_init='auto', which uses random rows where necessary, or prompt_init='random'."
            )
        warnings.warn(
            f"Prompts are usually initialised with the model's own layer inputs for vocabulary tokens. With {name} "
            f"they start at random, because {reason}. Random prompts can make a causal language model useless at "
            "first. Set prompt_init='random' to accept this without a warning.",
            stacklevel=2,
        )

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add an adapter that concatenates the static prompts of other adapters.

        A weight says how much the rows of an adapter count in attention: its logarithm is added to their scores. With
        all weights 1 the new adapter acts like all the adapters active together.

        Args:
            adapters: names of adapters with num_experts=1.
            weights: one weight per adapter, greater than 0.
            adapter_name: name of the new adapter. It is not activated.
            combination_type: "cat" is the only one.

        Raises:
            ValueError: the name is taken, or the adapters cannot be combined: they have routers, saved modules, or
                different lengths, positions or layers. The model is then unchanged.
        """
        if adapter_name in self.peft_config:
            raise ValueError(
                f"The model already has an adapter {adapter_name!r}. Delete it first, or choose another name."
            )
        if missing := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"The model has no adapter {missing[0]!r}. It has {sorted(self.peft_config)}.")
        configs: dict[str, Any] = {name: self.peft_config[name] for name in adapters}
        self.peft_config[adapter_name] = combined_config(self.model, configs, weights, combination_type)
        self.inject_adapter(self.model, adapter_name)
        for layer in layers_of(self.model, adapter_name):
            layer.start_from(adapter_name, torch.cat([layer.static_tables(name) for name in configs]))

    def check_site(self, config: MEPTConfig, site: Site) -> None:
        if config.decoder_sees_prompts and (reason := self._why_decoder_cannot_see(config, site)):
            raise ValueError(
                f"decoder_sees_prompts=True is not possible: {reason}. Set decoder_sees_prompts=False, or leave it "
                "'auto'."
            )
        if config.prompt_positions == "prefix" and not can_stand_before(site):
            raise ValueError(no_angles(site))
        if config.routing == "token" and config.num_experts > 1 and not site.is_called:
            check_chosen(site.attention)
