# SPDX-License-Identifier: Apache-2.0
"""What an adapter remembers of its base model, and what is said where another one comes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peft_promptmoe import MEPTConfig, VAPTConfig
from peft_promptmoe.sharing.base_record import describe_base

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert(seed: int = 0, **settings: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(vocab_size=40, **SIZES | settings))


def distilbert() -> DistilBertForSequenceClassification:
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
    )


def roberta() -> RobertaForSequenceClassification:
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=40, **SIZES))


def timm_vit(seed: int = 0, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes | settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = get_peft_model(bert(), MEPTConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    model.peft_config["default"].base_model_name_or_path = "library/bert-of-ours"  # PEFT asks the model
    model.save_pretrained(tmp_path)
    return tmp_path


LOADERS: dict[str, Callable[[Any, Path], Any]] = {
    "peft": PeftModel.from_pretrained,
    "trainable": lambda base, folder: PeftModel.from_pretrained(base, folder, is_trainable=True),
    "transformers": lambda base, folder: base.load_adapter(folder),
}


def test_what_is_recorded(folder: Path) -> None:
    record = json.loads((folder / "adapter_config.json").read_text())["base_record"]
    weights = record.pop("weights")
    assert record == {"type": "bert", "width": 16, "depth": 2, "num_labels": 2}
    assert len(weights) == 4 and all(len(digits) == 4 * 32 for digits in weights.values())
    config = get_peft_model(timm_vit(), VAPTConfig(num_virtual_tokens=2)).peft_config["default"]
    assert {key: config.base_record[key] for key in record} == {
        "type": "vit_tiny_patch16_224",
        "width": 16,
        "depth": 2,
        "num_labels": 3,
    }
    assert set(describe_base(nn.Linear(2, 2)).values()) == {None}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("other", [distilbert, roberta])
def test_another_type_names_the_model_it_was_made_for(other: Callable[[], Any], loader: str, folder: Path) -> None:
    """Before target modules are looked for, so also where they would be found (RoBERTa)."""
    kind = other.__name__
    message = rf"made for 'library/bert-of-ours', a bert with hidden size 16 and 2 layers, but this is a {kind} with"
    with pytest.raises(ValueError, match=message):
        LOADERS[loader](other(), folder)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"hidden_size": 32}, "has hidden size 32 and 2 layers"),
        ({"num_hidden_layers": 3}, "has hidden size 16 and 3 layers"),
        ({"num_hidden_layers": 1}, "has hidden size 16 and 1 layers"),
    ],
)
def test_another_size_names_the_model_it_was_made_for(settings: dict[str, int], says: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"made for 'library/bert-of-ours', a bert with hidden size 16.*{says}"):
        PeftModel.from_pretrained(bert(**settings), folder)


def said(load: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    return [str(warning.message) for warning in caught if "this base model has other weights" in str(warning.message)]


@pytest.mark.parametrize("loader", LOADERS)
def test_other_weights_of_the_same_shape_warn_once(loader: str, folder: Path) -> None:
    assert said(lambda: LOADERS[loader](bert(), folder)) == []
    (message,) = said(lambda: LOADERS[loader](bert(seed=1), folder))
    assert "the weights of 'library/bert-of-ours'" in message and "check_base_weights=False" in message


def test_the_warning_can_be_switched_off(folder: Path, tmp_path: Path) -> None:
    config = MEPTConfig.from_pretrained(folder)
    config.check_base_weights = False
    assert said(lambda: PeftModel.from_pretrained(bert(seed=1), folder, config=config)) == []
    model = get_peft_model(bert(), MEPTConfig(num_virtual_tokens=2, check_base_weights=False))
    assert model.peft_config["default"].base_record["weights"] is None
    model.save_pretrained(tmp_path / "quiet")
    assert said(lambda: PeftModel.from_pretrained(bert(seed=1), tmp_path / "quiet")) == []


def grown() -> nn.Module:
    model = bert()
    model.resize_token_embeddings(50)
    return model


def beneath() -> nn.Module:
    return get_peft_model(bert(), LoraConfig(target_modules=["query", "key"]), adapter_name="lora")


@pytest.mark.parametrize(
    "same",
    [lambda: bert().bfloat16(), lambda: bert().half(), lambda: bert().double(), lambda: bert(num_labels=5), grown],
    ids=["bfloat16", "float16", "float64", "another-head", "grown-vocabulary"],
)
def test_copies_of_the_same_weights_are_the_same(same: Callable[[], nn.Module], folder: Path, tmp_path: Path) -> None:
    get_peft_model(bert(), MEPTConfig(num_virtual_tokens=2)).save_pretrained(tmp_path / "without_head")
    assert said(lambda: PeftModel.from_pretrained(same(), tmp_path / "without_head")) == []


def test_other_adapters_beneath_change_no_name(tmp_path: Path) -> None:
    get_peft_model(beneath(), MEPTConfig(num_virtual_tokens=2), adapter_name="prompts").save_pretrained(tmp_path)
    load = {"model_id": tmp_path / "prompts", "adapter_name": "prompts"}
    assert said(lambda: PeftModel.from_pretrained(beneath(), **load)) == []
    config = MEPTConfig.from_pretrained(tmp_path / "prompts")
    assert config.base_record is not None and not any("base_layer" in name for name in config.base_record["weights"])


def test_a_few_values_that_differ_by_training_are_seen(folder: Path) -> None:
    """A model that was trained further has all of its weights changed a little."""
    further = bert()
    with torch.no_grad():
        for parameter in further.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape))
    assert len(said(lambda: PeftModel.from_pretrained(further, folder))) == 1


def test_a_config_that_is_used_again_describes_its_new_model() -> None:
    """Only files speak of a model of old."""
    config = MEPTConfig(num_virtual_tokens=2)
    get_peft_model(bert(), config)
    config.target_modules = None
    model = get_peft_model(distilbert(), config)
    assert model.peft_config["default"].base_record["type"] == "distilbert"


def test_loading_keeps_the_record(folder: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(bert(seed=1), folder, is_trainable=True).save_pretrained(tmp_path / "again")
    one, two = (json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert one["base_record"] == two["base_record"]


def test_models_without_weights_at_hand_say_nothing(folder: Path) -> None:
    with torch.device("meta"):
        base = BertForSequenceClassification(BertConfig(vocab_size=40, **SIZES))
    config = MEPTConfig(num_virtual_tokens=2, prompt_init="random")
    assert get_peft_model(base, config).peft_config["default"].base_record["weights"] is None
