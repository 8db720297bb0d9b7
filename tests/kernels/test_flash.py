# SPDX-License-Identifier: Apache-2.0
"""Prompts under flash attention are prompts under sdpa: a reference kernel in float64 behind transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from flash_reference import flash_attn_func, flash_installed, use
from models import (
    MODELS,
    PADDING,
    REFERENCE,
    ROUTING,
    TOKENS,
    WINDOW,
    base_model,
    gradients,
    logits_of_text,
    prompted,
    same,
    text,
)
from peft import get_peft_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

from peft_promptmoe import MEPTConfig

CAUSAL = ["llama", "mistral", "gemma2", "gpt_oss"]
# What a layer caps cannot have gates, and BERT reads its answer off the first column, padding or not.
CASES = [
    (model, routing, padding)
    for model in (*CAUSAL, "bert")
    for routing in ROUTING
    for padding in PADDING
    if (model, routing) != ("gemma2", "token") and (model, padding) != ("bert", "left")
]
NAMES = ["flash_attention_2", "flash_attention_3"]


@pytest.fixture(autouse=True)
def calls() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    with flash_installed() as seen:
        yield seen


def both(name: str, routing: str, flash: str = NAMES[0], **settings: Any) -> tuple[Any, Any]:
    """The same prompted model under its reference kernel and under flash attention."""
    known, other = (prompted(base_model(name, REFERENCE[name], **settings), routing) for _ in range(2))
    use(other, flash)
    return known, other


@pytest.mark.parametrize("name, routing, padding", CASES)
def test_outputs_and_gradients(name: str, routing: str, padding: str, calls: list[Any]) -> None:
    known, flash = both(name, routing)
    batch = text(padding, causal=name in CAUSAL)
    found = logits_of_text(flash, batch)
    same(found, logits_of_text(known, batch), name)
    assert [kind for kind, _ in calls] == ["fixed" if padding == "none" else "varlen"] * 2
    assert all(told["causal"] == (name in CAUSAL) for _, told in calls)
    with flash.disable_adapter(), known.disable_adapter():
        base = logits_of_text(flash, batch)
        if REFERENCE[name] == "sdpa":  # eager attention has no answer for padding in front of a text
            same(base, logits_of_text(known, batch))
    assert (found - base).abs().max() > 1e-3
    expected = gradients(known, batch)
    assert any("prompts" in parameter for parameter in expected)
    for parameter, gradient in gradients(flash, batch).items():
        same(gradient, expected[parameter], name)


@pytest.mark.parametrize("name", ["flash_attention_3", "kernels-community/flash-attn2"])
def test_every_name_of_the_same_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "/" in name:  # what transformers does when it has fetched one from the Hub
        monkeypatch.setitem(AttentionInterface._global_mapping, name, flash_attention_forward)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, flash_attention_mask)
    known, flash = both("llama", "token", name)
    batch = text("left", causal=True)
    same(logits_of_text(flash, batch), logits_of_text(known, batch))
    base = base_model("llama", "eager")
    use(base, name)
    get_peft_model(base, MEPTConfig(init_weights=False))  # not refused


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("routing", ROUTING)
def test_generation(routing: str, padding: str, cache: str | None) -> None:
    known, flash = both("llama", routing)
    batch = text(padding, causal=True)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    expected = known.generate(**given, **settings)
    assert torch.equal(flash.generate(**given, **settings), expected)
    with known.disable_adapter():
        assert not torch.equal(known.generate(**given, **settings), expected)


@pytest.mark.parametrize("routing", ["static", "token"])
@pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens"])
def test_packed_rows(told: str, routing: str, calls: list[Any]) -> None:
    """Every sample of a packed row sees the rows, and gives what it gives alone."""
    known, flash = both("llama", routing)
    lengths = (4, 1, 6)
    samples = [
        torch.randint(3, 40, (1, length), generator=torch.Generator().manual_seed(length)) for length in lengths
    ]
    packed = {
        "input_ids": torch.cat(samples, dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    if told == "cu_seq_lens":
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        packed |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
    found = flash(**packed).logits.split(lengths, dim=1)
    assert [kind for kind, _ in calls] == ["varlen"] * 2
    for sample, logits in zip(samples, found, strict=True):
        same(logits, known(input_ids=sample).logits)


def test_a_row_that_is_not_packed_is_one_sample(calls: list[Any]) -> None:
    known, flash = both("llama", "token")
    ids = text("none", causal=True)["input_ids"][:1]
    given = {"input_ids": ids, "position_ids": torch.arange(5, 5 + TOKENS)[None]}
    same(flash(**given).logits, known(**given).logits)
    assert [kind for kind, _ in calls] == ["fixed"] * 2


def test_attached_before_the_model_goes_to_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts start from a run of the model, which flash attention cannot do on a CPU."""
    rows = {}
    for implementation in ("eager", "flash_attention_2"):
        base = base_model("llama", "eager")
        use(base, implementation)
        torch.manual_seed(3)
        with monkeypatch.context() as patch:
            patch.setattr(flash_utils, "_lazy_imports", lambda *_: pytest.fail("flash attention was run"))
            model = get_peft_model(base, MEPTConfig(task_type="CAUSAL_LM"))
        rows[implementation] = torch.cat([p.flatten() for n, p in model.named_parameters() if "prompts" in n])
        assert base.config._attn_implementation == implementation
    assert torch.equal(rows["eager"], rows["flash_attention_2"])


# -- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ROUTING)
def test_rows_stay_in_the_window(routing: str, calls: list[Any]) -> None:
    """A text as long as the window would push rows out, were the window left to count them."""
    known, flash = both("mistral", routing, sliding_window=TOKENS)
    batch = text("none", causal=True)
    same(logits_of_text(flash, batch), logits_of_text(known, batch))
    assert all(told["window_size"] == (-1, -1) for _, told in calls)


def test_texts_longer_than_the_window_are_refused() -> None:
    _, flash = both("mistral", "token", sliding_window=TOKENS - 1)
    with pytest.raises(
        ValueError, match=r"9 tokens are more than the sliding window of 8.*'sdpa' or 'flex_attention'"
    ):
        flash(**text("none", causal=True))
    with flash.disable_adapter():
        flash(**text("none", causal=True))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, settings, said",
    [
        ("llama", {"head_dim": 256}, r"heads of 256 to 258 features, but this kernel supports 256"),
        (
            "gemma2",
            {},
            r"would cap the scores of chosen experts twice.*attn_implementation='eager' or routing='sample'",
        ),
    ],
    ids=["width", "cap"],
)
def test_what_chosen_experts_cannot_join_is_refused_with_the_adapter(
    name: str, settings: dict[str, Any], said: str
) -> None:
    base = base_model(name, REFERENCE[name], **settings)
    use(base, NAMES[0])
    before = [part for part, _ in base.named_modules()]
    with pytest.raises(ValueError, match=said):
        prompted(base, "token")
    assert [part for part, _ in base.named_modules()] == before
    prompted(base, "sample")


def test_heads_that_gates_make_too_wide() -> None:
    known, flash = both("llama", "token", head_dim=256)
    with pytest.raises(ValueError, match=r"heads of 256 to 2\d\d features, but this kernel supports 256"):
        flash(**text("none", causal=True))
    known, flash = both("llama", "static", head_dim=256)
    batch = text("none", causal=True)
    same(logits_of_text(flash, batch), logits_of_text(known, batch))


def test_masks_of_four_dimensions() -> None:
    _, flash = both("llama", "static")
    mask = torch.ones(3, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"takes padding masks of shape \(batch, tokens\).*\(3, 1, 9, 9\).*'sdpa'"):
        flash(input_ids=text("none", causal=True)["input_ids"], attention_mask=mask)


@pytest.mark.parametrize("name", ["paged|sdpa", "mine"])
def test_other_kernels_are_refused_before_their_masks_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At attach, and when a kernel is switched to later; without prompts they run."""

    def mine(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        assert mask == "no tensor" and module.config._attn_implementation == "mine"
        key, value = (part.transpose(1, 2).repeat_interleave(2, 2) for part in (key, value))
        return flash_attn_func(query.transpose(1, 2), key, value, causal=True), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", mine)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "mine", lambda *args, **kwargs: "no tensor")
    model = prompted(base_model("llama", "eager"), "token")
    use(model, name)
    with pytest.raises(ValueError, match=rf"{name.replace('|', '.')}'.*attn_implementation='sdpa'"):
        model(**text("left", causal=True))
    if name == "mine":
        with model.disable_adapter():
            model(**text("left", causal=True))
    base = base_model("llama", "eager")
    use(base, name)
    with pytest.raises(ValueError, match=rf"{name.replace('|', '.')}'.*attn_implementation='sdpa'"):
        get_peft_model(base, MEPTConfig())


def test_reference_counts_from_the_end() -> None:
    """Two queries over four keys: the first sees three, the last all, a window of two the last two of these."""
    key = torch.eye(4, dtype=torch.float64)[None, :, None]
    query = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    seen = flash_attn_func(query, key, key, causal=True)[0, :, 0]
    third, quarter = 1 / 3, 1 / 4
    assert torch.allclose(seen, torch.tensor([[third, third, third, 0], [quarter] * 4], dtype=torch.float64))
    near = flash_attn_func(query, key, key, causal=True, window_size=(1, 1))[0, :, 0]
    assert near.tolist() == [[0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]]


def test_every_model_is_here() -> None:
    assert {name for name, *_ in CASES} == set(MODELS) - {"vit"} and WINDOW > TOKENS
