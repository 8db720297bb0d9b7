# SPDX-License-Identifier: Apache-2.0
"""Models that are traced by `torch.jit.trace`, as older ways of deployment do, give what the original gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, predict
from torch import Tensor, nn


class Logits(nn.Module):
    """A model of one tensor, as tracing asks for."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, given: Tensor) -> Any:
        return self.model(**{self.name: given}).logits


CASES = [
    Case("mept", "bert", "sample", "sdpa"),
    Case("mept", "bert", "token", "sdpa"),
    Case("mept", "llama", "token", "sdpa"),
    Case("mept", "gemma3", "token", "eager"),
    Case("mept", "vit", "token", "sdpa"),
    Case("vapt", "vit", "adaptive", "sdpa"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:FutureWarning")
def test_a_traced_model_gives_the_same_and_the_original_goes_on(case: Case) -> None:
    model = case.model(init_weights=False)
    model.get_base_model().config.use_cache = False  # a cache is no tensor that a traced model could put out
    name = next(iter(case.batch((6, 6))))
    batches = [{name: case.batch((6, 6), seed=seed)[name]} for seed in (1, 2)]
    expected = [predict(model, batch) for batch in batches]
    with torch.no_grad():
        traced = torch.jit.trace(Logits(model, name), batches[0][name], check_trace=False)
        for batch, logits in zip(batches, expected, strict=True):
            torch.testing.assert_close(traced(batch[name]), logits)
            torch.testing.assert_close(predict(model, batch), logits)
