# SPDX-License-Identifier: Apache-2.0
"""Pairs that are made: their flow, occlusion and depth are exact. And the example that trains on them, end to end."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

EXAMPLES = Path(__file__).parents[3] / "examples" / "advanced"
sys.path.insert(0, str(EXAMPLES))

import motion_data  # noqa: E402
from moving_layers import GeneratedPairs, bilinear, make_layers, make_pair  # noqa: E402

SIZE = 64
each_mode = pytest.mark.parametrize("mode", ["chairs", "rigid", "stereo"])


def photo(seed: int, side: int = 96) -> np.ndarray[Any, Any]:
    """Smooth colours, so that resampling twice changes next to nothing."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side * 2 * np.pi
    waves = [np.sin(rng.integers(1, 4) * x + rng.integers(1, 4) * y + rng.uniform(0, 6)) for _ in range(3)]
    return (0.5 + 0.2 * np.stack(waves, axis=-1)).astype(np.float32)


PHOTOS = [photo(seed) for seed in range(4)]


def pair(seed: int, mode: str) -> dict[str, np.ndarray[Any, Any]]:
    return make_pair(np.random.default_rng(seed), PHOTOS, SIZE, mode, noise=0.0)


def inside(layer: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Pixels whose neighbours are of the same layer."""
    steps = np.abs(np.gradient(layer.astype(float)))
    return (steps[0] == 0) & (steps[1] == 0)


@each_mode
def test_the_second_frame_shows_at_the_flow_what_the_first_shows(mode: str) -> None:
    for seed in range(6):
        made = pair(seed, mode)
        y, x = np.mgrid[0:SIZE, 0:SIZE].astype(float)
        one = made["frames"][0] / 255
        ok = ~made["occluded"] & inside(made["layer"])
        target = x + made["flow"][0], y + made["flow"][1]
        moved = bilinear(made["frames"][1] / 255, *target)
        errors = []
        for frame in (moved, made["frames"][1] / 255):
            # each frame has its own gain and offset
            known = np.stack([frame[ok].ravel(), np.ones(3 * ok.sum())], axis=1)
            fitted = known @ np.linalg.lstsq(known, one[ok].ravel(), rcond=None)[0]
            errors.append(np.abs(fitted - one[ok].ravel()).mean())
        assert errors[0] < 0.01 and errors[0] < 0.4 * errors[1], (seed, errors)


@each_mode
def test_what_is_hidden_is_marked(mode: str) -> None:
    """A point is hidden where another layer is on top of the place it moves to, or that is outside of the frame."""
    for seed in range(4):
        made = pair(seed, mode)
        layers = make_layers(np.random.default_rng(seed), PHOTOS, SIZE, mode, reach=14.0)
        for y, x in np.random.default_rng(9).integers(0, SIZE, (200, 2)).tolist():
            number = int(made["layer"][y, x])
            u, v = layers[number].forward(np.array(float(x)), np.array(float(y)))
            assert made["flow"][:, y, x] == pytest.approx([float(u) - x, float(v) - y], abs=1e-4)
            out = not (0 <= u <= SIZE - 1 and 0 <= v <= SIZE - 1)
            covered = any(float(layer.opacity(*layer.backward(u, v))) > 0.5 for layer in layers[number + 1 :])
            assert bool(made["occluded"][y, x]) == (out or covered)


def test_flow_is_depth_times_one_motion_where_the_camera_moves() -> None:
    for seed in range(6):
        stereo, rigid = pair(seed, "stereo"), pair(seed, "rigid")
        assert (stereo["flow"][1] == 0).all() and (stereo["flow"][0] < 0).all()
        for made, axes in ((stereo, [0]), (rigid, [0, 1])):
            for axis in axes:
                ratio = made["flow"][axis] / made["inverse_depth"]
                assert ratio.std() < 1e-4 * max(abs(ratio.mean()), 1e-3)


@each_mode
def test_nearer_layers_are_in_front(mode: str) -> None:
    for seed in range(6):
        layers = make_layers(np.random.default_rng(seed), PHOTOS, SIZE, mode, reach=14.0)
        y, x = np.mgrid[0:SIZE, 0:SIZE].astype(float)
        depths = [layer.inverse_depth(x, y) for layer in layers]
        assert all((near > far).all() for far, near in pairwise(depths))


def test_a_pair_is_known_by_its_number_and_seed() -> None:
    data, again = (GeneratedPairs(PHOTOS, 8, seed=3, shown=(28, 28), size=SIZE) for _ in range(2))
    other = GeneratedPairs(PHOTOS, 8, seed=4, shown=(28, 28), size=SIZE)
    assert len(list(data)) == 8  # type: ignore[call-overload]
    item = data[5]
    assert all(torch.equal(value, again[5][key]) for key, value in item.items())
    assert not torch.equal(item["pixel_values"], other[5]["pixel_values"])
    assert not torch.equal(item["pixel_values"], data[4]["pixel_values"])
    assert item["pixel_values"].shape == (3, 28, 28) and item["flow_labels"].shape == (2, SIZE, SIZE)
    assert item["depth_labels"].min() > 0.5 and item["depth_labels"].max() <= 50


def test_the_motorcycle_is_at_hand() -> None:
    example = motion_data.real_pairs()[0]
    flow, depth = example.flow(), example.depth()  # type: ignore[misc]
    known = np.isfinite(flow[0])
    assert flow.shape == (2, 500, 741) and 0.9 < known.mean() < 0.95
    assert np.nanmean(-flow[0]) == pytest.approx(34.3, abs=0.1) and np.nanmax(np.abs(flow[1])) == 0
    assert np.array_equal(known, np.isfinite(depth))
    assert depth[known] == pytest.approx(-1 / flow[0][known])


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """A cache with photos in it, so that the example need not fetch any, and a small backbone."""
    torch.manual_seed(0)
    folder = tmp_path / f"photos-{motion_data.MVTB.version}-{motion_data.SHORTER_SIDE}"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for number, picture in enumerate(PHOTOS):
            Image.fromarray((picture * 255).astype(np.uint8)).save(folder / split / f"{number}.png")
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 12}
    Dinov2Model(Dinov2Config(**sizes, image_size=56, patch_size=14)).save_pretrained(tmp_path / "backbone")
    path = os.pathsep.join([str(EXAMPLES.parent), *sys.path])
    return os.environ | {"PEFT_PROMPTMOE_CACHE": str(tmp_path), "PYTHONPATH": path, "MPLBACKEND": "agg"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere has none of the folder layouts"),
        (["--test-pairs", "0"], "--test-pairs must be above 0"),
        (["--lr", "nan"], "--lr must be above 0"),
        (["--evaluate"], "is no folder"),
    ],
)
def test_the_example_looks_at_its_arguments_before_it_trains(
    arguments: list[str], message: str, tmp_path: Path, offline: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import motion

    monkeypatch.setenv("PEFT_PROMPTMOE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["motion.py", "--method", "head", *arguments])
    monkeypatch.setattr(motion, "make_model", lambda args: pytest.fail("it trains"))
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises((SystemExit, FileNotFoundError)) as refused:
        motion.main(motion.parse_args())
    assert message in said.getvalue() + str(refused.value)


def test_folders_of_one_name_are_kept_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import motion

    folders = [tmp_path / "a" / "set", tmp_path / "b" / "set", tmp_path / "c"]
    for folder in folders:
        folder.mkdir(parents=True)
        for name, mode in (("rgb_00001.jpg", "L"), ("sync_depth_00001.png", "I;16")):
            Image.new(mode, (8, 8)).save(folder / name)
    found = motion.real_sets(argparse.Namespace(data=folders, task="depth"))
    assert {str(folders[0]), str(folders[1]), "c"} < set(found)
    motion.real_sets(argparse.Namespace(data=folders[2:], task="flow"))
    assert "c has no labels for this task" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("task", "method"), [("flow", "promotion"), ("depth", "head"), ("joint", "lora")])
def test_the_example_trains_saves_and_finds_the_same_numbers_again(
    task: str, method: str, tmp_path: Path, offline: dict[str, str]
) -> None:
    command = [sys.executable, str(EXAMPLES / "motion.py"), "--task", task, "--method", method]
    command += ["--model", str(tmp_path / "backbone"), "--output", str(tmp_path / "out")]
    command += ["--steps", "2", "--batch-size", "2", "--test-pairs", "2"]
    done = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same numbers" in done.stdout
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores == json.loads((tmp_path / "out" / "reloaded.json").read_text())
    held_out, motorcycle = scores["held-out pairs"], scores[motion_data.MOTORCYCLE]
    assert ("epe" in held_out) == (task != "depth") and ("abs_rel" in held_out) == (task != "flow")
    assert ("abs_rel_median_scaled" in motorcycle) == (task != "flow") and "abs_rel" not in motorcycle
    with Image.open(tmp_path / "out" / "motion.png") as picture:
        assert picture.size[0] > 500
    assert (tmp_path / "out" / "prototypes.png").exists() == (method == "promotion") == ("denoising" in done.stdout)
