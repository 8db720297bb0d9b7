# SPDX-License-Identifier: Apache-2.0
"""A model around one of transformers' backbones, as people write them: maps of some blocks, and a head on them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedModel, UperNetConfig
from transformers.modeling_outputs import SemanticSegmenterOutput


class BackboneForDenseLabels(PreTrainedModel):
    """A class for every pixel, by one linear layer over the maps."""

    config_class = UperNetConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Dinov2Layer"]  # noqa: RUF012  as transformers has it

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        self.classifier = nn.Conv2d(sum(self.backbone.channels), config.num_labels, 1)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool | None = None
    ) -> SemanticSegmenterOutput:
        found = self.backbone(pixel_values, output_hidden_states=bool(output_hidden_states))
        logits = self.classifier(torch.cat(found.feature_maps, dim=1))
        logits = F.interpolate(logits, size=pixel_values.shape[-2:], mode="bilinear", align_corners=False)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SemanticSegmenterOutput(loss=loss, logits=logits, hidden_states=found.hidden_states)
