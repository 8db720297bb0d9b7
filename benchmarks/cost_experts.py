# SPDX-License-Identifier: Apache-2.0
"""What pMoE costs beside the frozen backbones it is made of: FLOPs, saved bytes, bytes held, forward time.

The base model is ViT-B/16 and the further experts are another ViT-B/16 and a ViT-S/16 of timm, with random weights.
The yardstick is the sum of the frozen forwards with as many extra tokens in every block, which do nothing. FLOPs,
bytes and parameters are exact; times are minima and medians of repeats that take turns within one process.

    python benchmarks/cost_experts.py --output benchmarks/results/cost_experts.json
    python benchmarks/cost_experts.py --repeats 0                                      # exact figures only
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from peft_promptmoe import PMoEConfig, parameter_report

from _cost import interleaved, relative, saved_bytes, show_times, write

CLASSES, PROMPTS = 100, 10
DISPATCHERS = ("token", "expert", "attention", "mean", "none")


def base() -> nn.Module:
    return ViTForImageClassification(ViTConfig(num_labels=CLASSES))


def experts(number: int) -> list[nn.Module]:
    """The first `number` further experts; of different seeds, for equal weights would be one expert."""
    torch.manual_seed(1)
    makers: list[Callable[[], nn.Module]] = [
        lambda: ViTModel(ViTConfig(), add_pooling_layer=False),
        lambda: timm.create_model("vit_small_patch16_224", num_classes=0),
    ]
    return [make() for make in makers[:number]]


def pmoe(further: list[nn.Module], dispatcher: str) -> nn.Module:
    config = PMoEConfig(experts=further, num_virtual_tokens=PROMPTS, dispatcher=dispatcher)
    return get_peft_model(base(), config)


def with_idle_tokens(model: nn.Module) -> nn.Module:
    """The frozen model whose blocks carry `PROMPTS` tokens more, put in before the first and dropped by the head."""
    blocks: Any = getattr(model, "blocks", None) or getattr(getattr(model, "vit", model), "layers", None)

    def put_in(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        return torch.cat([x, x.new_zeros(x.shape[0], PROMPTS, x.shape[2])], dim=1), *args[1:]

    blocks[0].register_forward_pre_hook(put_in)
    return model.requires_grad_(False).eval()


def count(run: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def frozen(number: int) -> list[nn.Module]:
    return [with_idle_tokens(model) for model in (base(), *experts(number))]


def run_all(models: list[nn.Module], pixels: Tensor) -> None:
    for model in models:
        model(pixels)


def exact_rows(batch: int) -> list[dict[str, Any]]:
    pixels = torch.randn(1, 3, 224, 224)
    inputs = {"pixel_values": torch.randn(batch, 3, 224, 224), "labels": torch.zeros(batch, dtype=torch.long)}
    rows: list[dict[str, Any]] = []
    for number in (0, 1, 2):
        models = frozen(number)
        yardstick = count(lambda models=models: run_all(models, pixels))
        for dispatcher in DISPATCHERS:
            if dispatcher == "expert" and not number:
                continue
            further = experts(number)
            model = pmoe(further, dispatcher).eval()
            held, size, trained = parameter_report(model).total
            rows.append(
                {
                    "backbones": number + 1,
                    "dispatcher": dispatcher,
                    "parameters": held,
                    "trained": trained,
                    "bytes": size,
                    "forward_vs_frozen": count(lambda model=model: model(pixel_values=pixels)) / yardstick,
                    "saved_bytes": saved_bytes(model, inputs, beside=further),
                }
            )
    return rows


def forward_times(batch: int, repeats: int) -> dict[str, Any]:
    pixels = torch.randn(batch, 3, 224, 224)
    found = {}
    for number in (1, 2):
        models = frozen(number)
        runs = {"frozen": timed(lambda models=models: run_all(models, pixels))}
        for dispatcher in DISPATCHERS:
            model = pmoe(experts(number), dispatcher).eval()
            runs[dispatcher] = timed(lambda model=model: model(pixel_values=pixels))
        found[f"{number + 1} backbones"] = relative(interleaved(runs, repeats, f"{number + 1} backbones"), "frozen")
    return found


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            work()
        return time.perf_counter() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each timed run")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of the timed runs")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="The normalisation")  # random weights know no pixels
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {"exact": exact_rows(batch=4)}
    for row in result["exact"]:
        print(
            "  ".join(
                f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    if args.repeats:
        result["forward"] = forward_times(batch=4, repeats=args.repeats)
        for name, times in result["forward"].items():
            print(name)
            show_times("forward", times)
    if args.output:
        write(result, args.output, timm)


if __name__ == "__main__":
    main()
