# SPDX-License-Identifier: Apache-2.0
"""VAPT written down a second time, in float64 and with loops, to compare the package with.

Nothing here imports the package. A plain model is run as it is; two hooks on each of its blocks put prompt tokens
behind the prefix tokens of the block's input and take their positions out of its output. The block in between, its
attention included, knows nothing of prompts. What makes the prompts is spelled out per sample, patch and prompt,
after section 4 of the specification.
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
class Vapt:
    """The settings of one run, under the names of VAPTConfig."""

    num_virtual_tokens: int = 3
    bottleneck_dim: int = 5
    kernel_size: int = 2
    padding: int = 0
    use_conv: bool = True
    channelwise_kernel: bool = False
    use_projector: bool = True
    share_projector: bool = True
    learnable_scale: bool = False
    projector_scale: float = 25.0
    activation: str = "relu"
    num_static_layers: int | str = 1


@dataclass(frozen=True)
class Block:
    """The trained tensors of one block: static prompts, or what makes adaptive ones (None for what is left out)."""

    prompts: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    kernel: Tensor | None = None
    token_weight: Tensor | None = None
    token_bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: Tensor | None = None


def layer_norm(token: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    centred = token - token.sum() / token.numel()
    variance = (centred * centred).sum() / token.numel()
    return centred / torch.sqrt(variance + NORM_EPS) * gain + shift


def convolve(grid: list[list[Tensor]], kernel: Tensor, padding: int) -> list[list[Tensor]]:
    """Depth-wise convolution of a grid of tokens; kernel (1 or D, 1, K, K), stride 1, no bias."""
    rows, columns, side = len(grid), len(grid[0]), kernel.shape[-1]
    result = []
    for i in range(rows + 2 * padding - side + 1):
        line = []
        for j in range(columns + 2 * padding - side + 1):
            total = torch.zeros_like(grid[0][0])
            for di in range(side):
                for dj in range(side):
                    row, column = i + di - padding, j + dj - padding
                    if 0 <= row < rows and 0 <= column < columns:
                        total = total + kernel[:, 0, di, dj] * grid[row][column]
            line.append(total)
        result.append(line)
    return result


def softmax(scores: Tensor) -> Tensor:
    weights = torch.exp(scores - scores.max().detach())
    return weights / weights.sum()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "gelu": lambda x: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "sigmoid": lambda x: 1.0 / (1.0 + torch.exp(-x)),
    "softmax": softmax,
    "identity": lambda x: x,
}


def bottleneck(z: Tensor, block: Block, vapt: Vapt) -> Tensor:
    """g of one prompt [D]: W2 sigma(W1 z), where W1 and W2 are stored smaller by a factor."""
    assert block.down is not None and block.up is not None
    factor = vapt.projector_scale
    hidden = ACTIVATIONS[vapt.activation](torch.stack([(factor * row * z).sum() for row in block.down]))
    return sum((hidden[k] * factor * block.up[:, k] for k in range(len(hidden))), torch.zeros_like(z))


def adaptive_prompts(patches: Tensor, shape: tuple[int, int], block: Block, vapt: Vapt) -> Tensor:
    """Prompts (P, D) of one image from the patches (H * W, D) at a block's input: steps b to g."""
    gain, shift, weight, bias = block.gain, block.shift, block.token_weight, block.token_bias
    assert gain is not None and shift is not None and weight is not None and bias is not None
    rows, columns = shape
    assert len(patches) == rows * columns
    grid = [[layer_norm(patches[i * columns + j], gain, shift) for j in range(columns)] for i in range(rows)]
    if vapt.use_conv:
        assert block.kernel is not None
        grid = convolve(grid, block.kernel, vapt.padding)
    flat = [token for line in grid for token in line]
    prompts = []
    for p in range(vapt.num_virtual_tokens):
        z = sum((weight[p, n] * token for n, token in enumerate(flat)), torch.zeros_like(flat[0])) + bias[p]
        if vapt.use_projector:
            scale = 1.0 if block.scale is None else block.scale
            z = z + scale * bottleneck(z, block, vapt)
        prompts.append(z)
    assert weight.shape == (vapt.num_virtual_tokens, len(flat))
    return torch.stack(prompts)


def grown(mask: Tensor, prefix: int, count: int) -> Tensor:
    """An additive mask (..., T, T) that says nothing about prompts behind the prefix tokens."""
    for dim in (-2, -1):
        before, after = mask.split([prefix, mask.shape[dim] - prefix], dim=dim)
        between = before[..., :1] if dim == -1 else before[..., :1, :]
        between = torch.zeros_like(between).repeat_interleave(count, dim=dim)
        mask = torch.cat([before, between, after], dim=dim)
    return mask


@contextlib.contextmanager
def prompted_blocks(
    blocks: list[nn.Module],
    trained: list[Block],
    vapt: Vapt,
    prefix: int,
    shape: tuple[int, int],
    masked: str | None = None,
) -> Iterator[None]:
    """Within, every block of a plain model runs with its prompts behind the prefix tokens.

    Args:
        blocks: the model's blocks, in order.
        trained: the tensors of each.
        vapt: settings.
        prefix: class, distillation and register tokens in front of the patches.
        shape: rows and columns of patches.
        masked: name of the blocks' attention layer, where it takes relative positions as a mask.
    """
    count = vapt.num_virtual_tokens

    def put_in(tensors: Block) -> Callable[..., Any]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            if tensors.prompts is not None:
                prompts = torch.stack([tensors.prompts] * len(x))
            else:
                prompts = torch.stack([adaptive_prompts(sample[prefix:], shape, tensors, vapt) for sample in x])
            x = torch.cat([x[:, :prefix], prompts, x[:, prefix:]], dim=1)
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        return hook

    def take_out(block: nn.Module, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        x = torch.cat([x[:, :prefix], x[:, prefix + count :]], dim=1)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def grow(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": grown(kwargs["attention_mask"], prefix, count)}

    handles: list[Any] = []
    for block, tensors in zip(blocks, trained, strict=True):
        handles.append(block.register_forward_pre_hook(put_in(tensors), with_kwargs=True))
        handles.append(block.register_forward_hook(take_out))
        if masked is not None:
            handles.append(block.get_submodule(masked).register_forward_pre_hook(grow, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
