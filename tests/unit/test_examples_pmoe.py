# SPDX-License-Identifier: Apache-2.0
"""The examples of pMoE, on stand-ins for the packaged images: what is on a picture, what is kept apart, a full run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "advanced"))

import assets
import digits_on_photos
import disparity
import several_experts
import small_experts

KINDS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft asks transformers by an old name


def images(number: int, mode: str, step: int) -> datasets.Dataset:
    """Pictures of one shade each, by which they and their labels can be told."""
    rows = []
    for i in range(number):
        label = i % 10
        shade = step * label if mode == "L" else (step * label, i % 256, i // 256)
        rows.append({"image": Image.new(mode, (28, 28), shade), "label": label})
    names = KINDS if mode == "RGB" else [str(digit) for digit in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_list(rows, features=features)


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder; photos and digits are few, and of one shade."""
    photos, digits = images(100, "RGB", 20), images(80, "L", 25)
    monkeypatch.setenv("PEFT_PROMPTMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(assets, "cifar10", lambda train, dev: assets.vtab_splits(photos, train, dev))
    monkeypatch.setattr(assets, "mnist", lambda train, dev: assets.vtab_splits(digits, train, dev))
    monkeypatch.setattr(digits_on_photos, "PHOTOS", {"train": 20, "dev": 10, "test": 30})
    monkeypatch.setattr(digits_on_photos, "NUMERALS", {"train": 20, "dev": 10, "test": 20})
    monkeypatch.setattr(small_experts, "HELD_OUT", 16)
    return tmp_path / "cache"


@pytest.mark.parametrize("part", [digits_on_photos.photos, digits_on_photos.numerals], ids=["photos", "digits"])
def test_no_image_is_in_two_splits_or_with_the_experts(
    stand_ins: Path, part: Callable[[str], datasets.Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered = datasets.Dataset.from_dict({"label": list(range(100))})
    monkeypatch.setattr(assets, "cifar10", lambda train, dev: {"test": numbered})
    monkeypatch.setattr(assets, "mnist", lambda train, dev: {"test": numbered})
    found = [list(part(name)["label"]) for name in ("train", "dev", "test", "experts")]
    assert sorted(number for split in found for number in split) == list(range(100)) and all(found)


def test_labels_say_which_digit_is_on_what(stand_ins: Path) -> None:
    splits = digits_on_photos.splits()
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "dev": 10, "test": 30}
    for row in splits["test"]:
        pixels = np.asarray(row["pixel_values"])
        assert pixels.shape == (98, 98, 3)
        digit, kind = round(pixels[70, 70, 0] / 25), KINDS[pixels[0, 0, 0] // 20]  # the plate is never elsewhere
        name = splits["test"].features["label"].int2str(row["label"])
        assert name == f"{digit} on {'an animal' if kind in digits_on_photos.ANIMALS else 'a vehicle'}"


def test_splits_are_made_once_and_cut_on_demand(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = digits_on_photos.splits()
    monkeypatch.setattr(digits_on_photos, "compose", None)
    again = digits_on_photos.splits(train=5, test=7)
    assert [len(again[name]) for name in ("train", "dev", "test")] == [5, 10, 7]
    assert again["test"][3]["pixel_values"].tobytes() == first["test"][3]["pixel_values"].tobytes()


def test_experts_learn_and_load_as_timm_models(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[torch.nn.Module] = []
    fit = small_experts.fit
    monkeypatch.setattr(
        small_experts, "fit", lambda model, data, epochs: (trained.append(model), fit(model, data, 40, batch_size=8))
    )
    data = small_experts.photo_images()
    folder = small_experts.photos_expert()
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert loaded.pretrained_cfg["input_size"] == (3, 56, 56)
    assert tuple(loaded.pretrained_cfg["mean"]) == tuple(loaded.pretrained_cfg["std"]) == (0.5, 0.5, 0.5)
    pixels = small_experts.normalized(data[0][:4])
    with torch.no_grad():
        assert torch.equal(loaded(pixels), trained[0].eval()(pixels))
    assert small_experts.accuracy(loaded, data) > 0.5
    assert small_experts.photos_expert() == folder and len(trained) == 1


def test_several_experts_train_save_and_answer_from_a_fresh_process(
    stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(small_experts, "fit", lambda *args: None)
    base = tmp_path / "dinov2"
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 98, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(base)
    BitImageProcessor(size={"shortest_edge": 98}, image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(base)
    monkeypatch.setattr(assets, "dinov2_small", lambda: str(base))
    output = tmp_path / "output"
    given = ["--epochs", "1", "--prompts", "2", "--pictures", "3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["several_experts.py", *given])
    several_experts.fine_tune(several_experts.parse_args())
    said = capfd.readouterr().out
    assert "Test split, 30 images, after training on 30" in said
    assert "to the predicted class's logit" in said
    assert sum(f"{output / 'images'}" in line for line in said.splitlines()) == 3
    assert (output / "dispatch.png").exists() and (output / "adapter" / "adapter_model.safetensors").exists()


class Truth(torch.nn.Module):
    """Knows the answer."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, maps: Tensor) -> Tensor:
        return self.answer


def test_disparity_is_tested_where_it_was_not_trained(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Processor:
        image_mean, image_std = [0.0] * 3, [1.0] * 3

    monkeypatch.setattr(disparity.AutoImageProcessor, "from_pretrained", lambda name: Processor)
    scene = disparity.Scene("any")
    rng = disparity.random.Random(0)
    assert all(scene.corner(rng)[1] + disparity.WINDOW <= scene.border for _ in range(200))
    corners = scene.test_corners()
    assert corners and all(left >= scene.border for _, left in corners)
    pixels, target, share = scene.windows(corners)
    assert pixels.shape[1:] == (3, disparity.WINDOW, disparity.WINDOW) and target.shape == share.shape
    monkeypatch.setattr(disparity, "patch_maps", lambda model, pixels: pixels)
    model = torch.nn.Identity()
    assert disparity.test(model, Truth(target), scene)[0] == 0.0
    # One spread off everywhere is off by the spread; what is not known counts nothing.
    wrong = torch.where(share > 0, target + 1.0, 1e6)
    assert disparity.test(model, Truth(wrong), scene)[0] == pytest.approx(scene.spread, rel=1e-4)
