# SPDX-License-Identifier: Apache-2.0
"""What is asked of one model under one adapter; every difference is relative to the spread of the base's outputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from .inputs import Inputs, parameters_of

PROMPTS = "promptmoe"
TOLERANCE = 1e-3
CHANGED = 8  # of the columns of a text, those from here on are changed to see whether earlier outputs move
PADDING = 3
OUTPUTS = ("logits", "last_hidden_state", "encoder_last_hidden_state", "pred_boxes", "predicted_depth")


def tensor_of(output: Any) -> Tensor:
    """The output that a user reads."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return tensor_of(output[0])
    named = [output[name] for name in OUTPUTS if isinstance(output.get(name), Tensor)]
    return [*named, *(value for value in output.values() if isinstance(value, Tensor) and value.ndim)][0]


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        given = {name: value for name, value in inputs.items() if name != "labels"}
        images = given.pop("x", None)  # of timm's models, which take nothing else
        made = tensor_of(model(images) if images is not None else model(**given)).float()
    return made.masked_fill(made == torch.finfo(made.dtype).min, 0.0)  # tokens that Chameleon never lets through


def attach(base: nn.Module, config: Any) -> tuple[Any, list[str]]:
    """A prompted copy of the model, and what making it said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(copy.deepcopy(base), config)
    known = ("is_gradient_checkpointing", "stays frozen")  # peft asks by the old name; heads are none of this
    said = [str(warning.message) for warning in caught if not any(each in str(warning.message) for each in known)]
    return model.eval(), said


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Prompts that matter in place of careful ones."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if PROMPTS not in name or not parameter.requires_grad:
            continue
        scale = 0.06 if "mept_" in name and "prompts" in name else 1.0
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def faults(base: nn.Module, model: Any, kind: str, inputs: Inputs) -> list[str]:
    """What is wrong with a prompted model, as against the base that it was made from."""
    plain = run(base, inputs)
    spread = plain.std() + 1e-9
    randomise(model)
    prompted = run(model, inputs)
    found = []
    if not torch.isfinite(prompted).all() and torch.isfinite(plain).all():
        found.append("outputs that are not finite")
    if prompted.shape != plain.shape:
        found.append(f"outputs of shape {tuple(prompted.shape)}, not {tuple(plain.shape)}")
    elif (prompted - plain).abs().max() < 1e-5 * spread:
        found.append("no effect")
    with model.disable_adapter():
        if not torch.equal(run(model, inputs), plain):
            found.append("disabling does not give the base model")
    found += _gradients(model, kind, inputs)
    for name, check in _behaviours(model, kind, inputs).items():
        try:
            there = check(base)
        except (RuntimeError, ValueError, TypeError, IndexError):  # what the base cannot do is no fault of prompts
            continue
        here = check(model)
        if here > max(TOLERANCE, 3 * there):
            found.append(f"{name}: {here:.1e}, the base model {there:.0e}")
    if not torch.equal(run(model.unload(), inputs), plain):
        found.append("unloading does not give the base model")
    return found


def _gradients(model: Any, kind: str, inputs: Inputs) -> list[str]:
    """Prompt tensors that a layer which has run leaves without gradient."""
    ran: set[str] = set()
    layers = {name: module for name, module in model.named_modules() if name.endswith(f".{PROMPTS}")}
    hooks = [
        model.get_submodule(name.removesuffix(f".{PROMPTS}")).register_forward_pre_hook(
            lambda *_, name=name: ran.add(name)
        )
        for name in layers
    ]
    torch.manual_seed(0)
    model.zero_grad()
    _loss(model, inputs).backward()
    for hook in hooks:
        hook.remove()
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and any(name.startswith(f"{layer}.") for layer in ran) and "router" not in name
        if parameter.grad is None or not torch.isfinite(parameter.grad).all() or parameter.grad.abs().max() == 0
    ]
    missing = [name for name in missing if _matters(model, name.partition(f".{PROMPTS}.")[0], inputs)]
    return [f"{len(missing)} prompt tensors without gradient, {missing[0]} among them"] if missing else []


def _matters(model: Any, path: str, inputs: Inputs) -> bool:
    """Whether the model's output depends on what an attention layer puts out; LLaVA does without its last block."""

    def other(attention: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] + 1.0, *output[1:]) if isinstance(output, tuple) else output + 1.0

    before = run(model, inputs)
    hook = model.get_submodule(path).register_forward_hook(other)
    after = run(model, inputs)
    hook.remove()
    return not torch.equal(before, after)


def _loss(model: Any, inputs: Inputs) -> Tensor:
    if "x" in inputs:
        return tensor_of(model(inputs["x"])).float().square().mean()
    takes_labels = "labels" in parameters_of(model.get_base_model()) and "labels" in inputs
    given = inputs if takes_labels else {name: value for name, value in inputs.items() if name != "labels"}
    output = model(**given)
    loss = getattr(output, "loss", None)
    return loss if loss is not None else tensor_of(output).float().square().mean()


Check = Callable[[Any], float]


def _behaviours(model: Any, kind: str, inputs: Inputs) -> dict[str, Check]:
    """Properties that hold to rounding in every sound model, by name."""
    ids = inputs.get("input_ids")
    by_token = isinstance(ids, Tensor) and run(model, inputs).shape[:2] == ids.shape
    checks: dict[str, Check] = {}
    if kind == "causal" and by_token:
        checks["later tokens reach earlier outputs"] = lambda m: _leak(m, inputs)
        checks["cached generation"] = lambda m: _cache(m, inputs)
    if kind == "seq2seq" and isinstance(ids, Tensor):
        checks["cached generation"] = lambda m: _cache(m, inputs)
    if kind in ("causal", "classification", "seq2seq") and "attention_mask" in inputs:
        checks["padding on the right"] = lambda m: _padding(m, inputs, left=False, by_token=by_token)
        if kind == "causal":
            checks["padding on the left"] = lambda m: _padding(m, inputs, left=True, by_token=by_token)
    else:
        checks["a sample alone"] = lambda m: _alone(m, inputs)
    return checks


def _leak(model: Any, inputs: Inputs) -> float:
    before, ids = run(model, inputs), inputs["input_ids"].clone()
    ids[:, CHANGED:] = (ids[:, CHANGED:] + 32) % 190 + 5
    after = run(model, {**inputs, "input_ids": ids})
    return float((after - before)[:, :CHANGED].abs().max() / before.std())


def _padding(model: Any, inputs: Inputs, left: bool, by_token: bool) -> float:
    """A sample in a padded batch against itself alone."""
    ids = inputs["input_ids"]
    pad = getattr(_config(model), "pad_token_id", None)
    one, fill = ids[:1], torch.full((1, PADDING), pad if isinstance(pad, int) else 7)
    none, ones = torch.zeros(1, PADDING, dtype=torch.long), torch.ones_like(one)
    row = torch.cat([fill, one] if left else [one, fill], dim=1)
    seen = torch.cat([none, ones] if left else [ones, none], dim=1)
    other = torch.cat([ids[1:], ids[1:, :PADDING]], dim=1)
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask", "labels")}
    if "bbox" in rest:
        rest["bbox"] = torch.zeros(2, ids.shape[1] + PADDING, 4, dtype=torch.long)
    batch = rest | {"input_ids": torch.cat([row, other]), "attention_mask": torch.cat([seen, torch.ones_like(other)])}
    if by_token and "position_ids" in parameters_of(_base(model)):
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    single = {name: value[:1] if isinstance(value, Tensor) else value for name, value in rest.items()}
    if "bbox" in single:
        single["bbox"] = single["bbox"][:, : ids.shape[1]]
    alone = run(model, single | {"input_ids": one, "attention_mask": ones})
    together = run(model, batch)[:1]
    if by_token:
        together = together[:, PADDING:] if left else together[:, : one.shape[1]]
    return float((together - alone).abs().max() / alone.std())


def _alone(model: Any, inputs: Inputs) -> float:
    together = run(model, inputs)
    single = {name: _first(name, value) for name, value in inputs.items()}
    return float((run(model, single)[:1] - together[:1]).abs().max() / together.std())


def _first(name: str, value: Any) -> Any:
    """The first sample's part of an input; images may be given as rows of patches, as many for each."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    return value[: len(value) // 2] if len(value) == 2 or name == "pixel_values" else value


def _cache(model: Any, inputs: Inputs) -> float:
    """Generation with a cache against generation without, up to the first token in which they part."""
    given = {n: v for n, v in inputs.items() if n not in ("labels", "decoder_input_ids")}
    made = []
    for cache in (True, False):
        torch.manual_seed(0)
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        output = model.generate(**given, **settings, use_cache=cache, return_dict_in_generate=True, output_logits=True)
        made.append((output.sequences, torch.stack(output.logits, dim=1).float()))
    (one, left), (two, right) = made
    same = (one[:, -4:-1] == two[:, -4:-1]).long().cumprod(dim=1)
    compared = torch.cat([torch.ones(len(same), 1), same], dim=1)[:, : left.shape[1]].bool()
    return float(((left - right).abs().amax(dim=-1) * compared).max() / left.std())


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _config(model: Any) -> Any:
    return getattr(_base(model), "config", None)
