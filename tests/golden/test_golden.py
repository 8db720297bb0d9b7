# SPDX-License-Identifier: Apache-2.0
"""Adapters saved by every version so far load in this one and give the outputs on record."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import goldens
import pytest
import torch
from goldens import GOLDENS, HERE, OUTPUTS, fill, numbers, record
from safetensors.torch import load_file

import peft_promptmoe

RECORDED = sorted(path for path in HERE.glob("*/*") if (path / OUTPUTS).exists())


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_an_adapter_on_record_loads_with_its_outputs(folder: Path) -> None:
    golden = GOLDENS[folder.name]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Unexpected keyword arguments.*")
        model = golden.load(folder)
    logits, expected = golden.outputs(model), load_file(folder / OUTPUTS)["logits"]
    assert logits.shape == expected.shape and expected.dtype == torch.float64
    assert (logits - expected).abs().max() <= 1e-6
    with torch.no_grad(), model.disable_adapter():
        assert (golden.outputs(model) - expected).abs().max() > 1e-2, "the prompts make no difference"


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_every_tensor_on_record_matters(folder: Path) -> None:
    """A version that ignored one of them would be noticed."""
    golden = GOLDENS[folder.name]
    model = golden.load(folder)
    expected = golden.outputs(model)
    loaded = {name: p for name, p in model.named_parameters() if "promptmoe" in name or ".modules_to_save." in name}
    assert loaded
    for name, parameter in loaded.items():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.5 * (1.0 + numbers(parameter.numel(), 77).view(parameter.shape)))
        assert (golden.outputs(model) - expected).abs().max() > 1e-5, name
        parameter.data.copy_(kept)


def test_all_methods_of_this_version_are_on_record() -> None:
    names = {path.name for path in RECORDED if path.parent.name == peft_promptmoe.__version__}
    assert names == GOLDENS.keys()
    kinds = {json.loads((path / "adapter_config.json").read_text())["peft_type"] for path in RECORDED}
    assert kinds == {"MEPT", "VAPT", "PMOE", "PROMOTION"}


def content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_record_is_small_and_names_no_place() -> None:
    for version in {path.parent for path in RECORDED}:
        files = content(version)
        assert sum(map(len, files.values())) < 400_000
        assert not [
            path for path, data in files.items() if path.suffix == ".json" and b"/" in data.replace(b"\\", b"")
        ]


def test_the_record_is_not_written_over() -> None:
    version = peft_promptmoe.__version__
    before = content(HERE / version)
    with pytest.raises(SystemExit, match="stays as it is"):
        record(version)
    assert content(HERE / version) == before


def test_the_recorder_writes_what_is_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the format stays what it is, today's recorder makes the same files."""
    monkeypatch.setattr(goldens, "HERE", tmp_path)
    record("again")
    recorded = HERE / peft_promptmoe.__version__
    for file in recorded.rglob("*.safetensors"):
        if file.name == OUTPUTS:
            continue
        found, expected = load_file(tmp_path / "again" / file.relative_to(recorded)), load_file(file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{file.relative_to(HERE)}: {name}"


def test_numbers_are_the_same_everywhere() -> None:
    assert numbers(4, 2).tolist() == [-0.3395, -0.9335, 0.504, -0.028]
    layer = fill(torch.nn.Linear(2, 1))
    assert layer.weight.dtype == torch.float32
