# SPDX-License-Identifier: Apache-2.0
"""A query that is said by hand, where no labels tell it: what routers read of a text, and when they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from peft import PeftModel
from torch import Tensor

from peft_promptmoe import given_query

IDS = torch.randint(5, 60, (3, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sample() -> PeftModel:
    return Case("mept", "llama", "sample", "sdpa").model(init_weights=False)


def scores(model: PeftModel, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **more).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("tokens", "compiled"),
    [(0, False), (1, False), (4, False), (torch.tensor([2, 5, 3]), False), (4, True)],
    ids=["none", "one", "four", "of-each-row", "four-compiled"],
)
def test_a_given_query_is_that_of_labels(sample: PeftModel, tokens: int | Tensor, compiled: bool) -> None:
    torch._dynamo.reset()
    lengths = tokens[:, None] if isinstance(tokens, Tensor) else tokens
    labels = IDS.masked_fill(torch.arange(8) < lengths, -100)
    run = torch.compile(sample, fullgraph=True, backend="eager") if compiled else sample
    with given_query(sample, tokens):
        found = scores(run, IDS)
    torch.testing.assert_close(found, scores(sample, IDS, labels=labels), rtol=1e-5, atol=1e-5)


def test_scores_with_a_given_query_do_not_depend_on_padding_without_a_mask(sample: PeftModel) -> None:
    """As lm-eval scores texts; without the query they do, and a warning says so."""
    padded = F.pad(IDS, (0, 5))
    with given_query(sample, 3):
        torch.testing.assert_close(scores(sample, padded)[:, :8], scores(sample, IDS), rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match=r"lm-eval.*given_query"):
        assert float((scores(sample, padded)[:, :8] - scores(sample, IDS)).abs().max()) > 1e-3


def test_a_given_query_counts_no_padding(sample: PeftModel) -> None:
    left, mask = F.pad(IDS, (4, 0)), F.pad(torch.ones_like(IDS), (4, 0))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with given_query(sample, 3):
        found = scores(sample, left, attention_mask=mask, position_ids=positions)[:, 4:]
        torch.testing.assert_close(found, scores(sample, IDS), rtol=1e-4, atol=1e-4)


def test_training_without_labels_takes_a_given_query_and_looks_at_nothing_else(sample: PeftModel) -> None:
    sample.train()
    other = IDS.clone()
    other[:, -1] = 7
    with given_query(sample, 3):
        before = sample(input_ids=IDS).logits
        moved = (sample(input_ids=other).logits - before).detach().abs()
        before.sum().backward()
    assert float(moved[:, :-1].max()) < 1e-6
    assert float(moved[:, -1].max()) > 1e-3
    routers = [p for name, p in sample.named_parameters() if "mept_router." in name]
    assert routers and all(float(router.grad.abs().max()) > 0 for router in routers)
    with pytest.raises(ValueError, match="given_query"):
        sample(input_ids=IDS)


def test_where_one_answer_is_made_of_the_row_all_of_it_may_be_the_query(sample: PeftModel) -> None:
    expected = scores(sample.eval(), IDS, labels=torch.full_like(IDS, -100))
    with given_query(sample.train(), None):
        sample(input_ids=IDS).logits.sum().backward()
        torch.testing.assert_close(scores(sample.eval(), IDS), expected)


def test_logits_that_a_trainer_asks_for_are_the_answer(sample: PeftModel) -> None:
    """As GRPO and RLOO score what was written: the last tokens, and the one that these are guessed from."""
    sample.train()
    other = IDS.clone()
    other[:, -1] = 7
    kept = sample(input_ids=IDS, logits_to_keep=4).logits
    moved = (sample(input_ids=other, logits_to_keep=4).logits - kept).detach().abs()
    assert float(moved[:, :-1].max()) < 1e-6
    assert float(moved[:, -1].max()) > 1e-3
    with given_query(sample, 5):
        torch.testing.assert_close(sample(input_ids=IDS, logits_to_keep=4).logits, kept)


@pytest.mark.parametrize(
    ("case", "tokens", "message"),
    [
        (Case("mept", "llama", "token", "sdpa"), 3, "No router of this model reads a query"),
        (Case("mept", "bert", "sample", "sdpa"), 3, "No router of this model reads a query"),
        (Case("mept", "llama", "sample", "sdpa"), -1, "got -1"),
    ],
    ids=str,
)
def test_a_query_that_nobody_reads_is_refused(case: Case, tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message), given_query(case.model(), tokens):
        pass


def test_lengths_of_another_batch_are_refused(sample: PeftModel) -> None:
    with (
        pytest.raises(ValueError, match="got 2 numbers, but this batch has 3 rows"),
        given_query(sample, torch.tensor([1, 2])),
    ):
        sample(input_ids=IDS)


def test_labels_of_other_tokens_than_the_layers_are_refused(sample: PeftModel) -> None:
    with pytest.raises(ValueError, match=r"have 5 tokens, but this layer sees 8.*given_query"):
        sample.get_base_model().model(input_ids=IDS, labels=torch.full((3, 5), -100))


@pytest.mark.parametrize("routing", ["sample", "token"])
def test_texts_written_while_a_model_trains_move_no_router_centre(routing: str) -> None:
    """GRPO and its like generate in training mode, each process from prompts of its own."""
    model = Case("mept", "llama", routing, "sdpa").model(router_centering=True, init_weights=False).train()
    model(input_ids=IDS, labels=IDS.masked_fill(torch.arange(8) < 3, -100))
    known = {name: centre.clone() for name, centre in model.state_dict().items() if "center" in name}
    assert known and all(bool(centre.any()) for centre in known.values())
    asked = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    written = model.generate(input_ids=IDS, **asked)
    for name, centre in model.state_dict().items():
        if name in known:
            assert torch.equal(centre, known[name])
    assert torch.equal(model.eval().generate(input_ids=IDS, **asked), written)
