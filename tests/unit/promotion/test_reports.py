# SPDX-License-Identifier: Apache-2.0
"""Which prototypes took which patches: the table, the picture and the Trainer's logs; and units behind a FlowModel."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny_promotion import SMALL, adapted, backbone, classifier, images, step, units

from peft_promptmoe import (
    AssignmentCallback,
    FlowModel,
    ProMotionConfig,
    RoutingCallback,
    assignment_report,
    last_aux_losses,
    routing_report,
)
from peft_promptmoe.reports.assignment_report import measure
from peft_promptmoe.routing.record import Assignment


def test_figures_by_hand() -> None:
    similarity = torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.7], [0.8, 0.3]]])
    prototypes = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    found = measure(Assignment(similarity, prototypes, (2, 2)))
    torch.testing.assert_close(found["use"], torch.tensor([0.75, 0.25]))
    assert found["margin"].item() == pytest.approx((0.8 + 0.2 + 0.5 + 0.5) / 4)
    assert found["nearest"].item() == pytest.approx((0.9 + 0.6 + 0.7 + 0.8) / 4)
    assert found["between"].item() == pytest.approx(0.6)


def test_a_report_is_of_the_last_forward(tmp_path: Path) -> None:
    model = adapted(init_weights=False)
    with pytest.raises(ValueError, match="has not been run yet"):
        assignment_report(model)
    step(model, images())
    report = assignment_report(model)
    assert report.layers == [0, 2] and report.use.shape == (2, 3) and report.grids == [(4, 4), (4, 4)]
    torch.testing.assert_close(report.use.sum(dim=1), torch.ones(2))
    assert torch.isfinite(report.denoising).all()
    for unit, nearest in zip(units(model), report.maps, strict=True):
        assert torch.equal(nearest, unit.last_assignment["default"].similarity.argmax(dim=-1))
    assert list(report.to_dataframe()["layer"]) == [0, 2] and len(str(report).splitlines()) == 3
    assert "over 4 images of 16 patches" in str(report) and report._repr_html_().count("<tr>") == 3
    figure = report.plot(tmp_path / "maps.png", images=(0, 3))
    titles = [axes.get_title().splitlines()[0] for axes in figure.axes if axes.get_title()]
    assert titles == [f"image {image}, block {block}" for image in (0, 3) for block in (0, 2)]
    assert "2 of the last batch's 4 images" in figure.get_suptitle()
    assert (tmp_path / "maps.png").stat().st_size > 1_000
    with pytest.raises(ValueError, match="images=4 is not in the last batch"):
        report.plot(tmp_path / "no.png", images=(4,))
    with pytest.raises(ValueError, match="images is empty"):
        report.plot(images=[])


def test_one_prototype_has_everything() -> None:
    model = adapted(init_weights=False, num_prototypes=1).eval()
    model(**images())
    report = assignment_report(model)
    assert report.use.tolist() == [[1.0], [1.0]] and report.entropy.tolist() == [1.0, 1.0]
    assert report.between.tolist() == [0.0, 0.0] and report.denoising.isnan().all()


def test_models_without_units_have_no_report() -> None:
    with pytest.raises(ValueError, match="no ProMotion adapter"):
        assignment_report(classifier())
    with pytest.raises(ValueError, match=r"no ProMotion adapter 'other'\. It has 'default'\."):
        assignment_report(adapted(), "other")
    with pytest.raises(ValueError, match=r"ProMotion, which groups patches.*assignment_report"):
        routing_report(adapted())


@pytest.mark.parametrize("together", [False, True])
def test_the_trainers_logs_have_it_and_collapse_is_told_once(together: bool) -> None:
    model, logs, state = adapted(init_weights=False), {"loss": 1.0}, SimpleNamespace(log_history=[{}])
    step(model, images())
    callback = AssignmentCallback(together_above=-2.0 if together else 1.0)
    with pytest.warns(UserWarning, match="become nearly equal") if together else _nothing():
        callback.on_log(None, state, None, logs=logs, model=model)
    callback.on_log(None, state, None, logs=logs, model=model)
    told = {"denoise", "denoise_ratio", "margin", "compact", "entropy", "min_entropy", "max_between"}
    assert {f"promotion/{name}" for name in told} | {"loss"} == set(logs)
    assert state.log_history[-1]["promotion/denoise"] == last_aux_losses(model)["denoise"]


def test_thresholds_are_looked_at_before_training() -> None:
    for make in (lambda: AssignmentCallback("0.9"), lambda: RoutingCallback(collapse_below=None)):  # type: ignore
        with pytest.raises(TypeError, match=r"(together_above|collapse_below) must be a number"):
            make()
    with pytest.raises(TypeError, match="per_layer"):
        RoutingCallback(per_layer="yes")  # type: ignore[arg-type]


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_units_of_a_flow_model_see_both_frames_by_the_same_prototypes() -> None:
    model = get_peft_model(FlowModel(backbone()), ProMotionConfig(**SMALL)).train()
    config = model.peft_config["default"]
    assert set(config.layers_to_transform) <= {0, 1, 2} and "flow_head" in str(config.modules_to_save)
    frames, flow = images(2)["pixel_values"], torch.zeros(2, 2, 32, 32)
    for _ in range(2):
        model.zero_grad()
        model(pixel_values=frames, next_pixel_values=frames, flow_labels=flow + 1.0).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and "promotion" in n and p.grad is None]
    assert not missing
    assert set(last_aux_losses(model)) == {"denoise", "denoise_ratio", "margin", "compact"}
    for nearest in assignment_report(model).maps:
        assert torch.equal(nearest[:2], nearest[2:])
