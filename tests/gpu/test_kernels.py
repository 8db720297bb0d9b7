# SPDX-License-Identifier: Apache-2.0
"""Prompts under the real flash and flex kernels are prompts under sdpa, as far as bf16 can tell."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from flash_reference import flash_installed, use
from models import PADDING, ROUTING, base_model, logits_of_text, prompted, text
from torch import Tensor, nn
from torch_flash import flash_attn_func, flash_attn_varlen_func
from transformers import LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available

CAUSAL = ("llama", "mistral")
WIDE = {"hidden_size": 256, "head_dim": 64}


@contextmanager
def flash_2() -> Iterator[None]:
    """The installed package if there is one, else what torch brings along."""
    functions = (flash_attn_func, flash_attn_varlen_func)
    with nullcontext() if is_flash_attn_2_available() else flash_installed(*functions):
        yield


KERNELS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "flash_attention_2": flash_2,
    "flex_attention": nullcontext,
}
if importlib.util.find_spec("flash_attn_interface"):
    KERNELS["flash_attention_3"] = nullcontext
CASES = [
    (model, routing, padding)
    for model in (*CAUSAL, "bert")
    for routing in ROUTING
    for padding in PADDING
    if (model, padding) != ("bert", "left")
]


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    """Flex attention is compiled for each mask, and beyond some of them torch would no longer compile it."""
    yield
    torch.compiler.reset()


def models(name: str, routing: str, kernel: str, device: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """One prompted model three times: sdpa in float32, sdpa in bf16, and the kernel in bf16."""
    made = []
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        settings = WIDE if name != "bert" else {"hidden_size": 256}
        model: Any = prompted(base_model(name, "sdpa", **settings), routing)
        made.append(model.to(torch.bfloat16).to(device, dtype))
    use(made[2], kernel)
    return made[0], made[1], made[2]


def as_good_as(found: Tensor, known: Tensor, exact: Tensor) -> None:
    """As near to float32 as sdpa in bf16 is, and rounding that happens to fall well aside."""
    error, usual = ((part.float() - exact).norm() / exact.norm() for part in (found, known))
    assert torch.isfinite(found).all() and error <= 2 * usual + 2e-3, (error.item(), usual.item())
    assert usual < 0.1


@pytest.mark.parametrize("name, routing, padding", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_outputs_and_gradients(kernel: str, name: str, routing: str, padding: str, device: str) -> None:
    exact, known, other = models(name, routing, kernel, device)
    batch = {key: value.to(device) for key, value in text(padding, causal=name in CAUSAL).items()}
    with KERNELS[kernel]():
        as_good_as(*(logits_of_text(model, batch) for model in (other, known, exact)))
        for model in (exact, known, other):
            model(**batch).loss.backward()
    gradients = [
        torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (other, known, exact)
    ]
    as_good_as(*gradients)
    with other.disable_adapter(), torch.no_grad(), KERNELS[kernel]():
        base = logits_of_text(other, batch)
    assert (logits_of_text(exact, batch) - base).norm() > 0.02 * base.float().norm()


@pytest.mark.parametrize("routing", ["static", "token"])
def test_packed_rows(routing: str, device: str) -> None:
    exact, known, flash = models("llama", routing, "flash_attention_2", device)
    lengths = (40, 1, 67)
    samples = [torch.randint(3, 40, (1, length), device=device) for length in lengths]
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    with flash_2(), torch.no_grad():
        packed = flash(input_ids=torch.cat(samples, dim=1), position_ids=positions).logits.split(lengths, dim=1)
        for sample, logits in zip(samples, packed, strict=True):
            as_good_as(logits, known(input_ids=sample).logits, exact(input_ids=sample).logits)


@pytest.mark.parametrize("kernel", KERNELS)
def test_decoding_goes_on_where_the_text_ended(kernel: str, device: str) -> None:
    """Logits of each next token with a cache are those of the whole text at once."""
    # Without a router: two experts as good as each other change places by the last bit of bf16.
    exact, known, other = models("llama", "static", kernel, device)
    cache = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
    ids = text("none", causal=True)["input_ids"].to(device)
    with KERNELS[kernel](), torch.no_grad():
        cached = other(input_ids=ids[:, :5], use_cache=True)
        found = [cached.logits]
        for token in range(5, ids.shape[1]):
            cached = other(input_ids=ids[:, token : token + 1], use_cache=True, **{cache: cached.past_key_values})
            found.append(cached.logits)
        as_good_as(torch.cat(found, dim=1), known(input_ids=ids).logits, exact(input_ids=ids).logits)


@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_training_step_never_waits_for_the_device(name: str, routing: str, device: str) -> None:
    model = prompted(base_model(name, "sdpa"), routing).to(torch.bfloat16).to(device).train()
    batch = {key: value.to(device) for key, value in text("none", causal=name in CAUSAL).items()}
    batch.pop("attention_mask")  # transformers asks the device whether anything is padded
    model(**batch).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
