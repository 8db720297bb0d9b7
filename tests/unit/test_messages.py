# SPDX-License-Identifier: Apache-2.0
"""What users are told when something does not fit: early, true, and with the fix."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import AutoPeftModel, AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DonutSwinConfig,
    DonutSwinModel,
    HieraConfig,
    HieraForImageClassification,
    HubertConfig,
    HubertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2Model,
    ViTConfig,
    VitDetBackbone,
    VitDetConfig,
    ViTForImageClassification,
)

from peft_promptmoe import MEPTConfig, PMoEConfig, ProMotionConfig, VAPTConfig

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert(cls: Any = BertForSequenceClassification) -> Any:
    return cls(BertConfig(vocab_size=40, **SIZES))


def llama(cls: Any) -> Any:
    return cls(LlamaConfig(vocab_size=40, num_key_value_heads=1, pad_token_id=0, **SIZES))


def distilbert() -> Any:
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
    )


def hubert() -> Any:
    settings = {"conv_dim": [8], "conv_kernel": [3], "conv_stride": [2], "num_conv_pos_embeddings": 4}
    return HubertForSequenceClassification(HubertConfig(num_conv_pos_embedding_groups=2, **settings, **SIZES))


def vit(**settings: Any) -> Any:
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **SIZES | settings))


def mept(base: Any, **settings: Any) -> Any:
    return get_peft_model(base, MEPTConfig(num_virtual_tokens=2, prompt_init="random", **settings))


class Around(nn.Module):
    """A user's own head on a body of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.top = bert(BertModel), nn.Linear(16, 3)


# -- a head that would stay as it is ----------------------------------------------------------------------------------


def warned(base: Any, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mept(base, **settings)
    return [str(w.message) for w in caught if "stays frozen" in str(w.message)]


@pytest.mark.parametrize(
    ("base", "heads", "fix"),
    [
        (bert, "classifier", {"task_type": "SEQ_CLS"}),
        (lambda: llama(LlamaForSequenceClassification), "score", {"task_type": "SEQ_CLS"}),
        (lambda: bert(BertForTokenClassification), "classifier", {"task_type": "TOKEN_CLS"}),
        (lambda: bert(BertForQuestionAnswering), "qa_outputs", {"task_type": "QUESTION_ANS"}),
        (lambda: bert(BertForMultipleChoice), "classifier", {"modules_to_save": ["classifier"]}),
        (hubert, "projector, classifier", {"modules_to_save": ["projector", "classifier"]}),
        (Around, "top", {"modules_to_save": ["top"]}),
    ],
    ids=["bert", "llama", "tokens", "answers", "choice", "audio", "own"],
)
def test_a_frozen_head_is_warned_of_with_a_fix_that_trains_it(base: Any, heads: str, fix: dict[str, Any]) -> None:
    (said,) = warned(base())
    ((name, value),) = fix.items()
    assert f"Set {name}={value!r} in the config" in said and all(repr(head) in said for head in heads.split(", "))
    assert warned(base(), **fix) == []
    trained = [name for name, p in mept(base(), **fix).named_parameters() if p.requires_grad]
    assert all(any(f"{head}.modules_to_save" in name for name in trained) for head in heads.split(", "))
    assert warned(base(), modules_to_save=[]) == []


@pytest.mark.parametrize(
    "base",
    [lambda: bert(BertModel), lambda: bert(BertForMaskedLM), lambda: llama(LlamaForCausalLM), vit],
    ids=["body", "masked", "causal", "image"],
)
def test_heads_that_are_none_or_trained_already_are_not_warned_of(base: Any) -> None:
    assert warned(base()) == []


def test_a_loaded_adapter_does_not_warn_of_its_head(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="stays frozen"):
        mept(bert()).save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(bert(), tmp_path)
    assert not [w for w in caught if "stays frozen" in str(w.message)]


def test_a_task_type_for_images_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="Leave task_type unset for vision models"):
        mept(vit(), task_type="SEQ_CLS")


# -- models whose attention stays within windows ----------------------------------------------------------------------

SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
HIERA: dict[str, Any] = {"patch_size": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3], "query_stride": [2, 2]}
HIERA |= {"masked_unit_size": [4, 4], "image_size": [32, 32]}
WINDOWED: dict[str, Any] = {
    "swin": lambda: SwinForImageClassification(SwinConfig(window_size=4, **SWIN)),
    "swinv2": lambda: Swinv2Model(Swinv2Config(window_size=4, **SWIN)),
    "donut": lambda: DonutSwinModel(DonutSwinConfig(window_size=4, **SWIN)),
    "hiera": lambda: HieraForImageClassification(
        HieraConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], num_query_pool=1, **HIERA)
    ),
    "vitdet": lambda: VitDetBackbone(
        VitDetConfig(
            image_size=64,
            patch_size=8,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            window_size=4,
            window_block_indices=[0],
        )
    ),
    "timm-swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=12, num_heads=(1, 1)
    ),
    "timm-twins": lambda: timm.create_model("twins_svt_small"),
}


@pytest.mark.parametrize("name", list(WINDOWED))
def test_windows_are_refused_when_the_adapter_is_made(name: str) -> None:
    with pytest.raises(ValueError, match="within windows"):
        mept(WINDOWED[name]())


# -- names and numbers that are not there -----------------------------------------------------------------------------


def test_a_config_that_served_another_model_is_not_blamed_on_its_targets() -> None:
    config = MEPTConfig(num_virtual_tokens=2, task_type="SEQ_CLS")
    get_peft_model(bert(), config)
    with pytest.raises(ValueError, match=r"This config was used for another model before.*Make a new config"):
        get_peft_model(distilbert(), config)


@pytest.mark.parametrize("record", [True, False], ids=["with-record", "of-older-versions"])
def test_an_adapter_of_another_model_is_not_blamed_on_its_targets(record: bool, tmp_path: Path) -> None:
    model = mept(bert(), task_type="SEQ_CLS")
    model.peft_config["default"].base_model_name_or_path = "library/bert-of-ours"
    model.save_pretrained(tmp_path)
    if not record:
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_record": None}))
    with pytest.raises(ValueError, match=r"The adapter was made for .*base model it was made for") as caught:
        PeftModel.from_pretrained(distilbert(), tmp_path)
    assert "library/bert-of-ours" in str(caught.value) and "Leave target_modules unset" not in str(caught.value)


def test_layers_pattern_says_which_number_counts() -> None:
    model = mept(bert(), task_type="SEQ_CLS", layers_to_transform=[1], layers_pattern="layer")
    assert [name for name, _ in model.named_modules() if name.endswith("promptmoe") and ".layer.1." in name]
    assert not [name for name, _ in model.named_modules() if name.endswith("promptmoe") and ".layer.0." in name]


@pytest.mark.parametrize(
    ("config", "wrong", "said"),
    [
        (MEPTConfig, {"num_expert": 3}, "Did you mean 'num_experts'"),
        (MEPTConfig, {"router_centring": True}, r"Did you mean 'router_centering'\?"),
        (MEPTConfig, {"target_module": []}, r"Did you mean 'target_modules'\?"),
        (MEPTConfig, {"dispatcher": "token"}, r"It is a field of PMoEConfig\."),
        (VAPTConfig, {"num_experts": 3}, r"It is a field of MEPTConfig\."),
        (VAPTConfig, {"bottleneck": 3}, r"Did you mean 'bottleneck_dim'\?"),
        (PMoEConfig, {"expert": []}, "Did you mean 'experts'"),
        (ProMotionConfig, {"num_prototype": 3}, r"Did you mean 'num_prototypes'\?"),
        (ProMotionConfig, {"zzz": 3}, r"help\(ProMotionConfig\) names its fields"),
    ],
)
def test_unknown_fields_get_a_suggestion(config: Any, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said) as caught:
        config(**wrong)
    assert "got an unexpected keyword argument" in str(caught.value)  # by which PEFT knows it


def test_files_of_later_versions_and_copies_of_configs_still_load(tmp_path: Path) -> None:
    config = MEPTConfig(num_experts=3)
    assert copy.deepcopy(config) == copy.copy(config) == pickle.loads(pickle.dumps(config)) == config
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_tomorrow": 1}))
    with pytest.warns(UserWarning, match="of_tomorrow"):
        assert MEPTConfig.from_pretrained(tmp_path).num_experts == 3


# -- base models that PEFT's auto classes cannot make -----------------------------------------------------------------


@pytest.mark.parametrize("allowed", [None, ["timm"]], ids=["", "import-allowed"])
def test_auto_classes_say_what_to_do_with_timm(allowed: Any, tmp_path: Path) -> None:
    base = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    get_peft_model(base, VAPTConfig(num_virtual_tokens=2)).save_pretrained(tmp_path)
    for auto in (AutoPeftModel, AutoPeftModelForSequenceClassification):
        with pytest.raises(ValueError, match=r"one of timm \(timm.create_model.*PeftModel.from_pretrained\(model, "):
            auto.from_pretrained(tmp_path, import_allowlist=allowed)


def test_auto_classes_leave_other_adapters_errors_alone(tmp_path: Path) -> None:
    base = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    get_peft_model(base, LoraConfig(target_modules=["qkv"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="import allowlist"):
        AutoPeftModel.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
        AutoPeftModel.from_pretrained(tmp_path)


# -- images of another size -------------------------------------------------------------------------------------------


def clip() -> Any:
    return CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=4, **SIZES))


def timm_vit(**settings: Any) -> Any:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=3,
        **settings,
    )


CONFIGS = {
    "mept": MEPTConfig(num_virtual_tokens=2),
    "vapt": VAPTConfig(num_virtual_tokens=2),
    "pmoe": PMoEConfig(num_virtual_tokens=2),
    "promotion": ProMotionConfig(num_prototypes=4, bottleneck_dim=8),
}


@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize(
    ("base", "fix", "way_out"),
    [
        (vit, "interpolate_pos_encoding=True", {"interpolate_pos_encoding": True}),
        (clip, "interpolate_pos_encoding=True", {"interpolate_pos_encoding": True}),
        (timm_vit, r"img_size=\(24, 32\) or dynamic_img_size=True", None),
    ],
    ids=["vit", "clip", "timm"],
)
def test_images_of_another_size_name_the_size_and_the_fix(base: Any, fix: str, way_out: Any, method: str) -> None:
    model = get_peft_model(base(), copy.deepcopy(CONFIGS[method])).eval()
    images = torch.randn(1, 3, 24, 32)
    with pytest.raises(ValueError, match=rf"24 x 32 pixels, and the image_size of \w+ is 16 x 16\..*{fix}"):
        model(images)
    assert model(images[..., :16, :16]) is not None
    if way_out is not None:
        model(images, **way_out)
    else:
        get_peft_model(base(dynamic_img_size=True), copy.deepcopy(CONFIGS[method])).eval()(images)
    with model.disable_adapter(), pytest.raises((ValueError, AssertionError, RuntimeError)) as caught:
        model(images)
    assert "Resize the images" not in str(caught.value)  # the model's own
