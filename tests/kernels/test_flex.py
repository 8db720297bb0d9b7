# SPDX-License-Identifier: Apache-2.0
"""Prompts under flex attention are prompts under sdpa: a reference kernel in float64 behind transformers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import transformers.integrations.flex_attention as flex_integration
import transformers.masking_utils as masking
from flash_reference import use
from flex_reference import flex_attention
from models import PADDING, REFERENCE, ROUTING, TOKENS, base_model, gradients, logits_of_text, prompted, same, text
from peft import get_peft_model
from torch.nn.attention.flex_attention import create_block_mask

from peft_promptmoe import MEPTConfig, VAPTConfig

CAUSAL = ["llama", "mistral", "gemma2"]
CASES = [
    (model, routing, padding)
    for model in (*CAUSAL, "bert")
    for routing in ROUTING
    for padding in PADDING
    if (model, routing) != ("gemma2", "token") and (model, padding) != ("bert", "left")
]


@pytest.fixture(autouse=True)
def plain_flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """The reference behind transformers; queries and columns of each call are noted."""
    seen: list[tuple[int, int]] = []

    def plain(query: Any, key: Any, value: Any, training: bool = False, **kwargs: Any) -> torch.Tensor:
        seen.append((query.shape[2], key.shape[2]))
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", plain)

    def uncompiled(*args: Any, _compile: bool, **kwargs: Any) -> Any:
        return create_block_mask(*args, **kwargs)

    monkeypatch.setattr(masking, "create_block_mask", uncompiled)
    with torch._dynamo.config.patch(disable=True):
        yield seen


def both(name: str, make: Any, **settings: Any) -> tuple[Any, Any]:
    known, flex = (make(base_model(name, REFERENCE[name], **settings)) for _ in range(2))
    use(flex, "flex_attention")
    return known, flex


@pytest.mark.parametrize("name, routing, padding", CASES)
def test_outputs_and_gradients(name: str, routing: str, padding: str, plain_flex: list[Any]) -> None:
    # A window that the text does not fit into: rows stay in it.
    known, flex = both(
        name, partial(prompted, routing=routing), **({"sliding_window": 4} if name == "mistral" else {})
    )
    batch = text(padding, causal=name in CAUSAL)
    found = logits_of_text(flex, batch)
    same(found, logits_of_text(known, batch), name)
    assert plain_flex == [(TOKENS, 128 + TOKENS)] * 2
    with flex.disable_adapter(), known.disable_adapter():
        base = logits_of_text(flex, batch)
        if REFERENCE[name] == "sdpa":
            same(base, logits_of_text(known, batch))
    assert (found - base).abs().max() > 1e-3
    expected = gradients(known, batch)
    assert any("prompts" in parameter for parameter in expected)
    for parameter, gradient in gradients(flex, batch).items():
        same(gradient, expected[parameter], name)


@pytest.mark.parametrize("slots", [1, 127, 128, 130])
def test_rows_fill_whole_blocks(slots: int, plain_flex: list[Any]) -> None:
    """Texts of several blocks, some of them full, behind rows of one block and of more."""
    batch = {"input_ids": torch.randint(3, 40, (2, 300), generator=torch.Generator().manual_seed(0))}
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[1, :70] = 0
    batch["attention_mask"] = mask
    make = partial(prompted, routing="static", slots=slots)
    known, flex = both("llama", make)
    with torch.no_grad():
        same(logits_of_text(flex, batch), logits_of_text(known, batch))
    assert plain_flex == [(300, (128 if slots <= 128 else 256) + 300)] * 2


# Not with a static cache: there the frozen model itself decodes otherwise under flex attention than under sdpa, since
# the mask reads the cache's length when that has moved on.
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("routing", ROUTING)
def test_generation(routing: str, padding: str) -> None:
    known, flex = both("llama", partial(prompted, routing=routing))
    batch = text(padding, causal=True)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = known.generate(**given, **settings)
    assert torch.equal(flex.generate(**given, **settings), expected)
    with known.disable_adapter():
        assert not torch.equal(known.generate(**given, **settings), expected)


@pytest.mark.parametrize("routing", ["static", "token"])
def test_packed_rows(routing: str) -> None:
    known, flex = both("llama", partial(prompted, routing=routing))
    lengths = (4, 1, 6)
    samples = [
        torch.randint(3, 40, (1, length), generator=torch.Generator().manual_seed(length)) for length in lengths
    ]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    # A cache would hold one text, so with one transformers takes the row for one sample.
    packed = flex(input_ids=torch.cat(samples, dim=1), position_ids=positions, use_cache=False)
    found = packed.logits.split(lengths, dim=1)
    for sample, logits in zip(samples, found, strict=True):
        same(logits, known(input_ids=sample).logits)


@pytest.mark.parametrize("method", ["mept", "vapt"])
def test_images(method: str) -> None:
    config = VAPTConfig(num_virtual_tokens=3, bottleneck_dim=2) if method == "vapt" else None

    def make(base: Any) -> Any:
        torch.manual_seed(1)
        return get_peft_model(base, config).double().eval() if config else prompted(base, "sample")

    known, flex = both("vit", make)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    same(flex(pixel_values=pixels).logits, known(pixel_values=pixels).logits)
    with known.disable_adapter():
        assert (flex(pixel_values=pixels).logits - known(pixel_values=pixels).logits).abs().max() > 1e-4


def test_the_mask_of_a_forward_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_promptmoe.engine.kernels import flex as own

    made: list[int] = []
    shift = own._shift
    monkeypatch.setattr(own, "_shift", lambda mask, rows: (made.append(rows), shift(mask, rows))[1])
    _, flex = both("llama", partial(prompted, routing="static"))
    flex(**text("left", causal=True))
    assert made == [3]
    flex(**text("right", causal=True))
    assert made == [3, 3]


def test_switched_on_after_attaching() -> None:
    model = get_peft_model(base_model("llama", "sdpa"), MEPTConfig(task_type="CAUSAL_LM")).eval()
    batch = text("left", causal=True)
    expected = logits_of_text(model, batch)
    model.get_base_model().set_attn_implementation("flex_attention")
    same(logits_of_text(model, batch), expected)


def test_masks_of_another_kind_are_refused() -> None:
    _, flex = both("llama", partial(prompted, routing="static"))
    mask = torch.zeros(3, 1, TOKENS, TOKENS, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"takes block masks.*Tensor.*'sdpa'"):
        flex(input_ids=text("none", causal=True)["input_ids"], attention_mask=mask)
