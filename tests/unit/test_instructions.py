# SPDX-License-Identifier: Apache-2.0
"""The mixture of instructions: what counts as an exact answer, what is in which split, and what is unpacked for it."""

from __future__ import annotations

import itertools
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "advanced"))

import assets
import learning_causal
import learning_mixture
from harness import instructions
from harness.instructions import IGNORED, TASKS, answered_exactly


def test_an_answer_is_exact_if_greedy_decoding_writes_it() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, num_hidden_layers=2, eos_token_id=None, **sizes)).eval()
    asked = torch.randint(3, 30, (3, 5))
    with torch.no_grad():
        written = model.generate(asked, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape == (3, 9)
    for row, place in itertools.product(range(3), range(5, 9)):
        ids = written.clone()
        ids[row, place] = (ids[row, place] + 1) % 30
        labels = torch.cat([torch.full_like(asked, IGNORED), ids[:, 5:]], dim=1)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        in_front = torch.cat([torch.randn(3, 2, 30), logits], dim=1)
        found = answered_exactly(logits, labels)
        assert torch.equal(answered_exactly(in_front, labels), found)
        assert found.tolist() == [other != row for other in range(3)]


def test_methods_have_the_settings_in_their_names() -> None:
    for name, method in learning_mixture.METHODS.items():
        made: Any = learning_causal.adapter(method)
        if name.startswith(("mept", "static")):
            assert made.start_scale == ("inputs" if name.endswith("-inputs") else "unit")
            assert made.router_centering == (name == "mept-centered")
            assert made.routing == ("token" if "token" in name else "sample")


class Letters:
    """A tokenizer of single characters with a chat template that marks who speaks."""

    eos_token = "$"

    def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        return f"<{messages[0]['content']}>"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": list(map(ord, text))}


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred inputs, each in every task of BIG-bench; reviews that say which split they are of."""

    def big_bench(name: str) -> list[dict[str, Any]]:
        return [{"input": f" item {i} ", "target": f"{name} {i}"} for i in range(200)] * 2

    def rotten_tomatoes(**sizes: int) -> dict[str, Any]:
        return {
            name: {"text": [f"{name} {i}" for i in range(size)], "label": [1] * size} for name, size in sizes.items()
        }

    monkeypatch.setattr(assets, "big_bench", big_bench)
    monkeypatch.setattr(assets, "rotten_tomatoes", rotten_tomatoes)


def test_no_input_is_in_two_splits_and_every_task_has_its_share(sources: None) -> None:
    made = instructions.splits(Letters(), {"train": 60, "dev": 30, "test": 30})  # type: ignore[arg-type]
    asked: dict[str, set[str]] = {}
    for name, split in made.items():
        assert split.tasks.bincount().tolist() == [len(split) // len(TASKS)] * len(TASKS)
        for row, task in zip(split.rows, split.tasks.tolist(), strict=True):
            text = "".join(map(chr, row["input_ids"]))
            question, answer = text[1:].split(">")
            learnt = "".join(chr(label) for label in row["labels"] if label != IGNORED)
            given = question.split("\n\n")[1]
            number = given.split()[-1]
            wanted = "positive" if TASKS[task] == "sentiment" else f"{instructions.FILES[TASKS[task]]} {number}"
            assert answer == learnt == wanted + Letters.eos_token
            asked.setdefault(name, set()).add(given)
    for one, other in itertools.combinations(asked.values(), 2):
        assert not one & other
    assert made["dev"].of("past").tasks.tolist() == [TASKS.index("past")] * 5


def test_a_source_that_is_too_small_is_an_error(sources: None) -> None:
    with pytest.raises(ValueError, match=r"task question: only .* of 200 examples available"):
        instructions.splits(Letters(), {"train": 1200, "dev": 6, "test": 6})  # type: ignore[arg-type]


def test_an_archive_is_unpacked_again_where_more_of_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_PROMPTMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    fetched = []

    def download(archive: Any) -> Path:
        fetched.append(archive)
        with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as content:
            for name in ("one", "two", "three"):
                (tmp_path / name).write_text(name)
                content.add(tmp_path / name, name)
        return tmp_path / "all.tar.gz"

    monkeypatch.setattr(assets, "_download", download)
    archive: Any = SimpleNamespace(package="many", version="1", ending=".tar.gz")
    folder = assets.unpacked(archive, ("one",))
    assert [file.name for file in folder.iterdir()] == ["one"]
    for _ in range(2):
        assert (assets.unpacked(archive, ("one", "two")) / "two").read_text() == "two"
    assert len(fetched) == 2 and not (folder / "three").exists()
