# SPDX-License-Identifier: Apache-2.0
"""What the routers chose, as a report, over a data set, and in the Trainer's logs."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from peft_promptmoe import (
    AssignmentCallback,
    AssignmentReport,
    DispatchReport,
    MEPTConfig,
    RoutingCallback,
    RoutingRecorder,
    RoutingReport,
    VAPTConfig,
    assignment_report,
    record_routing,
    routing_report,
)
from peft_promptmoe.engine.model_hooks import prompt_layers

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
EXPERTS = 3


def bert(**settings: Any) -> Any:
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**SMALL, hidden_dropout_prob=0.0))
    return get_peft_model(base, MEPTConfig(task_type="SEQ_CLS", num_experts=EXPERTS, **settings)).eval()


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(LlamaForCausalLM(LlamaConfig(**SMALL)), MEPTConfig(num_experts=EXPERTS, **settings)).eval()


def texts(samples: int, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(1, 40, (samples, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [1, 2])
def test_report_of_sample_routing(top_k: int) -> None:
    model = bert(routing="sample", top_k=top_k)
    seen: dict[int, list[Tensor]] = {}
    for layer in prompt_layers(model):
        layer.observers.append(lambda name, adapter, record, i=layer.site.index: seen.setdefault(i, []).append(record))
    with torch.no_grad():
        model(input_ids=texts(8))
    report = routing_report(model)
    assert report.layers == [0, 1, 2] and report.load.shape == report.gate.shape == (3, EXPERTS)
    for row, layer in enumerate(report.layers):
        load, gate = [0.0] * EXPERTS, [0.0] * EXPERTS
        for sample in seen[layer][0].log_gates.tolist():
            for expert, log_gate in enumerate(sample):
                if log_gate > -math.inf:
                    load[expert] += 1 / top_k / 8
                    gate[expert] += math.exp(log_gate) / 8
        assert report.load[row].tolist() == pytest.approx(load, abs=1e-6)
        assert report.gate[row].tolist() == pytest.approx(gate, abs=1e-6)
        entropy = -sum(share * math.log(share) for share in load if share) / math.log(EXPERTS)
        assert report.entropy[row].item() == pytest.approx(entropy, abs=1e-6)


def test_padding_counts_in_no_report_of_token_routing() -> None:
    model = llama(routing="token")
    ids = texts(2)
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        padded = routing_report(model)
        alone = []
        for sample in (ids[:1], ids[1:, :2]):
            model(input_ids=sample)
            alone.append((routing_report(model), sample.shape[1]))
    expected = sum(report.load * count for report, count in alone) / 8
    torch.testing.assert_close(padded.load, expected, rtol=0, atol=1e-6)


def test_a_report_needs_a_forward_and_a_router() -> None:
    with pytest.raises(ValueError, match="Run the model once"):
        routing_report(bert())
    with pytest.raises(ValueError, match="num_experts=1"):
        routing_report(get_peft_model(BertForSequenceClassification(BertConfig(**SMALL)), MEPTConfig(num_experts=1)))
    with pytest.raises(ValueError, match="Linear has no adapter of peft_promptmoe"):
        routing_report(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no adapter 'other' of peft_promptmoe; it has 'default'"):
        routing_report(bert(), adapter="other")


def test_table_text_and_picture(tmp_path: Path) -> None:
    model = bert(routing="sample")
    with torch.no_grad():
        model(input_ids=texts(8))
    report = routing_report(model)
    table = report.to_dataframe()
    columns = ["layer", "expert", "load", "gate", "entropy", "samples", "tokens"]
    assert list(table.columns) == columns and len(table) == 3 * EXPERTS and set(table["samples"]) == {8}
    row = table[(table["layer"] == 1) & (table["expert"] == 2)].iloc[0]
    assert row["load"] == pytest.approx(report.load[1, 2].item())
    assert row["gate"] == pytest.approx(report.gate[1, 2].item())
    assert row["entropy"] == pytest.approx(report.entropy[1].item())
    assert len(str(report).splitlines()) == 4 and f"{report.load[2, 0]:.3f}" in str(report).splitlines()[3]
    assert "over 8 samples" in str(report) and "over 8 samples" in report._repr_html_()
    assert report._repr_html_().count("<tr>") == 4
    figure = report.plot(tmp_path / "routing.png")
    assert "over 8 samples" in figure.get_suptitle() and figure._repr_png_().startswith(b"\x89PNG")
    with Image.open(tmp_path / "routing.png") as picture:
        assert picture.size[0] > 200 and len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_a_deep_model_s_map_stays_on_one_screen() -> None:
    layers, experts = 96, 64
    report = RoutingReport(
        list(range(layers)),
        torch.full((layers, experts), 1 / experts),
        torch.zeros(layers, experts),
        [1] * layers,
        None,
    )
    figure = report.plot()
    width, height = figure.get_size_inches()
    assert width <= 12 and height <= 9
    assert figure.axes[0].images[0].get_array().shape == (layers, experts)  # and yet nothing is left out
    assert 1 < len(figure.axes[0].get_yticks()) <= 24


def test_a_report_after_generation_is_of_all_of_it() -> None:
    """Each step of decoding runs one token, which by itself looks like a collapsed router."""
    model, ids, new = llama(routing="token", top_k=2), texts(2, length=5), 40
    text = model.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    generated = routing_report(model)
    assert generated.tokens == [2 * (5 + new - 1)] * 3 and generated.samples == [2] * 3
    assert f"over {2 * (5 + new - 1)} tokens of 2 samples" in str(generated)
    with torch.no_grad():
        model(input_ids=text[:, :-1])
    whole = routing_report(model)
    assert whole.tokens == generated.tokens
    torch.testing.assert_close(whole.load, generated.load)
    torch.testing.assert_close(whole.gate, generated.gate)
    assert all(len(layer.last_routing["default"]) < new for layer in prompt_layers(model))  # steps are joined


def test_a_report_after_generation_leaves_padding_out() -> None:
    model, ids = llama(routing="token"), texts(2, length=5)
    ids[1, :2], mask = 0, torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    assert routing_report(model).tokens == [8 + 2 * 39] * 3


# -- over a data set --------------------------------------------------------------------------------------------------


def chosen_by(model: nn.Module, ids: Tensor) -> Tensor:
    """(N, L) expert of every sample in every layer, sample by sample."""
    rows = []
    with torch.no_grad():
        for sample in ids:
            model(input_ids=sample[None])
            records = [layer.last_routing["default"][-1] for layer in prompt_layers(model)]
            rows.append([int(record.log_gates[0].argmax()) for record in records])
    return torch.tensor(rows)


def test_a_record_gathers_batches_by_class(tmp_path: Path) -> None:
    model = bert(routing="sample", router_centering=True)
    for layer in prompt_layers(model):  # so that samples differ in their experts
        layer.mept_router_center["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
    ids, classes = texts(20), ["b", "a", "c", "a", "b"] * 4
    experts = chosen_by(model, ids)
    with record_routing(model, labels=classes) as record, torch.no_grad():
        for start in (0, 7, 14):
            model(input_ids=ids[start : start + 7])
        model.train()(input_ids=ids[:3])  # training does not count
        model.eval()
    with torch.no_grad():
        model(input_ids=ids[:5])  # nor does what comes later
    ways, names = record.pathways(), ["a", "b", "c"]
    assert ways.shape == (3, 3, EXPERTS)
    bits = []
    for layer in range(3):
        for c, name in enumerate(names):
            own = [int(experts[i, layer]) for i, label in enumerate(classes) if label == name]
            shares = [own.count(expert) / len(own) for expert in range(EXPERTS)]
            assert ways[c, layer].tolist() == pytest.approx(shares, abs=1e-6)
        joint = ways[:, layer].double() / 3
        independent = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
        terms = [p * math.log2(p / q) for p, q in zip(joint.flatten(), independent.flatten(), strict=True) if p > 0]
        bits.append(float(sum(terms)))
    assert record.mutual_information().tolist() == pytest.approx(bits, abs=1e-5)
    load = torch.stack([(experts == expert).double().mean(0) for expert in range(EXPERTS)], dim=1)
    assert (load.max(1).values < 1).any()  # or all of this would hold for collapsed routers, too
    torch.testing.assert_close(record.report().load.double(), load, rtol=0, atol=1e-6)
    figure = record.plot_pathways(tmp_path / "pathways.png")
    assert Image.open(tmp_path / "pathways.png").size[0] > 200
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["a\n8 samples", "b\n8 samples", "c\n4 samples"]
    for panel, way in zip(panels, ways, strict=True):
        assert torch.equal(torch.as_tensor(panel.images[0].get_array()), way)
    some = record.plot_pathways(classes=["c"])
    assert "(1 of 3 classes)" in some.get_suptitle()
    with pytest.raises(ValueError, match=r"\['d'\] were not recorded"):
        record.plot_pathways(classes=["d"])


def test_records_say_what_is_wrong() -> None:
    model = bert()
    with record_routing(model) as record, pytest.raises(ValueError, match=r"model\.eval\(\)"):
        record.report()
    with record_routing(model, labels=[0, 1]), pytest.raises(ValueError, match="2 labels but 3 samples"):
        model(input_ids=texts(3))
    assert not any(layer.observers for layer in prompt_layers(model))


# -- in the Trainer's logs --------------------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    """As TensorBoard or Weights & Biases would: keeps what it is told, when it is told."""

    def __init__(self) -> None:
        self.told: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.told.append(dict(logs))


def trained(model: nn.Module, folder: Path, callback: RoutingCallback, **settings: Any) -> Reporter:
    rows = Dataset.from_dict({"input_ids": texts(16).tolist(), "labels": [0, 1] * 8}).with_format("torch")
    reporter = Reporter()
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.0,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    # The reporter comes first, as the Trainer's own do.
    Trainer(model, TrainingArguments(**options | settings), train_dataset=rows, callbacks=[reporter, callback]).train()
    return reporter


@pytest.mark.parametrize("accumulation", [1, 2])
def test_logs_cover_all_forwards_since_the_last(accumulation: int, tmp_path: Path) -> None:
    model = bert(routing="sample", balance_loss_weight=0.1)
    counts: list[Tensor] = []
    first = prompt_layers(model)[0]
    first.observers.append(lambda name, adapter, record: counts.append(torch.isfinite(record.log_gates).sum(0)))
    reporter = trained(model, tmp_path, RoutingCallback(per_layer=True), gradient_accumulation_steps=accumulation)
    (logs,) = [logs for logs in reporter.told if "loss" in logs]
    assert len(counts) == 2 * accumulation
    load = torch.stack(counts).sum(0).double() / (2 * accumulation * 4)
    for expert in range(EXPERTS):
        assert logs[f"routing/layer_0/load_{expert}"] == pytest.approx(load[expert].item(), abs=1e-6)
    entropy = [logs[f"routing/layer_{layer}/entropy"] for layer in range(3)]
    assert logs["routing/entropy"] == pytest.approx(sum(entropy) / 3)
    assert logs["routing/min_entropy"] == pytest.approx(min(entropy))
    assert logs["routing/max_load"] >= load.max().item() - 1e-6
    # 0.1 at perfect balance, 0.3 where one expert takes all
    assert 0.1 - 1e-6 <= logs["routing/balance_loss"] <= 0.3 + 1e-6


@pytest.mark.parametrize("collapsed", [True, False])
def test_collapse_is_warned_of_once(collapsed: bool, tmp_path: Path) -> None:
    model = bert(routing="token")
    if collapsed:
        for layer in prompt_layers(model):
            torch.nn.init.zeros_(layer.mept_router["default"].weight)  # all tie, and the first expert wins
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reporter = trained(model, tmp_path, RoutingCallback(), max_steps=4, logging_steps=1)
    assert sum("send nearly everything to one expert" in str(w.message) for w in caught) == collapsed
    entropies = [logs["routing/min_entropy"] for logs in reporter.told if "loss" in logs]
    assert len(entropies) == 4 and all((entropy == 0.0) if collapsed else (entropy > 0.1) for entropy in entropies)


def test_a_callback_without_routers_says_so_once(tmp_path: Path) -> None:
    base = BertForSequenceClassification(BertConfig(**SMALL))
    static = get_peft_model(base, MEPTConfig(task_type="SEQ_CLS", num_experts=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(static, tmp_path, RoutingCallback(), logging_steps=1)
    said = [str(w.message) for w in caught if "RoutingCallback logs nothing" in str(w.message)]
    assert len(said) == 1 and "static prompts and no router with num_experts=1" in said[0]


def test_reports_name_what_a_method_without_routers_does() -> None:
    vit = ViTForImageClassification(
        ViTConfig(image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    )
    model = get_peft_model(vit, VAPTConfig(num_virtual_tokens=2))
    for ask in (routing_report, lambda model: record_routing(model).__enter__()):
        with pytest.raises(ValueError, match="'default' is one of VAPT, which makes its prompts from the image"):
            ask(model)
    with pytest.raises(ValueError, match=r"no ProMotion adapter.*one of VAPT"):
        assignment_report(model)
    with pytest.warns(UserWarning, match=r"RoutingCallback logs nothing in this training.*VAPT"):
        RoutingCallback().on_train_begin(None, None, None, model=model)
    with pytest.warns(UserWarning, match="AssignmentCallback logs nothing in this training"):
        AssignmentCallback().on_train_begin(None, None, None, model=model)


@pytest.mark.parametrize("package", ["matplotlib", "pandas"])
def test_missing_packages_name_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "peft_promptmoe.reports.pictures", raising=False)
    load = torch.tensor([[0.5, 0.5]])
    reports = [
        RoutingReport([0], load, load, [4], None),
        DispatchReport(["base model", "other"], [(0, 0)], load, None, None, 4),
        AssignmentReport([0], load, load[0, :1], *[torch.zeros(1)] * 4, [torch.zeros(1, 4)], [(2, 2)]),
    ]
    for report in reports:
        with pytest.raises(ModuleNotFoundError, match=rf"{package}.*pip install 'peft-promptmoe\[report\]'"):
            report.plot() if package == "matplotlib" else report.to_dataframe()


def test_the_help_of_record_routing_names_what_the_recorder_has() -> None:
    public = {name for name in vars(RoutingRecorder) if not name.startswith("_") and name != "observe"} | {"classes"}
    assert [name for name in public if f"`{name}" not in str(record_routing.__doc__)] == []
