# SPDX-License-Identifier: Apache-2.0
"""Model cards: what they say, that they survive whoever writes cards, and that a stranger's process runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import transformers
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_hub import bert, llama, tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from peft_promptmoe import MEPTConfig, VAPTConfig, __version__
from peft_promptmoe.sharing.model_card import END, MARKER

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
NAMES = {0: "rotten", 1: "fresh", 2: "neither"}


class Hub:
    """Stands in for the Hub client; keeps the files of a folder as they were when it was uploaded."""

    def __init__(self) -> None:
        self.uploads: list[dict[str, bytes]] = []

    def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, folder_path: str, **_: Any) -> Future[None]:
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}
        self.uploads.append(files)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def download(self, folder: Path, number: int = -1) -> Path:
        folder.mkdir()
        for name, content in self.uploads[number].items():
            (folder / name).write_bytes(content)
        return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    client = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: client)
    return client


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "hub_model_id": "someone/adapter",
        "bf16": False,
        **settings,
    }


def classifier(folder: Path) -> PeftModel:
    """A BERT with an adapter, whose base model is saved in `folder`."""
    bert(folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder, id2label=NAMES)
    return get_peft_model(base, MEPTConfig(task_type="SEQ_CLS", num_virtual_tokens=2))


def run_snippet(folder: Path, ask: str) -> str:
    """What a fresh process prints that runs the card's blocks and then `ask`, next to the adapter."""
    blocks = BLOCK.findall((folder / "README.md").read_text())
    code = "\n".join(["import torch", "torch.set_num_threads(1)", *blocks[:2], "model.eval()", ask])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def check_card(card: ModelCard, method: str, pipeline: str | None, home: Path) -> None:
    assert card.content.count(MARKER) == card.content.count(END) == 1
    assert {"peft_promptmoe", method} <= set(card.data.tags)
    assert card.data.library_name == "peft" and card.data.pipeline_tag == pipeline
    assert f"peft_promptmoe {__version__}" in card.content
    assert str(home) not in card.content, "the card names a path of this machine"


IDS = torch.tensor([[4, 9, 11, 5]])
SHOW = "print([round(float(x), 4) for x in model(input_ids=torch.tensor([[4, 9, 11, 5]])).logits[0].flatten()[:6]])"


def shown(model: nn.Module) -> str:
    with torch.no_grad():
        return str([round(float(x), 4) for x in model.eval()(input_ids=IDS).logits[0].flatten()[:6]])


def test_the_trainer_s_push_keeps_the_section(hub: Hub, tmp_path: Path) -> None:
    model = classifier(tmp_path / "base")
    data = [{"input_ids": [4, 9, 5], "attention_mask": [1, 1, 1], "labels": 1}] * 4
    trainer = Trainer(model, TrainingArguments(**arguments(tmp_path / "run")), train_dataset=data)
    trainer.train()
    trainer.push_to_hub()
    folder = hub.download(tmp_path / "downloaded")
    card = ModelCard.load(folder / "README.md")
    assert "Training procedure" in card.content  # it is the Trainer's
    check_card(card, "mept", "text-classification", tmp_path)
    tokenizer(chat=False).save_pretrained(folder)
    assert run_snippet(folder, SHOW) == shown(model)
    names = run_snippet(folder, "print(model.get_base_model().config.id2label)")
    assert names == str(NAMES)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL sets a field by its old name
def test_trl_s_push_keeps_the_section(hub: Hub, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    llama(tmp_path / "base")
    settings = arguments(tmp_path / "run", save_steps=1, push_to_hub=True, hub_strategy="every_save")
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list([{"text": "word1 word2 word3 word4"}] * 4),
        processing_class=tokenizer(chat=True),
        peft_config=MEPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    trainer.train()
    trainer.push_to_hub()
    assert len(hub.uploads) >= 2
    for number in range(len(hub.uploads)):
        card = ModelCard(hub.uploads[number]["README.md"].decode())
        assert "trained using [TRL]" in card.content  # it is TRL's
        check_card(card, "mept", "text-generation", tmp_path)
    folder = hub.download(tmp_path / "downloaded")
    assert run_snippet(folder, SHOW) == shown(trainer.model)


def test_the_saved_card_has_no_blanks_and_says_what_was_set(tmp_path: Path) -> None:
    model = classifier(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    check_card(card, "mept", "text-classification", tmp_path)
    assert "More Information Needed" not in card.content
    assert "`num_virtual_tokens=2`" in card.content and "`routing='sample'`" in card.content
    assert card.data.base_model is None
    # What somebody adds stays when the adapter is saved again.
    path = tmp_path / "adapter" / "README.md"
    path.write_text(path.read_text() + "\nTrained on letters to the editor.\n")
    model.save_pretrained(tmp_path / "adapter")
    again = ModelCard.load(path)
    assert "letters to the editor" in again.content
    check_card(again, "mept", "text-classification", tmp_path)


def test_a_base_model_of_the_hub_is_named(tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_config(BertConfig(num_hidden_layers=1, hidden_size=24))
    base.config._name_or_path = base.name_or_path = "google-bert/bert-base-uncased"
    get_peft_model(base, MEPTConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "google-bert/bert-base-uncased"
    assert "base_model:adapter:google-bert/bert-base-uncased" in card.data.tags


@pytest.mark.parametrize("loaded", [True, False], ids=["pretrained", "random"])
def test_timm_cards_say_what_was_loaded(loaded: bool, tmp_path: Path) -> None:
    base = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3, depth=2, img_size=64)
    if loaded:  # trained weights have biases that are not zero
        for layer in base.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.bias)
    get_peft_model(base, VAPTConfig(num_virtual_tokens=2)).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    check_card(card, "vapt", "image-classification", tmp_path)
    assert f"pretrained={loaded}, num_classes=3, img_size=(64, 64))" in card.content
    assert ("random weights" in card.content) is not loaded


def test_the_image_of_a_card_fits(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    config.id2label = NAMES
    base = ViTForImageClassification(config)
    base.save_pretrained(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, VAPTConfig(num_virtual_tokens=2))
    model.save_pretrained(tmp_path / "adapter")
    check_card(ModelCard.load(tmp_path / "adapter" / "README.md"), "vapt", "image-classification", tmp_path)
    assert run_snippet(tmp_path / "adapter", "print(tuple(scores.shape))") == "(1, 3)"


def test_cards_of_other_methods_are_left_alone(tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_config(BertConfig(num_hidden_layers=1, hidden_size=24))
    get_peft_model(base, LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    assert "peft_promptmoe" not in (tmp_path / "README.md").read_text()
