# SPDX-License-Identifier: Apache-2.0
"""ONNX: adapted models are exported, and onnxruntime computes what torch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from small import VOCABULARY, adapted, adapters, bert, fill, vit
from torch import Tensor, nn

CLIENT = "onnx"
CASES = [("SEQ_CLS", kind) for kind in adapters("SEQ_CLS")] + [(None, kind) for kind in adapters(None)]


class Logits(nn.Module):
    """By position, as exports want their inputs."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def inputs(task: str | None, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if task is None:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    ids = torch.randint(8, VOCABULARY, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[seed % 2, 5 + seed :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("task", "kind"), CASES, ids=[f"{'vit' if task is None else 'bert'}-{kind}" for task, kind in CASES]
)
def test_onnxruntime_gives_the_same_logits(task: str | None, kind: str, tmp_path: Path) -> None:
    """`torch.onnx.export(dynamo=True)`: logits of onnxruntime equal torch's to 1e-4, also for inputs and padding other
    than those of the export.
    """
    model = adapted(vit() if task is None else bert(), adapters(task)[kind]).eval()
    fill(model)
    traced = inputs(task, 0)
    wrapped, target = Logits(model, list(traced)), tmp_path / "model.onnx"
    settings = {"input_names": list(traced), "output_names": ["logits"], "dynamo": True}
    torch.onnx.export(wrapped, tuple(traced.values()), str(target), **settings)
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    other = inputs(task, 1)
    (found,) = session.run(None, {name: value.numpy() for name, value in other.items()})
    with torch.no_grad():
        expected, first = wrapped(*other.values()), wrapped(*traced.values())
    assert (expected - first).abs().max() > 1e-2
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
