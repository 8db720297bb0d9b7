# SPDX-License-Identifier: Apache-2.0
"""`generate`: the cache changes nothing, beams and sampling work, padding changes nothing."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ALL_KERNELS, Batch, Case, assert_different, each_case
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

NEW = 6
# `past_key_values` before transformers 5.24
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def generates(case: Case) -> bool:
    return case.architecture.generates


def cache_is_exact(case: Case) -> bool:
    """Whether decoding without a cache defines the same model: not where routing reads the growing text."""
    return case.task_type == "SEQ_2_SEQ_LM" or (case.is_causal_lm and case.variant.causal)


def generate(model: PeftModel, batch: Batch, **kwargs: Any) -> Tensor:
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | kwargs
    return model.generate(**batch, **settings)


def new_tokens(case: Case, found: Tensor, batch: Batch) -> Tensor:
    return found[:, batch["input_ids"].shape[1] if case.is_causal_lm else 1 :]


@pytest.fixture
def model(case: Case) -> PeftModel:
    return case.model()


@pytest.fixture
def batch(case: Case) -> Batch:
    return case.prompt_only(case.batch((7, 7)))


@each_case(lambda case: generates(case) and cache_is_exact(case), kernels=ALL_KERNELS)
@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
def test_cached_equals_uncached(case: Case, model: PeftModel, batch: Batch, beams: int) -> None:
    options = {"num_beams": beams, "output_scores": True, "return_dict_in_generate": True}
    cached, uncached = (generate(model, batch, use_cache=use_cache, **options) for use_cache in (True, False))
    assert cached.sequences.tolist() == uncached.sequences.tolist()
    for step, (left, right) in enumerate(zip(cached.scores, uncached.scores, strict=True)):
        torch.testing.assert_close(
            left, right, rtol=1e-3, atol=1e-3, msg=lambda text, step=step: f"step {step}: {text}"
        )
    with model.disable_adapter():
        base = generate(model, batch, **options)
    assert_different(base.scores[-1].clamp(min=-1e4), cached.scores[-1].clamp(min=-1e4), "scores of base and prompted")


@each_case(generates, kernels=ALL_KERNELS)
def test_a_static_cache_equals_a_dynamic_one(case: Case, model: PeftModel, batch: Batch) -> None:
    expected = generate(model, batch)
    assert generate(model, batch, cache_implementation="static").tolist() == expected.tolist()
    # the model keeps its static cache for the next call, which must not go on with the rows of this one
    assert generate(model, batch, cache_implementation="static").tolist() == expected.tolist()


@each_case(generates)
def test_beams_run(case: Case, model: PeftModel, batch: Batch) -> None:
    found = generate(model, batch, num_beams=3, num_return_sequences=2)
    assert new_tokens(case, found, batch).shape == (4, NEW)
    singles = [
        generate(model, {name: value[i : i + 1] for name, value in batch.items()}, num_beams=3) for i in range(2)
    ]
    together = generate(model, batch, num_beams=3)
    assert together.tolist() == torch.cat(singles).tolist()


@each_case(generates)
def test_sampling_runs(case: Case, model: PeftModel, batch: Batch) -> None:
    settings: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_k": 20, "num_return_sequences": 3}
    torch.manual_seed(3)
    first = generate(model, batch, **settings)
    torch.manual_seed(3)
    assert generate(model, batch, **settings).tolist() == first.tolist()
    assert new_tokens(case, first, batch).shape == (6, NEW)
    assert first.unique(dim=0).shape[0] > 2


@each_case(lambda case: generates(case) and case.architecture.left is not None, kernels=ALL_KERNELS)
def test_a_left_padded_batch_equals_its_samples(case: Case, model: PeftModel) -> None:
    lengths = (7, 3, 5)
    batch = case.prompt_only(case.batch(lengths, side="left"))
    together = new_tokens(case, generate(model, batch), batch)
    for i, length in enumerate(lengths):
        alone = {"input_ids": batch["input_ids"][i : i + 1, 7 - length :]}
        assert together[i].tolist() == new_tokens(case, generate(model, alone), alone)[0].tolist(), f"sample {i}"


@each_case(lambda case: case.is_causal_lm)
def test_generation_equals_steps_by_hand(case: Case, model: PeftModel, batch: Batch) -> None:
    """The prefill chooses experts or rows once; decoding steps pick them up with the cache object alone."""
    expected = new_tokens(case, generate(model, batch), batch)
    ids, cache, found = batch["input_ids"], None, []
    with torch.no_grad():
        for _ in range(NEW):
            output = model(input_ids=ids, **{CACHE: cache}, use_cache=True)
            scores, cache = output.logits[:, -1:], output[CACHE]
            scores[..., model.config.get_text_config().eos_token_id] = -torch.inf  # as min_new_tokens does
            ids = scores.argmax(-1)
            found.append(ids)
    assert torch.cat(found, dim=1).tolist() == expected.tolist()


@each_case(lambda case: case.is_causal_lm)
def test_a_cache_from_another_model_is_refused(case: Case, model: PeftModel, batch: Batch) -> None:
    with torch.no_grad(), model.disable_adapter():
        cache = model(**batch, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="Start from a new cache"), torch.no_grad():
        model(input_ids=batch["input_ids"][:, :1], **{CACHE: cache}, use_cache=True)


@each_case(lambda case: case.is_causal_lm and case.variant.causal)
def test_decoding_in_chunks_equals_one_forward(case: Case, model: PeftModel) -> None:
    """A cache that is filled in parts, and one that goes on with several tokens at once."""
    batch = case.prompt_only(case.batch((8, 8)))
    with torch.no_grad():
        expected = model(**batch).logits
        cache, parts = None, []
        for chunk in batch["input_ids"].split([3, 1, 4], dim=1):
            output = model(input_ids=chunk, **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-3, atol=1e-3)
    assert_different(expected[:, 0], expected[:, 1], "logits")


# What is done to a cache of two samples, and which of them it holds then.
OPERATIONS: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "copy": (copy.deepcopy, [0, 1]),
}


def takes_static_caches(case: Case) -> bool:
    """Bloom makes its linear biases as long as the mask, which a static cache is not; so does the base model alone."""
    return case.is_causal_lm and case.architecture_name != "bloom"


@each_case(lambda case: case.is_causal_lm)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_follow_what_is_done_to_a_cache(case: Case, model: PeftModel, operation: str) -> None:
    """As for a cache that was filled in that order at once, with padding on the left, by which rows differ."""
    check_rows_follow(case, model, operation, lambda config: DynamicCache(config=config))


@each_case(takes_static_caches)
@pytest.mark.parametrize("operation", ["reorder", "copy"])
def test_rows_follow_what_is_done_to_a_static_cache(case: Case, model: PeftModel, operation: str) -> None:
    check_rows_follow(case, model, operation, lambda config: StaticCache(config=config, max_cache_len=12))


def check_rows_follow(case: Case, model: PeftModel, operation: str, new_cache: Callable[[Any], Any]) -> None:
    change, order = OPERATIONS[operation]
    batch = case.prompt_only(case.batch((8, 3), side="left"))
    step = torch.tensor([[7], [11]])
    mask = torch.cat([batch["attention_mask"], torch.ones_like(step)], dim=1)

    def filled(samples: list[int]) -> Any:
        cache = new_cache(model.get_base_model().config)
        model(**{name: value[samples] for name, value in batch.items()}, **{CACHE: cache}, use_cache=True)
        return cache

    def goes_on(cache: Any) -> Tensor:
        more = {"input_ids": step[order], "attention_mask": mask[order]}
        return model(**more, **{CACHE: cache}, use_cache=True).logits  # type: ignore[no-any-return]

    with torch.no_grad():
        expected, cache = goes_on(filled(order)), filled([0, 1])
        found = goes_on(change(cache) or cache)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        if operation == "copy":
            torch.testing.assert_close(goes_on(cache), expected, rtol=1e-4, atol=1e-4)


@each_case(lambda case: case.is_causal_lm)
def test_generation_runs_in_training_mode_without_gradients(case: Case, model: PeftModel, batch: Batch) -> None:
    """As trainers do that learn from what a model writes; nothing is learnt while it writes."""
    expected = generate(model, batch)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    assert generate(model, batch).tolist() == expected.tolist()
