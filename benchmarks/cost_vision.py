# SPDX-License-Identifier: Apache-2.0
"""What VAPT costs on ViT-B/16 of transformers and timm: FLOPs, saved bytes, step time, beside LoRA, VPT-Deep, MEPT.

FLOPs, bytes and parameters are exact and the same on every machine. Times are minima and medians of repeats in which
the methods take turns within one process; compare them by their ratio to a row of the same run. Rows that end in
"_tokens" are the textbook form of the same prompts: put before every block's tokens and dropped behind it.

    python benchmarks/cost_vision.py --output benchmarks/results/cost_vision.json
    python benchmarks/cost_vision.py --repeats 0                                        # exact figures only
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from peft import LoraConfig
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, ViTConfig, ViTForImageClassification

from peft_promptmoe import MEPTConfig, VAPTConfig
from peft_promptmoe.root import prompt_layers

from _cost import (
    build,
    flops,
    interleaved,
    relative,
    saved_bytes,
    show_exact,
    show_times,
    step,
    with_ratios,
    write,
)

CLASSES = 100
TIMED_PROMPTS = 50


def hf() -> nn.Module:
    return ViTForImageClassification(ViTConfig(num_labels=CLASSES))


def through_timm() -> nn.Module:
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="vit_base_patch16_224", num_labels=CLASSES)
    )


MODELS = {"vit-b16-hf": hf, "vit-b16-timm": through_timm}
# "LoRA r8" here always means the query, key, value and output projections of attention, and the head.
LORA = {
    "vit-b16-hf": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "modules_to_save": ["classifier"]},
    "vit-b16-timm": {"target_modules": r".*\.attn\.(qkv|proj)", "modules_to_save": ["head"]},
}


def methods(model: str) -> dict[str, Any]:
    """Configs by row name; None is the frozen base model."""
    rows: dict[str, Any] = {"base": None, "lora_r8": LoraConfig(r=8, **LORA[model])}
    for prompts in (10, 50):
        rows[f"vapt_{prompts}"] = VAPTConfig(num_virtual_tokens=prompts)
        rows[f"vpt_deep_{prompts}"] = VAPTConfig(num_virtual_tokens=prompts, num_static_layers="all")
        rows[f"mept_sample_{prompts}"] = MEPTConfig(num_virtual_tokens=prompts, routing="sample")
    return rows


def image_batch(batch: int, device: str) -> dict[str, Tensor]:
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    return {"pixel_values": torch.randn(batch, 3, 224, 224, device=device), "labels": labels}


def exact_rows(name: str, batch: int) -> list[dict[str, Any]]:
    """FLOPs on the meta device; bytes on the CPU, where kernels are chosen as in a real run."""
    rows = []
    for method, config in tqdm(methods(name).items(), desc=f"{name}: exact figures", leave=False):
        with torch.device("meta"):
            model = build(MODELS[name], config)
        # Every method but the base trains the same head, which is left out of the count.
        trainable = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not is_head(n))
        inputs = image_batch(batch, "meta")
        rows.append(
            {
                "model": name,
                "method": method,
                "batch": batch,
                "trainable": trainable,
                "forward_flops": flops(model, inputs, train=False),
                "train_flops": flops(model, inputs, train=True),
                "saved_bytes": saved_bytes(build(MODELS[name], config), image_batch(batch, "cpu")),
            }
        )
    return with_ratios(rows)


def is_head(name: str) -> bool:
    return any(part in ("classifier", "head") for part in name.split("."))


def prepended(model: nn.Module) -> nn.Module:
    """Make a prompted model pass its prompts through its blocks as tokens: put in front of each, dropped behind it."""
    for layer in prompt_layers(model):
        block: Any = layer.site.block
        layer.detach()
        block.add_module("prompts", layer)
        block.register_forward_pre_hook(_put_in)
        block.register_forward_hook(_drop)
    return model


def _put_in(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    rows = block.prompts.rows("default", args[0], None, None).to(args[0].dtype)
    return torch.cat([rows.expand(args[0].shape[0], -1, -1), args[0]], dim=1), *args[1:]


def _drop(block: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output[:, -(args[0].shape[1] - block.prompts.prompt_config["default"].num_virtual_tokens) :]


def check_same(one: nn.Module, other: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Two forms of the same prompts that compute different things are not worth timing."""
    with torch.no_grad():
        expected, found = (model.eval()(**inputs).logits for model in (one, other))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def step_times(name: str, batch: int, repeats: int) -> dict[str, Any]:
    inputs = image_batch(batch, "cpu")
    configs = methods(name)
    models = {"lora_r8": build(MODELS[name], configs["lora_r8"])}
    for method in (f"vapt_{TIMED_PROMPTS}", f"vpt_deep_{TIMED_PROMPTS}"):
        for form in (method, f"{method}_tokens"):
            torch.manual_seed(0)
            models[form] = build(MODELS[name], configs[method])
        prepended(models[f"{method}_tokens"])
        check_same(models[method], models[f"{method}_tokens"], inputs)
    runs = {row: step(model.train(), inputs) for row, model in models.items()}
    return relative(interleaved(runs, repeats, f"{name}: training step"), "lora_r8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each timed run")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of the timed runs")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {"exact": [row for name in MODELS for row in exact_rows(name, batch=8)]}
    show_exact(result["exact"])
    if args.repeats:
        result["step"] = {name: step_times(name, batch=4, repeats=args.repeats) for name in MODELS}
        for name, times in result["step"].items():
            print(name)
            show_times("step", times)
    if args.output:
        write(result, args.output, timm)


if __name__ == "__main__":
    main()
