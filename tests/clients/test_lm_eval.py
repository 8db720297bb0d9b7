# SPDX-License-Identifier: Apache-2.0
"""lm-eval: log-likelihoods are those of the model itself, whatever else is in the batch, beside LoRA."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from small import WORDS, adapted, adapters, fill, llama, tokenizer

from peft_promptmoe import given_query

CLIENT = "lm-eval"
ASKED = [
    (" ".join(WORDS[i : i + length]), " " + WORDS[2 * i] + " " + WORDS[i + 1]) for i, length in enumerate((3, 9, 5, 1))
]


def scores(model: Any, batch_size: int) -> list[float]:
    harness = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=batch_size)
    asked = [Instance("loglikelihood", {}, arguments, number) for number, arguments in enumerate(ASKED)]
    return [score for score, _ in harness.loglikelihood(asked, disable_tqdm=True)]


def by_hand(model: Any) -> list[float]:
    """One text at a time, without padding."""
    found, words = [], tokenizer()
    for context, answer in ASKED:
        query, rest = (words(text, add_special_tokens=False)["input_ids"] for text in (context, answer))
        labels = torch.tensor([[-100] * len(query) + rest])
        ids = torch.tensor([query + rest])
        with torch.no_grad():
            logits = model(input_ids=ids, labels=labels).logits.log_softmax(-1)
        found.append(float(logits[0, len(query) - 1 : -1].gather(1, torch.tensor(rest)[:, None]).sum()))
    return found


def make(kind: str) -> Any:
    model = adapted(llama(), adapters("CAUSAL_LM")[kind]).eval()
    fill(model)
    return model


@pytest.mark.parametrize("kind", ["lora", "static", "token"])
def test_scores_do_not_depend_on_the_batch(kind: str) -> None:
    """`HFLM` with batches of one and of four, padded without a mask: log-likelihoods equal the model's own to 1e-4."""
    model = make(kind)
    expected = by_hand(model)
    for size in (1, 4):
        assert scores(model, size) == pytest.approx(expected, abs=1e-4)


def test_sample_routing_warns_and_takes_a_given_query() -> None:
    """Sample routing: a warning says that scores of whole texts depend on the batch. Within `given_query` they equal
    the model's own to 1e-4 in any batch.
    """
    model = make("sample")
    with pytest.warns(UserWarning, match="as lm-eval does"):
        one, four = scores(model, 1), scores(model, 4)
    assert max(abs(a - b) for a, b in zip(one, four, strict=True)) > 1e-3
    with given_query(model, 1), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*as lm-eval does")
        one, four = scores(model, 1), scores(model, 4)
    assert one == pytest.approx(four, abs=1e-4)
    assert one[3] == pytest.approx(by_hand(model)[3], abs=1e-4)  # the text whose context is one word
