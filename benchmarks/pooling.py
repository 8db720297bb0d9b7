# SPDX-License-Identifier: Apache-2.0
"""Reading a BERT-like classifier by the mean of its tokens, as sentence encoders such as MiniLM were trained to be."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def pool_by_mean(model: PreTrainedModel) -> PreTrainedModel:
    """Let the classifier of a BERT-like model read the mean over the real tokens instead of its pooler's output.

    The pooler of a sentence encoder was never trained, and its first token is not a summary. The model itself stays as
    it is; the mean takes the pooler's place in a forward hook on its encoder.
    """
    model.base_model.register_forward_hook(_mean_over_tokens, with_kwargs=True)
    for name, parameter in model.base_model.named_parameters():
        if name.startswith("pooler."):
            parameter.requires_grad = False  # nothing reads it any more
    return model


def _mean_over_tokens(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    states, mask = output.last_hidden_state, kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones(states.shape[:2], device=states.device)
    # Prefix tuning's mask begins with its prefixes, which have no output.
    mask = mask[:, -states.shape[1] :, None].to(states.dtype)
    output.pooler_output = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
    return output
