# SPDX-License-Identifier: Apache-2.0
"""Six tasks that ask one chat model for different things, each told by its instruction alone.

* question: turn a sentence into a question; negation: negate it. BIG-bench, the same sentences in both.
* past, plural: the past tense of a verb, the plural of a noun. BIG-bench.
* sort: two to eight words in the order of the alphabet. BIG-bench.
* sentiment: is a sentence of a review positive or negative. Rotten Tomatoes, split by movie.

An answer counts if it is exactly the one on record. BIG-bench has no splits: an input's checksum says which it is in,
so that no input is in two, whichever task it belongs to.
"""

import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

import assets
import causal_lm

SPLITS = ("train", "dev", "test")
INSTRUCTIONS = {
    "question": "Turn this sentence into a question.\n\n{input}",
    "negation": "Negate this sentence.\n\n{input}",
    "past": "Write the past tense of this verb.\n\n{input}",
    "plural": "Write the plural of this noun.\n\n{input}",
    "sort": "Sort these words alphabetically.\n\n{input}",
    "sentiment": causal_lm.INSTRUCTION.replace("{text}", "{input}"),
}
FILES = {
    "question": "linguistic_mappings/question_formation_json",
    "negation": "linguistic_mappings/sentence_negation_json",
    "past": "linguistic_mappings/past_tense_json",
    "plural": "linguistic_mappings/plural_json",
    "sort": "word_sorting",
}
TASKS = tuple(INSTRUCTIONS)
LONGEST_LIST = 8
IGNORED = -100

Pair = tuple[str, str]  # input and answer


@dataclass(frozen=True)
class Instructed:
    """Questions with answers as token ids; `tasks` (N,) counts in `TASKS`, `labels` (N,) is the same."""

    rows: list[dict[str, list[int]]]
    tasks: Tensor
    collate: DataCollatorForSeq2Seq

    @property
    def labels(self) -> Tensor:
        return self.tasks

    def __len__(self) -> int:
        return len(self.rows)

    def length(self, index: int) -> int:
        return len(self.rows[index]["input_ids"])

    def batch(self, chosen: list[int]) -> dict[str, Tensor]:
        return dict(self.collate([self.rows[i] for i in chosen]))

    def of(self, task: str) -> "Instructed":
        """The part that is of one task."""
        places = (self.tasks == TASKS.index(task)).nonzero().flatten().tolist()
        return Instructed([self.rows[i] for i in places], self.tasks[places], self.collate)


def splits(tokenizer: PreTrainedTokenizerBase, sizes: dict[str, int]) -> dict[str, Instructed]:
    """Every split with an equal share of every task; `sizes` counts all tasks together."""
    parts = {task: _sentiment(sizes) if task == "sentiment" else _big_bench(task) for task in TASKS}
    collate = DataCollatorForSeq2Seq(tokenizer)
    made = {}
    for name in SPLITS:
        share = sizes[name] // len(TASKS)
        rows, tasks = [], []
        for number, task in enumerate(TASKS):
            for given, answer in _some(parts[task][name], share, task):
                rows.append(encode(INSTRUCTIONS[task].format(input=given), answer, tokenizer))
                tasks.append(number)
        made[name] = Instructed(rows, torch.tensor(tasks), collate)
    return made


def encode(question: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Question and answer as one text, with a loss on the answer only."""
    messages = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before = tokenizer(asked, add_special_tokens=False)["input_ids"]  # the template has them
    after = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    ids = before + after
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(before) + after}


def answered_exactly(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) whether greedy decoding would write just the answer: each of its tokens is the likeliest after the last.

    A greedy decoder that has written the answer so far is given what the model is given here, so one forward tells.

    Args:
        logits: (B, T or more, V) of the texts with their answers, which come last (PEFT's prompt tuning adds positions
            in front of them).
        labels: (B, T), `IGNORED` outside answers.
    """
    wanted = labels[:, 1:]
    right = logits[:, -labels.shape[1] : -1].argmax(-1) == wanted
    return (right | (wanted == IGNORED)).all(dim=1)


def _some(pairs: list[Pair], count: int, task: str) -> list[Pair]:
    """`count` pairs; an error where the source is too small, never a smaller set in silence."""
    if len(pairs) < count:
        raise ValueError(f"task {task}: only {len(pairs)} of {count} examples available")
    return random.Random(task).sample(pairs, count)


def _big_bench(task: str) -> dict[str, list[Pair]]:
    found = [(e["input"].strip(), e["target"]) for e in assets.big_bench(FILES[task]) if isinstance(e["target"], str)]
    pairs = sorted({given: answer for given, answer in found if _fits(task, given)}.items())
    return {name: [pair for pair in pairs if _split_of(pair[0]) == name] for name in SPLITS}


def _fits(task: str, given: str) -> bool:
    return task != "sort" or len(given.split()) <= LONGEST_LIST


def _split_of(given: str) -> str:
    """Three of every five inputs to train, one each to dev and test."""
    return ("train", "train", "train", "dev", "test")[zlib.crc32(given.encode()) % 5]


def _sentiment(sizes: dict[str, int]) -> dict[str, list[Pair]]:
    reviews = assets.rotten_tomatoes(**{name: sizes[name] for name in SPLITS})
    return {name: list(_answers(data["text"], data["label"])) for name, data in reviews.items()}


def _answers(texts: Iterable[str], labels: Iterable[int]) -> Iterable[Pair]:
    return ((text, causal_lm.ANSWERS[label]) for text, label in zip(texts, labels, strict=True))
