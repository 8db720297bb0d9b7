# SPDX-License-Identifier: Apache-2.0
"""MEPT in the package against the loop-written oracle: logits, loss and every gradient, in float64."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import IGNORED, Batch, Mept, transformers_in_float64
from peft import get_peft_model
from tiny import FAMILIES, make_batch, make_model, read_positions, task_loss
from torch import Tensor, nn

from peft_promptmoe import MEPTConfig

TOLERANCE = 1e-10
PROMPTS_MATTER = 1e-2

# (E, K, S) and the padding it is tried with; every padding meets every family, routing and kernel.
SETTINGS: dict[str, tuple[tuple[int, int, int], str]] = {
    "e4k1s1-left": ((4, 1, 1), "left"),
    "e4k2s1-right": ((4, 2, 1), "right"),
    "e3k3s0-none": ((3, 3, 0), "none"),
    "e1k1s0-left_columns": ((1, 1, 0), "left_columns"),
    "e5k2s1-left_columns": ((5, 2, 1), "left_columns"),
    "e2k1s2-right": ((2, 1, 2), "right"),
}
PAIRS = [(family, routing) for routing in ("sample", "token") for family in FAMILIES]
PAIRS.remove(("t5_sees", "token"))  # is t5_drops
SCALE = 1.5

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one forward and backward gave. Logits are those at positions that mean something."""

    logits: Tensor
    loss: Tensor | None
    gradients: dict[str, Tensor]
    trained: dict[str, Tensor]


def mept_of(family_name: str, routing: str, experts: tuple[int, int, int], **settings: Any) -> Mept:
    # Token routing has no prompt tokens to hand to a decoder, and the package refuses to be asked for it.
    sees = FAMILIES[family_name].decoder_sees_prompts and routing == "sample"
    return Mept(*experts, routing=routing, prompt_scale=SCALE, decoder_sees_prompts=sees, **settings)


def make_peft_model(family_name: str, attn: str, mept: Mept) -> Any:
    """The package on a seeded model, all its tensors random; the same for every kernel."""
    family = FAMILIES[family_name]
    settings: dict[str, Any] = {
        "task_type": family.task_type,
        "num_experts": mept.num_experts,
        "top_k": mept.top_k,
        "num_shared_experts": mept.num_shared_experts,
        "num_virtual_tokens": mept.num_virtual_tokens,
        "routing": mept.routing,
        "renormalize_top_k": mept.renormalize_top_k,
        "prompt_scale": mept.prompt_scale,
    }
    if family.task_type == "SEQ_2_SEQ_LM":
        settings["decoder_sees_prompts"] = mept.decoder_sees_prompts
    model = get_peft_model(make_model(family, attn), MEPTConfig(**settings)).double().eval()
    generator = torch.Generator().manual_seed(7)
    for name, weight in sorted(trained_tensors(model).items()):
        if "promptmoe" in name:
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.data.copy_((0.3 if "router" in name else 1 / SCALE) * noise)
    return model


def trained_tensors(model: Any) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.get_base_model().named_parameters() if weight.requires_grad}


def outcome(family_name: str, batch: Batch, logits: Tensor, trained: dict[str, nn.Parameter]) -> Outcome:
    """Differentiate the task's loss plus a random functional of all logits, so that every position is heard."""
    family = FAMILIES[family_name]
    loss = None if batch.labels is None else task_loss(family, logits, batch.labels)
    read = read_positions(family, batch)
    logits = logits if read is None else logits[read]
    ears = torch.randn(logits.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    objective = (ears * logits).sum() + (0.0 if loss is None else loss)
    gradients = torch.autograd.grad(objective, list(trained.values()), allow_unused=True, materialize_grads=True)
    values = {name: weight.detach().clone() for name, weight in trained.items()}
    detached = None if loss is None else loss.detach()
    return Outcome(logits.detach(), detached, dict(zip(trained, gradients, strict=True)), values)


Edit = Callable[[Batch], Batch] | None


@functools.cache
def expected(
    family_name: str, mept: Mept, padding: str, *, with_labels: bool, edit: Edit, rotary_lifted: bool
) -> tuple[Outcome, float]:
    """The oracle's outcome on the package's own parameters, and how far the logits are from the base model's.

    The kernel plays no part in it, and the models of all kernels are seeded alike: computed once for them. (Where the
    rotary table comes from does play a part; `check` has set that up.)
    """
    family = FAMILIES[family_name]
    batch = make_batch(family, padding, with_labels)
    batch = edit(batch) if edit else batch
    model = make_peft_model(family_name, "eager", mept)
    base = model.get_base_model()
    result = outcome(family_name, batch, family.oracle(base, batch, mept).logits(), trained_tensors(model))
    with torch.no_grad():
        plain = family.oracle(base, batch, None).logits()
    read = read_positions(family, batch)
    plain = plain if read is None else plain[read]
    return result, (result.logits - plain).abs().max().item()


def check(
    family_name: str,
    attn: str,
    mept: Mept,
    padding: str,
    *,
    with_labels: bool = True,
    edit: Edit = None,
    rotary_lifted: bool = True,
) -> None:
    family = FAMILIES[family_name]
    batch = make_batch(family, padding, with_labels)
    batch = edit(batch) if edit else batch
    with transformers_in_float64(rotary_lifted):
        model = make_peft_model(family_name, attn, mept)
        assert model.get_base_model().config._attn_implementation == attn
        out = model(**batch.kwargs())
        assert out.logits.dtype == torch.float64
        ours = outcome(family_name, batch, out.logits, trained_tensors(model))
        oracle, difference = expected(
            family_name, mept, padding, with_labels=with_labels, edit=edit, rotary_lifted=rotary_lifted
        )

    assert ours.trained.keys() == oracle.trained.keys()
    for name, value in ours.trained.items():  # or the cached oracle was not asked about this model
        assert torch.equal(value, oracle.trained[name]), name
    assert difference > PROMPTS_MATTER
    logit_error = (ours.logits - oracle.logits).abs().max().item()
    assert logit_error <= TOLERANCE, f"logits differ by {logit_error:.1e}"
    if batch.labels is not None:
        assert ours.loss is not None and oracle.loss is not None
        assert (ours.loss - oracle.loss).abs().item() <= TOLERANCE
        # transformers takes the loss of a causal LM in float32
        loose = 1e-5 if family.task_type == "CAUSAL_LM" else TOLERANCE
        assert abs(out.loss.item() - oracle.loss.item()) <= loose
    errors = {}
    for name, gradient in oracle.gradients.items():
        relative = (ours.gradients[name] - gradient).abs() / gradient.abs().clamp(min=1)
        errors[name] = relative.max().item()
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= TOLERANCE}
    assert not wrong, f"gradients differ: {wrong}"


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize(("family_name", "routing"), PAIRS, ids=[f"{family}-{routing}" for family, routing in PAIRS])
def test_equals_oracle(family_name: str, routing: str, setting: str, attn: str) -> None:
    experts, padding = SETTINGS[setting]
    check(family_name, attn, mept_of(family_name, routing, experts), padding)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("routing", ["sample", "token"])
@pytest.mark.parametrize("family_name", ["bert", "t5_sees", "llama"])
def test_renormalized_top_k(family_name: str, routing: str, attn: str) -> None:
    check(family_name, attn, mept_of(family_name, routing, (4, 2, 1), renormalize_top_k=True), "left")


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family_name", ["gpt2", "llama", "gemma3"])
def test_causal_lm_without_labels_pools_the_whole_text(family_name: str, padding: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it leaks when somebody scores a text is said, and is tested elsewhere
        check(family_name, "sdpa", mept_of(family_name, "sample", (4, 2, 1)), padding, with_labels=False)


def without_queries(batch: Batch) -> Batch:
    """Labels on every real token: there is nothing left to route on. The second sample keeps its query."""
    labels = batch.input_ids.masked_fill(batch.real == 0, IGNORED)
    assert batch.labels is not None
    labels[1] = batch.labels[1]
    return dataclasses.replace(batch, labels=labels)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family_name", ["gpt2", "llama"])
def test_empty_query_is_a_zero_router_input(family_name: str, attn: str) -> None:
    # All experts are chosen: with equal probabilities, which ones a smaller top-k takes is nobody's contract.
    check(family_name, attn, mept_of(family_name, "sample", (3, 3, 1)), "left", edit=without_queries)


@pytest.mark.parametrize(
    ("family_name", "routing"), [(f, r) for f in ("llama", "qwen3", "gemma3") for r in ("sample", "token")]
)
def test_with_the_rotary_table_as_transformers_has_it(family_name: str, routing: str) -> None:
    # In float32, that is; exact nevertheless where the text's positions begin at zero.
    check(family_name, "sdpa", mept_of(family_name, routing, (4, 2, 1)), "left", rotary_lifted=False)
