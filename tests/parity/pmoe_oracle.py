# SPDX-License-Identifier: Apache-2.0
"""pMoE written down a second time, in float64 and with loops, to compare the package with.

Nothing here imports the package. Every expert is a plain model; two hooks on each of its blocks put prompt tokens
behind the prefix tokens of the block's input and take their positions out of its output, where the next block's
dispatcher finds them. What a dispatcher does is spelled out per sample, slot and token, after section 3 of the
specification.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NORM_EPS = 1e-5


@dataclass(frozen=True)
class Expert:
    """One plain model and its trained tensors.

    Attributes:
        blocks: the model's blocks, in order.
        prefix: class and register tokens in front of its patches.
        prompts: (P, D_k) of each block.
        dispatchers: the tensors of each block's dispatcher, by name.
    """

    blocks: list[nn.Module]
    prefix: int
    prompts: list[Tensor]
    dispatchers: list[dict[str, Tensor]]


@dataclass(frozen=True)
class Mixture:
    """All experts, the base model first.

    Attributes:
        dispatcher: "token", "expert", "attention", "mean" or "none".
        carry: whether a dispatcher reads what the block before made of its prompts.
        bridges: (D_k, D_j) by (j, k), for experts of different widths.
    """

    experts: list[Expert]
    dispatcher: str
    carry: bool
    bridges: dict[tuple[int, int], Tensor]


def plain_norm(token: Tensor) -> Tensor:
    centred = token - token.sum() / token.numel()
    return centred / torch.sqrt((centred * centred).sum() / token.numel() + NORM_EPS)


def softmax(scores: list[Tensor]) -> list[Tensor]:
    peak = torch.stack(scores).max().detach()
    weights = [torch.exp(score - peak) for score in scores]
    total = sum(weights, torch.zeros_like(peak))
    return [weight / total for weight in weights]


def weighted(weights: list[Tensor], tokens: list[Tensor]) -> Tensor:
    return sum((w * token for w, token in zip(weights, tokens, strict=True)), torch.zeros_like(tokens[0]))


def times(rows: Tensor, token: Tensor) -> list[Tensor]:
    """A matrix's rows, each times a token."""
    return [(row * token).sum() for row in rows]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def seen_prompts(mixture: Mixture, reader: int, block: int) -> list[list[Tensor]]:
    """P' [K][P], each (D,): all experts' prompts at the depth of a block of `reader`, in its width."""
    depth, found = len(mixture.experts[reader].blocks), []
    for j, expert in enumerate(mixture.experts):
        middle = (block + 0.5) / depth  # of the block, on a scale on which every expert is as deep as 1
        prompts = list(expert.prompts[math.floor(middle * len(expert.blocks))])
        if (j, reader) in mixture.bridges and mixture.dispatcher != "none":
            prompts = [torch.stack(times(mixture.bridges[j, reader], prompt)) for prompt in prompts]
        found.append(prompts)
    return found


def dispatch(mixture: Mixture, reader: int, block: int, patches: Tensor, carried: Tensor | None) -> Tensor:
    """P-hat (P, D) of one image, from the patches (N, D) and carried prompts (P, D) at a block's input."""
    everyone = seen_prompts(mixture, reader, block)
    tensors, own = mixture.experts[reader].dispatchers[block], everyone[reader]
    count = len(own)
    zeros = [torch.zeros_like(prompt) for prompt in own]
    before = list(carried) if carried is not None else zeros
    tokens = [prompt for prompts in everyone for prompt in prompts]
    tokens += [*(carried if carried is not None else ()), *patches]

    if mixture.dispatcher == "none":
        return torch.stack([before[i] + own[i] for i in range(count)])
    if mixture.dispatcher == "mean":
        share = [torch.tensor(1.0 / len(everyone), dtype=patches.dtype)] * len(everyone)
        return torch.stack([before[i] + weighted(share, [p[i] for p in everyone]) for i in range(count)])
    if mixture.dispatcher == "expert":
        mean = plain_norm(sum(tokens, torch.zeros_like(tokens[0])) / len(tokens))
        hidden = [
            gelu(x + bias)
            for x, bias in zip(times(tensors["hidden_weight"], mean), tensors["hidden_bias"], strict=True)
        ]
        scores = times(tensors["weight"], torch.stack(hidden))
        gates = softmax([score + bias for score, bias in zip(scores, tensors["bias"], strict=True)])
        return torch.stack([before[i] + weighted(gates, [p[i] for p in everyone]) for i in range(count)])
    made = []
    if mixture.dispatcher == "token":
        normed = [plain_norm(token) for token in tokens]
        for i in range(count):
            scores = [(tensors["weight"][i] * token).sum() for token in normed]
            scores[reader * count + i] = scores[reader * count + i] + tensors["bias"][i]
            made.append(weighted(softmax(scores), tokens))
        return torch.stack(made)
    assert mixture.dispatcher == "attention"
    rank = len(tensors["query"])
    keys = [torch.stack(times(tensors["key"], plain_norm(token))) for token in tokens]
    values = [torch.stack(times(tensors["down"], token)) for token in tokens]
    for i in range(count):
        start = own[i] + before[i]
        query = torch.stack(times(tensors["query"], plain_norm(start)))
        found = weighted(softmax([(query * key).sum() / math.sqrt(rank) for key in keys]), values)
        made.append(start + torch.stack(times(tensors["up"], found)))
    return torch.stack(made)


@contextlib.contextmanager
def prompted_experts(mixture: Mixture) -> Iterator[None]:
    """Within, every block of every plain model runs with its prompts behind the prefix tokens."""
    handles: list[Any] = []
    for number, expert in enumerate(mixture.experts):
        left_behind: list[Tensor] = []  # prompt positions of the previous block's output, (B, P, D)
        for index, block in enumerate(expert.blocks):
            handles.append(
                block.register_forward_pre_hook(_put_in(mixture, number, index, left_behind), with_kwargs=True)
            )
            handles.append(block.register_forward_hook(_take_out(expert, left_behind)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _put_in(mixture: Mixture, number: int, index: int, left_behind: list[Tensor]) -> Callable[..., Any]:
    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        prefix = mixture.experts[number].prefix
        carried = left_behind[-1] if mixture.carry and index > 0 else [None] * len(x)
        prompts = torch.stack(
            [
                dispatch(mixture, number, index, sample[prefix:], before)
                for sample, before in zip(x, carried, strict=True)
            ]
        )
        x = torch.cat([x[:, :prefix], prompts, x[:, prefix:]], dim=1)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    return hook


def _take_out(expert: Expert, left_behind: list[Tensor]) -> Callable[..., Any]:
    def hook(block: nn.Module, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        stop = expert.prefix + len(expert.prompts[0])
        left_behind.append(x[:, expert.prefix : stop])
        x = torch.cat([x[:, : expert.prefix], x[:, stop:]], dim=1)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    return hook


def read_features(features: list[Tensor], fusion: str, head: tuple[Tensor, Tensor], maps: Tensor | None) -> Tensor:
    """Logits (B, C) from every expert's feature (B, D_k).

    Args:
        fusion: "concat", "logits" or "mean".
        head: weight (C, D_0) and bias (C,) of the base model's classifier.
        maps: (C, sum of the further experts' D_k); None for "mean".
    """
    rows = []
    for sample in range(len(features[0])):
        read = [feature[sample] for feature in features]
        if fusion == "mean":
            mean = sum(read, torch.zeros_like(read[0])) / len(read)
            rows.append(torch.stack(times(head[0], mean)) + head[1])
            continue
        assert maps is not None
        # A linear head on the concatenated features.
        joined = torch.stack(times(torch.cat([head[0], maps], dim=1), torch.cat(read))) + head[1]
        rows.append(joined / len(read) if fusion == "logits" else joined)
    return torch.stack(rows)
