# SPDX-License-Identifier: Apache-2.0
"""The load-balance term of a router."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BALANCE = "balance"  # the name of routers' terms among auxiliary losses


def balance_loss(logits: Tensor, index: Tensor, real: Tensor | None) -> Tensor:
    """Load-balance term of one router, E * sum_e f_e * p_e (Switch Transformer, arXiv 2101.03961, section 2.2).

    `f_e` is the fraction of choices that fell on expert e, `p_e` its mean probability. It is 1 at perfect balance
    and E when one expert gets everything. Tokens or samples that are not real count in neither.

    Args:
        logits: (N..., E).
        index: (N..., K) chosen experts.
        real: (N...) which entries count; None for all.
    """
    probs = torch.softmax(logits, dim=-1).flatten(0, -2)
    chosen = F.one_hot(index, logits.shape[-1]).to(probs.dtype).mean(dim=-2).flatten(0, -2)
    if real is not None:
        weight = real.flatten().to(probs.dtype)[:, None]
        count = weight.sum().clamp(min=1.0)
        probs, chosen = probs * weight / count * probs.shape[0], chosen * weight / count * probs.shape[0]
    return logits.shape[-1] * (chosen.mean(dim=0) * probs.mean(dim=0)).sum()
