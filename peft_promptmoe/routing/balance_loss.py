# SPDX-License-Identifier: Apache-2.0
"""The load-balance loss of a router."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BALANCE = "balance"  # name of the load-balance loss among the auxiliary losses


def balance_loss(logits: Tensor, index: Tensor, real: Tensor | None) -> Tensor:
    """Load-balance loss of one router, E * sum_e f_e * p_e (Switch Transformer, arXiv 2101.03961, section 2.2).

    `f_e` is the fraction of choices that went to expert e, `p_e` its mean probability. The loss is 1 at perfect
    balance and E if one expert gets everything. Padding does not count.

    Args:
        logits: (N..., E) router logits.
        index: (N..., K) chosen experts.
        real: (N...) which entries count. None: all.
    """
    probs = torch.softmax(logits, dim=-1).flatten(0, -2)
    chosen = F.one_hot(index, logits.shape[-1]).to(probs.dtype).mean(dim=-2).flatten(0, -2)
    if real is not None:
        weight = real.flatten().to(probs.dtype)[:, None]
        count = weight.sum().clamp(min=1.0)
        probs, chosen = probs * weight / count * probs.shape[0], chosen * weight / count * probs.shape[0]
    return logits.shape[-1] * (chosen.mean(dim=0) * probs.mean(dim=0)).sum()
