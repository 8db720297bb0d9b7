# SPDX-License-Identifier: Apache-2.0
"""The models of motion under PEFT and the stock Trainer: heads train, eval_loss is found, adapters come back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_backbones import BACKBONES, DEPTH_MODELS, PATCH, batch, depth_anything, dinov2, dpt, timm_vit
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from transformers import Dinov2Model, Trainer, TrainingArguments

from peft_promptmoe import DepthModel, FlowModel, MEPTConfig, MotionModel, ProMotionConfig, VAPTConfig
from peft_promptmoe.motion import DepthError, EndPointError, trainer_metrics
from peft_promptmoe.motion.record import Recorded

# peft asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SIZE = (56, 56)
_FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
# its name from transformers 5.24 on, and before
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"
MODELS: dict[str, Any] = {"flow": FlowModel, "depth": DepthModel, "joint": MotionModel}
METRICS: dict[str, Any] = {
    "flow": lambda: trainer_metrics(EndPointError()),
    "depth": lambda: trainer_metrics(DepthError()),
    "joint": lambda: trainer_metrics(EndPointError(), DepthError()),
}
METHODS = ("head", "lora", "mept", "vapt", "promotion", "full")


def make(task: str, method: str, backbone: Any = None) -> Any:
    torch.manual_seed(0)
    base = MODELS[task](dinov2() if backbone is None else backbone, freeze_backbone=method != "full")
    heads = base.head_names
    configs: dict[str, Any] = {
        "lora": lambda: LoraConfig(
            target_modules=["q_proj", "v_proj", "query", "value", "qkv"], modules_to_save=heads
        ),
        "mept": lambda: MEPTConfig(num_virtual_tokens=2, modules_to_save=heads),
        "vapt": lambda: VAPTConfig(num_virtual_tokens=2, modules_to_save=heads),
        "promotion": lambda: ProMotionConfig(num_prototypes=2, bottleneck_dim=8, modules_to_save=heads),
    }
    return get_peft_model(base, configs[method]()) if method in configs else base


def rows(task: str, count: int = 4) -> list[dict[str, Tensor]]:
    inputs = batch(task, size=SIZE)
    return [{key: value[i % 2] for key, value in inputs.items()} for i in range(count)]


def trainer(model: nn.Module, task: str, folder: Path, **more: Any) -> Trainer:
    settings: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **more}
    arguments = TrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, use_cpu=True, batch_eval_metrics=True, **settings
    )
    data = rows(task)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=METRICS[task]())


@pytest.mark.parametrize("task", sorted(MODELS))
@pytest.mark.parametrize("method", METHODS)
def test_the_stock_trainer_trains_evaluates_and_loads_the_best(method: str, task: str, tmp_path: Path) -> None:
    model = make(task, method)
    before = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    run = trainer(
        model,
        task,
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    run.train()
    scores = run.evaluate()
    assert scores["eval_loss"] > 0
    wanted = {"flow": {"eval_epe"}, "depth": {"eval_abs_rel"}, "joint": {"eval_epe", "eval_abs_rel"}}
    assert wanted[task] <= set(scores)
    changed = {path for path, parameter in model.named_parameters() if not torch.equal(parameter, before[path])}
    heads = {f"{head}." for head in ("flow_head", "depth_head")}
    marks = {"lora": "lora_", "mept": "mept_", "vapt": "vapt_", "promotion": "promotion_", "full": "backbone.encoder"}
    assert any(any(head in path for head in heads) for path in changed)
    assert method == "head" or any(marks[method] in path for path in changed)
    kept = {path for path in before if "backbone." in path and not any(m in path for m in marks.values())}
    assert method == "full" or not changed & {path for path in kept if "modules_to_save" not in path}


@pytest.mark.parametrize("method", ["lora", "vapt", "mept", "promotion"])
@pytest.mark.parametrize("kind", ["dinov2-backbone", "timm"])
def test_an_adapter_comes_back_with_its_heads(kind: str, method: str, tmp_path: Path) -> None:
    model = make("flow", method, BACKBONES[kind]())
    # three steps: prompts that adapt to the image are zero before the second
    trainer(model, "flow", tmp_path / "run", max_steps=3, learning_rate=1e-2).train()
    inputs = batch("flow", size=SIZE)
    model.eval()
    expected = model(**inputs)
    with torch.no_grad(), model.disable_adapter():
        plain = model(**inputs).flow
    assert not torch.allclose(plain, expected.flow, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(FlowModel(BACKBONES[kind]()), tmp_path / "adapter").eval()
    found = again(**inputs)
    assert torch.equal(found.flow, expected.flow) and torch.equal(found.loss, expected.loss)


CHANGES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "flow, other blocks": ("flow", {"levels": [0, 1]}, {"levels": [1, 2]}),
    "flow, refinements": ("flow", {}, {"refinements": 1}),
    "depth, other blocks": ("depth", {"levels": [0, 1]}, {"levels": [1, 2]}),
    "depth, max_depth": ("depth", {}, {"max_depth": 10.0}),
    "depth, min_depth": ("depth", {}, {"min_depth": 0.1}),
    "joint, refinements of depth": ("joint", {"refinements": None}, {"refinements": 3}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["lora", "mept", "vapt", "promotion"])
def test_an_adapter_is_refused_where_heads_have_other_settings(method: str, change: str, tmp_path: Path) -> None:
    """Tensors of heads fit whatever the range of depth is, and depth would be wrong by the ratio of the ranges."""
    task, settings, others = CHANGES[change]

    def base(given: dict[str, Any]) -> Any:
        torch.manual_seed(0)
        return MODELS[task](BACKBONES["timm"](), **given)

    model = base(settings)
    configs: dict[str, Any] = {
        "lora": LoraConfig(target_modules=["qkv"], modules_to_save=model.head_names),
        "mept": MEPTConfig(num_virtual_tokens=2),
        "vapt": VAPTConfig(num_virtual_tokens=2),
        "promotion": ProMotionConfig(num_prototypes=2),
    }
    get_peft_model(model, configs[method]).save_pretrained(tmp_path)
    PeftModel.from_pretrained(base(settings), tmp_path)
    other, inputs = base(settings | others).eval(), batch(task, size=SIZE)
    before = other(**inputs).loss
    with pytest.raises(RuntimeError, match=r"were trained with .*=.*, but this one has .*=.* the same settings"):
        PeftModel.from_pretrained(other, tmp_path)
    if method != "lora":  # PEFT itself leaves LoRA layers behind
        assert torch.equal(other.eval()(**inputs).loss, before)


@pytest.mark.parametrize(
    ("made", "used", "message"),
    [
        ("flow", "depth", r"lacks 'base_model\.model\.depth_head\..* Load it onto the model that it was made for"),
        (
            "joint",
            "flow",
            r"saved with the module 'depth_head', which FlowModel does not have\. Load it onto the model",
        ),
    ],
)
def test_an_adapter_of_another_task_is_refused(made: str, used: str, message: str, tmp_path: Path) -> None:
    get_peft_model(MODELS[made](BACKBONES["timm"]()), VAPTConfig(num_virtual_tokens=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(MODELS[used](BACKBONES["timm"]()), tmp_path)


def test_without_heads_an_adapter_fits_other_heads(tmp_path: Path) -> None:
    config = VAPTConfig(num_virtual_tokens=2, modules_to_save=[], layers_to_transform=[0, 1])
    get_peft_model(FlowModel(BACKBONES["timm"](), levels=[0, 1]), config).save_pretrained(tmp_path)
    PeftModel.from_pretrained(FlowModel(BACKBONES["timm"](), levels=[1, 2]), tmp_path)


@pytest.mark.parametrize(("made", "used"), [("depth", "inverse"), ("inverse", "depth")])
def test_an_adapter_is_refused_where_the_decoder_predicts_otherwise(made: Any, used: Any, tmp_path: Path) -> None:
    def base(output: Any) -> DepthModel:
        torch.manual_seed(0)
        return DepthModel(depth_anything(), decoder_output=output)

    model = base(made)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=model.head_names)
    get_peft_model(model, config).save_pretrained(tmp_path)
    PeftModel.from_pretrained(base(made), tmp_path)
    with pytest.raises(RuntimeError, match=f"decoder_output='{made}', but .* decoder_output='{used}'"):
        PeftModel.from_pretrained(base(used), tmp_path)


@pytest.mark.parametrize("low_memory", [False, True])
def test_settings_come_back(low_memory: bool, tmp_path: Path) -> None:
    model = get_peft_model(DepthModel(dinov2(), max_depth=10), VAPTConfig(num_virtual_tokens=2)).half()
    model.save_pretrained(tmp_path / "adapter")
    base = DepthModel(dinov2(), max_depth=10.0)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_memory)
    again.unload().save_pretrained(tmp_path / "model")
    with pytest.raises(RuntimeError, match=r"max_depth=10, but this one has max_depth=20"):
        DepthModel.from_pretrained(tmp_path / "model", max_depth=20)
    assert DepthModel.from_pretrained(tmp_path / "model").max_depth == 10


@pytest.mark.parametrize(
    "settings",
    [
        torch.tensor(list(b"[" * 512), dtype=torch.uint8),
        torch.tensor(list(b'{"max_depth": 1e999}'.ljust(512)), dtype=torch.uint8),
        torch.tensor(list(b"[1]".ljust(512)), dtype=torch.uint8),
        torch.full((512,), 255, dtype=torch.uint8),
        torch.zeros(512),
    ],
    ids=["nested", "infinite", "no dict", "no text", "no bytes"],
)
def test_settings_that_cannot_be_read_are_refused(settings: Tensor) -> None:
    model = DepthModel(dinov2())
    tensors = model.state_dict() | {"depth_head.settings": settings}
    with pytest.raises(RuntimeError, match="DepthHead were trained with"):
        model.load_state_dict(tensors)


def long_record(refinements: int = 0) -> Recorded:
    head = Recorded()
    head.keep_settings(refinements=refinements, blocks=list(range(1000)))
    return head


def test_a_record_of_very_many_blocks_is_compared_too() -> None:
    tensors = long_record().state_dict()
    long_record().load_state_dict(tensors)
    with pytest.raises(RuntimeError, match="trained with refinements=0, but this one has refinements=1"):
        long_record(refinements=1).load_state_dict(tensors)


@pytest.mark.parametrize("whole", [True, False], ids=["model", "adapter"])
def test_heads_that_older_files_hold_with_scalars_are_loaded(whole: bool, tmp_path: Path) -> None:
    """FSDP takes no parameter of shape (), so these have the shape (1,) now."""

    def base() -> Any:
        torch.manual_seed(0)
        return MotionModel(depth_anything(), levels={"flow": [0]})

    model = base() if whole else get_peft_model(base(), VAPTConfig(num_virtual_tokens=2))
    inputs = batch("joint", size=SIZE)
    model.train()(**inputs)
    scale = model.depth_scale if whole else model.get_base_model().depth_scale.modules_to_save["default"]
    expected = model.eval()(**inputs)
    model.save_pretrained(tmp_path)
    file = tmp_path / ("model.safetensors" if whole else "adapter_model.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("temperature", "log_scale")):
            tensors[name] = tensor.reshape(())
        if name.endswith("log_scale"):  # they held what the first batch had set
            tensors[name] += scale.started.log()
        if name.endswith("started"):
            tensors[name].fill_(1)
    save_file(tensors, file, metadata={"format": "pt"})
    again = MotionModel.from_pretrained(tmp_path) if whole else PeftModel.from_pretrained(base(), tmp_path).eval()
    found = again(**inputs)
    assert torch.equal(found.flow, expected.flow) and torch.allclose(found.depth, expected.depth)


@pytest.mark.parametrize("average", ["default", "ema", "ema of many", "swa of many"])
def test_averages_of_weights_keep_the_settings(average: str) -> None:
    functions: dict[str, dict[str, Any]] = {
        "default": {},
        "ema": {"avg_fn": get_ema_avg_fn(0.9999)},
        "ema of many": {"multi_avg_fn": get_ema_multi_avg_fn(0.9999)},
        "swa of many": {"multi_avg_fn": get_swa_multi_avg_fn()},
    }
    model = MotionModel(depth_anything(), levels={"flow": [0]})
    averaged = AveragedModel(model, use_buffers=True, **functions[average])
    for _ in range(3):
        averaged.update_parameters(model)
    tensors: Any = averaged.module.state_dict()
    MotionModel(depth_anything(), levels={"flow": [0]}).load_state_dict(tensors)
    with pytest.raises(RuntimeError, match=r"max_depth=80\.0, but this one has max_depth=10\."):
        MotionModel(depth_anything(), levels={"flow": [0]}, max_depth=10).load_state_dict(tensors)


def test_tensors_without_data_show_no_settings() -> None:
    tensors = DepthModel(dinov2()).to("meta").state_dict()
    DepthModel(dinov2(), max_depth=10).load_state_dict(tensors, assign=True)


@pytest.mark.parametrize("method", ["lora", "vapt"])
def test_an_adapter_is_refused_where_the_maps_pass_another_norm(method: str, tmp_path: Path) -> None:
    """The backbone's last norm is no block's: a Dinov2Backbone applies it to every map, a Dinov2Model to none."""
    backbone = dinov2()
    blocks = [index - 1 for index in backbone.config.out_indices]
    lora, vapt = LoraConfig(target_modules=["q_proj"], modules_to_save=["flow_head"]), VAPTConfig(num_virtual_tokens=2)
    config = {"lora": lora, "vapt": vapt}[method]
    get_peft_model(FlowModel(backbone), config).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="trained with normed=True, but this one has normed=False"):
        PeftModel.from_pretrained(FlowModel(Dinov2Model(backbone.config), levels=blocks), tmp_path)


def test_a_checkpoint_of_other_heads_is_refused() -> None:
    tensors = DepthModel(dinov2()).half().state_dict()  # precision changes no settings
    with pytest.raises(RuntimeError, match=r"max_depth=80\.0, but this one has max_depth=10\."):
        DepthModel(dinov2(), max_depth=10).load_state_dict(tensors)
    DepthModel(dinov2(), max_depth=80).load_state_dict(tensors)


def test_auto_peft_model_finds_the_base_it_was_loaded_from(tmp_path: Path) -> None:
    FlowModel(dinov2()).save_pretrained(tmp_path / "base")
    base = FlowModel.from_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=base.head_names, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(str(tmp_path / "adapter"), import_allowlist=["peft_promptmoe"]).eval()
    assert isinstance(loaded.get_base_model(), FlowModel)
    inputs = batch("flow", size=SIZE)
    assert torch.equal(loaded(**inputs).flow, model(**inputs).flow)


def test_an_adapters_card_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FlowModel(dinov2()).save_pretrained(tmp_path / "base")
    model = get_peft_model(FlowModel.from_pretrained(tmp_path / "base"), VAPTConfig(num_virtual_tokens=2))
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "adapter")
    found: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], found)
    assert isinstance(found["model"].get_base_model(), FlowModel)


def test_trainer_checkpoints_activations(tmp_path: Path) -> None:
    for backbone in (dinov2(), timm_vit()):
        model = make("flow", "lora", backbone)
        trainer(model, "flow", tmp_path, **{CHECKPOINTING: True}).train()
        assert model.is_activation_checkpointing


def test_evaluation_by_batches_of_different_size(tmp_path: Path) -> None:
    """Labels of two sizes, one image a batch: nothing is padded, so that no padding is taken for flow."""
    model = make("flow", "head")
    small, large = batch("flow", size=SIZE, labels=(20, 30)), batch("flow", size=SIZE, labels=(40, 50))
    data = [{key: value[0] for key, value in inputs.items()} for inputs in (small, large)]
    run = trainer(model, "flow", tmp_path, per_device_eval_batch_size=1)
    scores = run.evaluate(data)
    run.args.batch_eval_metrics, run.args.eval_do_concat_batches = False, False
    run.args.include_for_metrics = ["inputs"]
    assert run.evaluate(data)["eval_epe"] == pytest.approx(scores["eval_epe"], abs=1e-5)
    assert scores["eval_pixels"] == 20 * 30 + 40 * 50
    metric = EndPointError()
    for row in data:
        output = model.eval()(**{key: value[None] for key, value in row.items()})
        metric.add_batch(predictions=output.flow, references=row["flow_labels"][None])
    assert scores["eval_epe"] == pytest.approx(metric.compute()["epe"], abs=1e-5)


def test_what_the_trainer_saves_of_a_whole_model_says_how_it_is_loaded(tmp_path: Path) -> None:
    run = trainer(make("flow", "full"), "flow", tmp_path)
    run.save_model(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="checkpoint of the Trainer"):
        FlowModel.from_pretrained(tmp_path / "run")
    again = FlowModel(dinov2(), freeze_backbone=False)
    again.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    inputs = batch("flow")
    assert torch.equal(again.eval()(**inputs).flow, run.model.eval()(**inputs).flow)


# -- depth models with a decoder of their own -------------------------------------------------------------------------


def square(name: str) -> tuple[int, int]:
    return (60, 60) if name == "dpt" else (60, 70)


@pytest.mark.parametrize("task", ["depth", "joint"])
@pytest.mark.parametrize("name", sorted(DEPTH_MODELS))
def test_a_models_own_decoder_trains(name: str, task: str) -> None:
    if (name, task) == ("glpn", "joint"):
        with pytest.raises(ValueError, match="AutoBackbone"):
            MotionModel(DEPTH_MODELS[name]())
        return
    torch.manual_seed(0)
    model = MODELS[task](DEPTH_MODELS[name]()).train()
    decoder = [path for path in model.head_names if path.startswith("backbone.")]
    assert len(decoder) == 2 and not hasattr(model, "depth_head")
    output = model(**batch(task, size=square(name), labels=(33, 45)))
    assert tuple(output.depth.shape) == (2, 33, 45)
    output.loss.backward()
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(path.startswith(tuple(f"{head}." for head in model.head_names)) for path in trained)
    assert all(any(p.grad is not None for p in model.get_submodule(path).parameters()) for path in decoder)


@pytest.mark.parametrize("method", ["lora", "vapt"])
@pytest.mark.parametrize("task", ["depth", "joint"])
@pytest.mark.parametrize("name", ["depth-anything", "depth-anything-metric", "dpt", "dpt-backbone"])
def test_decoders_are_saved_by_their_whole_path(name: str, task: str, method: str, tmp_path: Path) -> None:
    model = make(task, method, DEPTH_MODELS[name]())
    inputs = batch(task, size=square(name))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    expected = model(**inputs)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert {"backbone.neck", "backbone.head"} <= set(saved)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(MODELS[task](DEPTH_MODELS[name]()), tmp_path).eval()
    found = again(**inputs)
    assert torch.equal(found.depth, expected.depth)
    wrapped = {path.split(".modules_to_save")[0] for path, _ in again.named_modules() if "modules_to_save" in path}
    assert {path.removeprefix("base_model.model.") for path in wrapped} == set(model.get_base_model().head_names)


@pytest.mark.parametrize("factor", [0.02, 1.0, 500.0])
def test_relative_depth_starts_at_the_scale_of_the_first_batch(factor: float) -> None:
    """A decoder that is right up to a factor has next to no loss from its first step, and the scale stays then."""
    model = DepthModel(depth_anything(), max_depth=1e6).train()
    inputs = batch("depth", size=SIZE)
    true = inputs["depth_labels"]
    model.depth_scale.start(factor / true, true, torch.ones_like(true, dtype=torch.bool))
    assert model.depth_scale.started
    found = model.depth_scale(factor / true, SIZE)
    assert torch.allclose(found, true, rtol=1e-3)
    scale = model.depth_scale.started.clone()
    model.depth_scale.start(true, true, torch.ones_like(true, dtype=torch.bool))
    assert torch.equal(model.depth_scale.started, scale)


def test_the_scale_starts_in_training_with_labels_only() -> None:
    model, inputs = DepthModel(depth_anything()).eval(), batch("depth", size=SIZE)
    model(**inputs)
    assert not model.depth_scale.started
    model.train()(pixel_values=inputs["pixel_values"])
    model(**{**inputs, "depth_labels": torch.zeros_like(inputs["depth_labels"])})  # nothing known
    assert not model.depth_scale.started
    model(**inputs)
    assert model.depth_scale.started


def test_a_copy_that_is_thrown_away_sets_no_scale() -> None:
    replica: Any = DepthModel(depth_anything()).depth_scale._replicate_for_data_parallel()
    true = torch.rand(1, 4, 4) + 1
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel throws away the scale .* torchrun"):
        replica.start(1 / true, true, torch.ones_like(true, dtype=torch.bool))


def test_under_peft_the_scale_of_the_adapter_starts_and_the_models_own_does_not() -> None:
    model = make("depth", "lora", depth_anything())
    model.train()(**batch("depth", size=SIZE)).loss.backward()
    scale = model.get_base_model().depth_scale
    assert scale.modules_to_save["default"].started and not scale.original_module.started
    assert scale.modules_to_save["default"].log_scale.grad is not None


def test_what_a_decoder_means_is_read_from_the_model_or_named() -> None:
    assert DepthModel(depth_anything("metric")).depth_scale.output == "depth"
    assert DepthModel(depth_anything("relative")).depth_scale.output == "inverse"
    assert DepthModel(dpt()).depth_scale.output == "inverse"
    named = DepthModel(dpt(), decoder_output="depth")
    assert named.depth_scale.output == "depth"
    assert named.head_names == ["depth_scale", "backbone.neck", "backbone.head"]
    predicted = torch.tensor([[[0.0, 2.0], [5.0, 100.0]]])
    assert named.depth_scale(predicted, (2, 2)).tolist()[0] == [[pytest.approx(1e-3), 2.0], [5.0, 80.0]]


def test_a_dpt_that_takes_all_images_for_square_ones_refuses_others() -> None:
    """Sixteen patches are a grid of 4 x 4 to it, also those of 2 x 8."""
    model = DepthModel(dpt())
    assert model(pixel_values=torch.zeros(1, 3, 4 * PATCH, 4 * PATCH)).depth.shape == (1, 56, 56)
    with pytest.raises(ValueError, match="2 x 8 patches"):
        model(pixel_values=torch.zeros(1, 3, 2 * PATCH, 8 * PATCH))


def test_flow_reads_the_backbone_of_a_depth_model_when_told_how() -> None:
    with pytest.raises(ValueError, match="backbone"):
        FlowModel(depth_anything())
    backbone = depth_anything().backbone
    with pytest.raises(ValueError, match=r"set backbone\.config\.reshape_hidden_states = True"):
        FlowModel(backbone)
    backbone.config.reshape_hidden_states = True
    assert FlowModel(backbone, levels=[1, 2])(**batch("flow")).flow.shape == (2, 2, 60, 70)


def test_settings_that_a_decoder_makes_dead_are_refused() -> None:
    with pytest.raises(ValueError, match="its own decoder"):
        DepthModel(depth_anything(), levels=[1])
    with pytest.raises(ValueError, match="Pass its backbone"):
        FlowModel(depth_anything())
    assert MotionModel(depth_anything(), levels={"flow": [2]}).levels == {"flow": [2]}


def test_other_depth_models_are_refused() -> None:
    class ZoeDepthForDepthEstimation(nn.Module):
        config = type("Config", (), {"model_type": "zoedepth"})()

    with pytest.raises(ValueError, match="not supported; those of"):
        DepthModel(ZoeDepthForDepthEstimation())


READ_BLOCKS: dict[str, tuple[Any, list[int]]] = {
    # of maps 2, 3, 4 of an AutoBackbone, which are behind blocks 1, 2, 3
    "levels of an AutoBackbone": (lambda: MotionModel(dinov2(), levels={"flow": [1], "depth": [2, 3]}), [1, 2, 3]),
    "levels of a model": (lambda: MotionModel(timm_vit(), levels={"flow": [1], "depth": [0, 4]}), [0, 1, 4]),
    "a decoder's maps": (lambda: DepthModel(depth_anything()), [0, 1, 2, 5]),
    "a decoder's maps and levels": (lambda: MotionModel(depth_anything(), levels={"flow": [4]}), [0, 1, 2, 4, 5]),
    "a decoder's blocks": (lambda: DepthModel(dpt()), [1, 2, 3, 5]),
    "a decoder's blocks and levels": (lambda: MotionModel(dpt(), levels={"flow": [0]}), [0, 1, 2, 3, 5]),
}


@pytest.mark.parametrize("case", sorted(READ_BLOCKS))
def test_units_of_promotion_stand_up_to_the_last_block_that_is_read(case: str) -> None:
    make_base, blocks = READ_BLOCKS[case]
    base = make_base()
    assert base.read_blocks == blocks
    model = get_peft_model(base, ProMotionConfig(num_prototypes=2, bottleneck_dim=8))
    assert model.peft_config["default"].layers_to_transform == [*range(blocks[-1] + 1)]


@pytest.mark.parametrize("kind", ["dinov2-backbone", "timm", "depth-anything"])
def test_prompts_find_the_heads_by_themselves(kind: str) -> None:
    """As `get_peft_model(FlowModel(backbone), VAPTConfig())`; a timm backbone has no head that could be meant."""
    base = DepthModel(depth_anything()) if kind == "depth-anything" else FlowModel(BACKBONES[kind]())
    heads = list(base.head_names)
    model = get_peft_model(base, VAPTConfig(num_virtual_tokens=2))
    assert sorted(model.peft_config["default"].modules_to_save) == sorted(heads)
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    for head in heads:
        assert any(f"{head}.modules_to_save." in path for path in trained)
    assert model.get_base_model().head_names == heads
