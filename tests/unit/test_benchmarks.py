# SPDX-License-Identifier: Apache-2.0
"""Benchmarks that are too long for a test: that they run, go on where they stopped, and say what they found."""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from peft import get_peft_model
from transformers import Dinov2Config, Dinov2Model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import plots
import reach
import times
from harness.bottleneck import add_bottlenecks
from harness.claims import WITHIN, claims, scores, sizes, verdict
from harness.reach.table import table
from harness.remembered import remember
from harness.search import admitted, spread, two_rates
from harness.targets import Target, targets
from harness.training import Results
from peft_promptmoe import FlowModel, ProMotionConfig


@pytest.fixture
def run_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the time tier writes its results; its log level is for scripts, which end with it."""
    monkeypatch.setattr(times, "quiet", lambda: None)
    return tmp_path / "times.json"


def time_groups(path: Path, *groups: str, repeats: int = 1) -> None:
    given = ["--small", "--threads", "1", "--repeats", str(repeats), "--results", str(path), "--groups", *groups]
    times.main(times.parse_args(given))


def test_a_finished_group_is_not_timed_again(run_times: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time_groups(run_times, "bert-base adapters")
    first = json.loads(run_times.read_text())
    row = first["cells"]["bert-base adapters"]["mept_token_20_E4"]
    assert all(0 < row[kind]["min_s"] <= row[kind]["median_s"] for kind in ("attach", "save", "load"))
    assert first["made_with"]["versions"]["torch"]

    def never(setting: times.Setting) -> None:
        raise AssertionError("a finished group was timed again")

    monkeypatch.setitem(times.GROUPS, "bert-base adapters", never)
    time_groups(run_times, "bert-base adapters")
    assert json.loads(run_times.read_text()) == first
    with pytest.raises(SystemExit, match="another configuration"):
        time_groups(run_times, "bert-base adapters", repeats=2)


@pytest.mark.slow
@pytest.mark.parametrize("group", [name for name in times.GROUPS if name not in ("import", "bert-base adapters")])
def test_every_group_runs(run_times: Path, group: str) -> None:
    time_groups(run_times, group)
    rows = json.loads(run_times.read_text())["cells"][group]
    assert any(name.startswith(("mept", "pmoe", "vapt")) for name in rows)


def test_targets_are_judged_by_their_worst_figure() -> None:
    limit = Target("P0", "cost", 1.05, [(1.01, "one"), (1.051, "other")])
    assert (limit.limit, limit.measured, limit.verdict) == ("x 1.0500", "x 1.0510 (other)", "**not met** by 1 of 2")
    assert Target("P0", "cost", 1.05, [(1.05, "one")]).verdict == "met"
    assert Target("P0", "cost", 1.05, []).verdict == "not measured yet"


def test_every_target_on_exact_figures_is_measured() -> None:
    found = list(targets())
    assert {target.name for target in found} == {f"P{number}" for number in range(1, 15)}
    exact = [target for target in found if any(word in target.what for word in ("FLOPs", "saved bytes", "breaks"))]
    assert len(exact) == 28 and all(target.figures for target in exact)


def test_a_claim_is_judged_by_the_spread_of_seeds() -> None:
    def row(*scores: float) -> dict[str, Any]:
        return spread([{"accuracy": score} for score in scores])

    low, high = row(0.70, 0.71, 0.72), row(0.73, 0.74, 0.75)  # three points apart, standard error .0082
    assert verdict(high, low) == "holds"
    assert verdict(low, high) == "does not hold"
    assert verdict(row(0.70, 0.72, 0.74), low) == WITHIN
    assert verdict(row(0.9), row(0.1)) == "one seed says nothing"


def test_a_claim_is_compared_with_the_best_and_sizes_without_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    means = {"head": 0.3, "vapt": 0.8, "vpt-deep": 0.7, "full": 0.9}
    trained = {"head": 100, "vapt": 150, "vpt-deep": 190, "full": 1000}
    summary = {n: {"mean": m, "sd": 0.0, "test": [m] * 3, "trainable": trained[n]} for n, m in means.items()}
    monkeypatch.setattr("harness.claims.results", lambda name: {"summary": summary})
    found = scores("VAPT", "beats all", "learning_vision_mnist", "vapt", "vpt-deep", "full")
    assert (found.found, found.verdict) == ("VAPT 0.800, full fine-tuning 0.900", "does not hold")
    found = sizes("VAPT", "is smaller", "learning_vision_mnist", "vapt", "vpt-deep")
    assert (found.found, found.verdict) == ("VAPT 50, VPT-Deep 90", "holds")
    assert scores("VAPT", "beats all", "learning_vision_mnist", "vapt", "lora").verdict == "not measured yet"


def test_every_claim_is_measured() -> None:
    found = list(claims())
    assert {claim.paper for claim in found} == {"VAPT", "MEPT", "pMoE"}
    assert all(claim.found for claim in found)
    assert {(claim.task, claim.budget) for claim in found} == {
        ("sentiment", "2,000 texts, 3 epochs"),
        ("four text tasks", "2,000 texts, 3 epochs"),
        ("sentiment, by generation", "256 texts, 1 epoch"),
        ("six instructions", "240 texts, 1 epoch"),
        ("CIFAR-10", "1,000 images, 5 epochs"),
        ("MNIST", "1,000 images, 5 epochs"),
        ("MNIST", "1,000 images, 20 epochs"),
        ("digits on photos", "1,000 images, 4 epochs"),
    }


def test_what_other_libraries_refuse_is_said_and_what_has_results_is_kept(tmp_path: Path) -> None:
    def refused() -> None:
        raise ValueError("No past key values. The arguments are: 1")

    results = Results(tmp_path / "results.json", {})
    assert not admitted(results, "prefix", refused)
    assert json.loads(results.path.read_text())["refused"] == {"prefix": "No past key values"}
    assert admitted(results, "prefix", lambda: None)
    assert not json.loads(results.path.read_text())["refused"]
    results.summaries["prefix"] = {}
    assert admitted(results, "prefix", refused)
    with pytest.raises(ValueError, match="past key"):  # only methods of others may be refused
        admitted(results, "vapt", refused)


def test_a_picture_leaves_out_sizes_and_weak_backbones_only() -> None:
    names = ("mept-sample", "mept-sample-16", "vpt-deep dinov2", "vpt-deep digits", "pmoe-none", "head concat")
    row = {"mean": 0.5, "sd": None}
    shown = plots.points(dict.fromkeys(names, row), dict.fromkeys(names, 1.0))
    assert [point.name for point in shown] == [
        "MEPT by sample",
        "VPT-Deep on DINOv2-S",
        "pMoE, none",
        "head on all features",
    ]


def test_names_in_a_picture_touch_nothing() -> None:
    figure = Figure(figsize=(5, 4))
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    crowd = [plots.Point(f"a method {n}", 100 + 5 * (n % 4), 0.7 + 0.004 * n, 0.002, "blue") for n in range(8)]
    plots.draw(axes, crowd, "cost")
    canvas.draw()
    plots.name_points(axes, crowd, canvas)
    canvas.draw()  # only then texts are where readers see them
    assert sorted(text.get_text() for text in axes.texts) == [point.name for point in crowd]
    names = [Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]
    assert not [pair for pair in combinations(names, 2) if pair[0].overlaps(pair[1])]
    marks = {point.name: plots.mark(axes, point) for point in crowd}
    for text, name in zip(axes.texts, names, strict=True):
        assert not [other for other, mark in marks.items() if name.overlaps(mark) and other != text.get_text()]


def test_the_page_of_families_is_that_of_the_sweep_which_found_nothing_wrong() -> None:
    records = json.loads(reach.RESULTS.read_text())["records"]
    kinds = [kind for kind in reach.ALL_KINDS if any(kind == record["kind"] for record in records)]
    assert reach.TABLE.read_text() == table(records, kinds)
    bad = [(record["kind"], record["type"]) for record in records if {"late", "error", "wrong"} & {*record.values()}]
    assert not bad
    assert {kind: {record["type"] for record in records if record["kind"] == kind} for kind in kinds} == {
        kind: set(reach.names(kind)) for kind in kinds
    }


@pytest.mark.parametrize(
    ("kind", "name", "outcome"),
    [("classification", "bert", "right"), ("classification", "fnet", "refused"), ("towers", "clip", "right")],
)
def test_the_sweep_judges(kind: str, name: str, outcome: str) -> None:
    record = reach.judge(kind, name)
    assert record["outcome"] == outcome and record["lora"]
    assert record.get("vapt") == ("right" if kind == "towers" else None)


def test_the_sweep_notices_a_base_that_is_not_given_back() -> None:
    base, inputs = reach.prepare("classification", "distilbert")
    model, _ = reach.attach(base, reach.MEPTConfig(task_type="SEQ_CLS"))
    with torch.no_grad():
        next(model.get_base_model().distilbert.parameters()).mul_(1.5)
    found = reach.faults(base, model, "classification", inputs)
    assert {"disabling does not give the base model", "unloading does not give the base model"} <= {*found}


def small_flow(method: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=7, layer_norm_eps=1e-6
    )
    model = FlowModel(Dinov2Model(config), levels=[1, 2], freeze_backbone=True, refinements=1)
    if method == "bottleneck":
        return add_bottlenecks(model, [1, 2], inner=4)
    units = {"bottleneck_dim": 4, "num_prototypes": 4, "layers_to_transform": [1, 2]}
    return get_peft_model(model, ProMotionConfig(**units, modules_to_save=model.head_names))


@pytest.mark.parametrize("method", ["bottleneck", "promotion"])
def test_remembered_blocks_train_what_the_blocks_themselves_train(method: str) -> None:
    """Other mates than when an image was first seen, and a step in between, change neither loss nor gradients."""
    frames = torch.randn(5, 2, 3, 56, 56)
    found = []
    for count in (0, 2):
        model, known = small_flow(method), [{}, {}]
        remember(model, count, known)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for chosen in ([0, 1, 2], [4, 2, 0], [0, 4, 3]):
            optimizer.zero_grad()
            torch.manual_seed(1)
            flow = torch.ones(3, 2, 56, 56)
            first, second = frames[chosen].unbind(1)
            loss = model(pixel_values=first, next_pixel_values=second, flow_labels=flow).loss
            loss.backward()
            optimizer.step()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert [len(of) for of in known] == [10, 10]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert any("promotion_up" in name or "bottlenecks" in name for name in found[0][1])


def test_a_block_that_trains_is_not_remembered() -> None:
    model = small_flow("bottleneck").requires_grad_(True)
    with pytest.raises(ValueError, match="trains cannot be remembered"):
        remember(model, 1, [{}])


def test_a_long_budget_tries_the_rate_of_the_usual_one_and_the_next_smaller() -> None:
    usual = {"summary": {"middle": {"lr": 1e-2}, "least": {"lr": 1e-3}}}
    rates = (1e-3, 3e-3, 1e-2, 3e-2)
    assert two_rates(rates, usual, "middle") == (3e-3, 1e-2)
    assert two_rates(rates, usual, "least") == (1e-3, 3e-3)
    with pytest.raises(SystemExit, match="on the usual budget first"):
        two_rates(rates, usual, "never run")
