# SPDX-License-Identifier: Apache-2.0
"""`make demo`, small: its adapter, loaded by its own card's code in a fresh process, gives the scores it printed."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from run_pages import blocks
from tiny_hub import bert
from transformers import AutoTokenizer, BertModel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "advanced"))

import text_classification  # noqa: E402

# Appended to the code of the card.
LABEL = """
import json, sys

model.eval()
for text in json.loads(sys.argv[1]):
    chances = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
    print(f"{model.get_base_model().config.id2label[int(chances.argmax())]} {chances.max():.6f}")
"""


def write_base(folder: Path) -> None:
    """A BERT whose random weights are large enough for its words to make a difference."""
    bert(folder)
    model = BertModel.from_pretrained(folder)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8.0)
    model.save_pretrained(folder)


def write_texts(folder: Path) -> None:
    """Texts of two kinds, told apart by their words, as the CSV files of three splits."""
    dice = random.Random(0)
    folder.mkdir()
    for split, count in {"train": 96, "validation": 16, "test": 16}.items():
        rows = []
        for number in range(count):
            kind = number % 2
            words = [f"word{dice.randrange(30) + 15 * kind}" for _ in range(dice.randrange(3, 9))]
            rows.append(f"{' '.join(words)},{('dull', 'bright')[kind]}")
        (folder / f"{split}.csv").write_text("text,label\n" + "\n".join(rows), encoding="utf-8")


def predict_here(command: list[object], check: bool) -> None:
    """What the demo's second process does, in this one: the card's code has a fresh one below, and one is enough."""
    sys.argv = [str(part) for part in command[1:]]
    text_classification.predict(text_classification.parse_args())


def test_the_card_s_code_gives_the_demo_s_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    write_base(tmp_path / "base")
    write_texts(tmp_path / "data")
    arguments = ["--model", str(tmp_path / "base"), "--dataset", str(tmp_path / "data"), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["demo", *arguments, "--epochs", "8", "--lr", "1e-2", "--show", "6"])
    trained: list[torch.nn.Module] = []
    with monkeypatch.context() as patch:
        # Of the demo alone: matplotlib asks for fonts by a process of its own on a fresh machine.
        patch.setattr(text_classification, "subprocess", SimpleNamespace(run=predict_here))
        patch.setattr(
            text_classification, "get_peft_model", lambda *made: trained.append(get_peft_model(*made)) or trained[0]
        )
        text_classification.fine_tune(text_classification.parse_args())
    printed = re.findall(
        r"^  (dull|bright) +(\d\.\d\d)  (?:wrong, it is (dull|bright): )?(.*)$", capsys.readouterr().out, re.MULTILINE
    )

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        batch = tokenizer([text for *_, text in printed], padding=True, return_tensors="pt")
        own = trained[0].eval()(**batch).logits.softmax(-1).amax(-1)

    code = "".join(blocks(tmp_path / "adapter" / "README.md"))
    texts = json.dumps([text for *_, text in printed])
    done = subprocess.run(
        [sys.executable, "-c", code + LABEL, texts],
        cwd=tmp_path / "adapter",
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    loaded = [line.split() for line in done.stdout.splitlines()[-6:]]
    assert len(printed) == 6
    assert len({chance for _, chance, *_ in printed}) > 3  # scores that tell one model from another
    assert [float(score) for _, score in loaded] == pytest.approx(own.tolist(), abs=1e-5)
    for (label, chance, truth, _), (again, score) in zip(printed, loaded, strict=True):
        assert label == again and float(chance) == pytest.approx(float(score), abs=0.0051)
        assert truth != label
