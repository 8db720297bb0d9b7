# SPDX-License-Identifier: Apache-2.0
"""Prompt rows in a cache: copies of all kinds, layers within other caches, and what cannot be followed is refused."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    EncoderDecoderCache,
    LlamaForCausalLM,
    StaticCache,
    cache_utils,
)

from peft_promptmoe import MEPTConfig

CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
TEXT = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 0, 11, 12, 13]])
MASK = (TEXT > 0).long()
STEP = torch.tensor([[14], [15]])


@pytest.fixture(params=["token", "sample"])
def model(request: pytest.FixtureRequest) -> PeftModel:
    return Case("mept", "llama", request.param, "sdpa").model(init_weights=False)


def empty(kind: str, model: PeftModel) -> Any:
    config = model.get_base_model().config
    return {
        "dynamic": lambda: DynamicCache(config=config),
        "without-layers": DynamicCache,
        "static": lambda: StaticCache(config=config, max_cache_len=16),
    }[kind]()


@torch.no_grad()
def filled(model: PeftModel, cache: Any, order: tuple[int, ...] = (0, 1)) -> Any:
    rows = list(order)
    model(input_ids=TEXT[rows], attention_mask=MASK[rows], **{CACHE: cache}, use_cache=True)
    return cache


@torch.no_grad()
def goes_on(model: PeftModel, cache: Any, order: tuple[int, ...] = (0, 1)) -> Tensor:
    rows = list(order)
    mask = torch.cat([MASK, torch.ones_like(STEP)], dim=1)[rows]
    return model(  # type: ignore[no-any-return]
        input_ids=STEP[rows], attention_mask=mask, **{CACHE: cache}, use_cache=True
    ).logits


def shallow(cache: Any) -> Any:
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    return found


COPIES: dict[str, Callable[[Any], Any]] = {
    "deep": copy.deepcopy,
    "shallow": shallow,
    "pickled": lambda cache: pickle.loads(pickle.dumps(cache)),
}
KINDS = ("dynamic", "without-layers", "static")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_independent(model: PeftModel, kind: str, way: str) -> None:
    if (kind, way) == ("static", "shallow"):  # two static caches on the same tensors, with and without prompts
        return
    expected = {order: goes_on(model, filled(model, empty(kind, model), order), order) for order in ((0, 1), (1, 0))}
    cache = filled(model, empty(kind, model))
    other = COPIES[way](cache)
    other.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(goes_on(model, other, (1, 0)), expected[1, 0])
    torch.testing.assert_close(goes_on(model, cache), expected[0, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_goes_back_and_starts_anew(model: PeftModel, kind: str) -> None:
    cache = filled(model, empty(kind, model))
    expected = goes_on(model, cache)
    cache.crop(-1)
    torch.testing.assert_close(goes_on(model, cache), expected)
    cache.reset()
    other = filled(model, empty(kind, model), (1, 0))
    torch.testing.assert_close(goes_on(model, filled(model, cache, (1, 0)), (1, 0)), goes_on(model, other, (1, 0)))


def test_caches_that_were_copied_empty_do_not_share_rows(model: PeftModel) -> None:
    template = filled(model, empty("dynamic", model))
    expected = [goes_on(model, filled(model, empty("dynamic", model), order), order) for order in ((0, 1), (1, 0))]
    template.crop(-TEXT.shape[1])
    one, two = filled(model, shallow(template)), filled(model, shallow(template), (1, 0))
    torch.testing.assert_close(goes_on(model, one), expected[0])
    torch.testing.assert_close(goes_on(model, two, (1, 0)), expected[1])


def test_a_cache_of_one_text_becomes_one_of_many(model: PeftModel) -> None:
    """A prefix that several answers go on from."""
    prefix, answers = TEXT[:1], torch.tensor([[14], [15], [16]])
    with torch.no_grad():
        cache = model(input_ids=prefix, use_cache=True)[CACHE]
        cache.batch_repeat_interleave(3)
        found = model(input_ids=answers, **{CACHE: cache}, use_cache=True).logits
        whole = model(input_ids=prefix.expand(3, -1), use_cache=True)[CACHE]
        expected = model(input_ids=answers, **{CACHE: whole}, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_were_changed_by_hand_are_refused_where_rows_belong_to_samples(model: PeftModel, kind: str) -> None:
    cache = filled(model, empty(kind, model))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[[1, 0]], layer.values[[1, 0]]
    with pytest.raises(ValueError, match="reorder_cache"):
        goes_on(model, cache, (1, 0))


def test_rows_of_all_samples_go_on_with_whatever_keys() -> None:
    model = Case("mept", "llama", "token", "sdpa").model(init_weights=False)
    texts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        cache, other = (model(input_ids=ids, use_cache=True)[CACHE] for ids in (texts, texts.flip(0)))
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[[1, 0]], layer.values[[1, 0]]
        found, expected = (model(input_ids=STEP, **{CACHE: held}, use_cache=True).logits for held in (cache, other))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "part"])
def test_rows_live_in_the_own_part_of_an_encoder_decoders_cache(whole: bool) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = BertLMHeadModel(BertConfig(vocab_size=64, intermediate_size=48, is_decoder=True, **settings))
    config = MEPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, routing="sample", init_weights=False)
    model = get_peft_model(base, config).eval()
    caches = [filled(model, EncoderDecoderCache(DynamicCache(), DynamicCache()), o) for o in ((0, 1), (1, 0))]
    (caches[0] if whole else caches[0].self_attention_cache).reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(goes_on(model, caches[0], (1, 0)), goes_on(model, caches[1], (1, 0)))


def test_a_cache_without_layers_is_refused() -> None:
    model = Case("mept", "llama", "token", "sdpa").model()

    class Own:
        def get_seq_length(self, layer: int = 0) -> int:
            return 0

    attention = model.get_base_model().model.layers[0].self_attn
    angles = (torch.ones(1, 1, 4), torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match="use_cache=False"):
        attention(
            hidden_states=model.get_base_model().model.layers[0].input_layernorm(torch.ones(1, 1, 32)),
            position_embeddings=angles,
            attention_mask=None,
            **{CACHE: Own()},
        )


def test_other_caches_stay_what_they_are(model: PeftModel) -> None:
    kinds = [dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING), dict(cache_utils.STATIC_LAYER_TYPE_MAPPING)]
    cache = filled(model, empty("dynamic", model))
    filled(model, empty("static", model))
    assert kinds == [cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING]
    assert isinstance(cache.layers[0], cache_utils.DynamicLayer)
    assert repr(cache) == repr(filled(model, empty("without-layers", model)))
