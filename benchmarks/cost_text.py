# SPDX-License-Identifier: Apache-2.0
"""What MEPT costs on text models, beside PEFT's own methods: FLOPs, saved bytes, step time, decoding time.

FLOPs, bytes and parameters are exact and the same on every machine. Times are minima and medians of repeats in which
the methods take turns within one process; compare them by their ratio to a row of the same run.

    python benchmarks/cost_text.py --output benchmarks/results/cost_text.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from peft_promptmoe import MEPTConfig

from _cost import (
    Model,
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

BERT_BASE = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
    use_cache=False,
)
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    pad_token_id=0,
    eos_token_id=None,
)
ATTENTION = {
    "SEQ_CLS": ["query", "key", "value", "attention.output.dense"],
    "CAUSAL_LM": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def bert() -> nn.Module:
    return BertForSequenceClassification(BERT_BASE)


def llama() -> nn.Module:
    return LlamaForCausalLM(LLAMA_1B)


def two_llama_layers() -> nn.Module:
    """Two layers of the same shape with a small vocabulary, so that what is saved for the logits hides nothing."""
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA_1B.to_dict(), "num_hidden_layers": 2, "vocab_size": 1000}))


def methods(task: str) -> dict[str, Any]:
    """Configs by row name; None is the frozen base model."""
    lora = LoraConfig(task_type=task, r=8, target_modules=ATTENTION[task])

    def mept(**kwargs: Any) -> MEPTConfig:
        return MEPTConfig(task_type=task, **{"num_virtual_tokens": 20, **kwargs})

    return {
        "base": None,
        "lora_r8": lora,
        "prompt_tuning_20": PromptTuningConfig(task_type=task, num_virtual_tokens=20),
        "prefix_tuning_20": PrefixTuningConfig(task_type=task, num_virtual_tokens=20),
        "static_20": mept(num_experts=1, num_shared_experts=0, routing="sample"),
        "mept_sample_20": mept(routing="sample"),
        "mept_sample_50": mept(routing="sample", num_virtual_tokens=50),
        "mept_sample_100": mept(routing="sample", num_virtual_tokens=100),
        "mept_sample_20_E16": mept(routing="sample", num_experts=16),
        "mept_sample_20_E64": mept(routing="sample", num_experts=64),
        "mept_token_20": mept(routing="token"),
        "mept_token_20_E16": mept(routing="token", num_experts=16),
        "mept_token_20_E64": mept(routing="token", num_experts=64),
    }


def text_batch(task: str, batch: int, length: int, device: str) -> dict[str, Tensor]:
    ids = torch.randint(1, 1000, (batch, length), device=device)
    if task == "SEQ_CLS":
        labels = torch.zeros(batch, dtype=torch.long, device=device)
    else:
        labels = ids.masked_fill(torch.arange(length, device=device) < length // 2, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def exact_rows(name: str, task: str, make: Model, small: Model, batch: int, length: int) -> list[dict[str, Any]]:
    """FLOPs on the meta device at full depth; bytes on the CPU, where kernels are chosen as in a real run."""
    rows = []
    inputs, real = text_batch(task, batch, length, "meta"), text_batch(task, batch, length, "cpu")
    # transformers looks into a mask that it has to make, and on the meta device there is nothing to see.
    del inputs["attention_mask"]
    if task == "CAUSAL_LM":
        inputs["attention_mask"] = torch.ones(batch, 1, length, length, dtype=torch.bool, device="meta").tril()
    for method, config in tqdm(methods(task).items(), desc=f"{name}: exact figures", leave=False):
        row: dict[str, Any] = {"model": name, "method": method, "batch": batch, "length": length}
        with torch.device("meta"):
            model = build(make, config)
        row["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        # PEFT's prompt methods take 2-D masks only, and a causal model on the meta device needs a 4-D one.
        if task != "CAUSAL_LM" or config is None or not config.is_prompt_learning:
            row["forward_flops"] = flops(model, inputs, train=False)
            row["train_flops"] = flops(model, inputs, train=True)
        row["saved_bytes"] = saved_bytes(build(small, config), real)
        rows.append(row)
    return with_ratios(rows)


def step_times(task: str, make: Model, names: list[str], batch: int, length: int, repeats: int) -> dict[str, Any]:
    inputs = text_batch(task, batch, length, "cpu")
    configs = methods(task)

    runs = {name: step(build(make, configs[name]).train(), inputs) for name in names}
    return relative(interleaved(runs, repeats, "training step"), "lora_r8")


def decode_times(names: list[str], batch: int, prompt: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds per decoding step with cache: a long generation minus a generation of one token."""
    inputs = text_batch("CAUSAL_LM", batch, prompt, "cpu")
    del inputs["labels"]
    configs = methods("CAUSAL_LM")

    def decode(model: nn.Module) -> Callable[[], float]:
        def run() -> float:
            seconds = []
            for count in (1, 1 + tokens):
                start = time.perf_counter()
                model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)  # type: ignore
                seconds.append(time.perf_counter() - start)
            return (seconds[1] - seconds[0]) / tokens

        return run

    with torch.no_grad():
        runs = {name: decode(build(lambda: LlamaForCausalLM(SMOLLM2), configs[name]).eval()) for name in names}
        return relative(interleaved(runs, repeats, "decoding"), "base")


def show(result: dict[str, Any]) -> None:
    show_exact(result["exact"])
    for kind in ("step", "decode"):
        show_times(kind, result[kind])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each timed run")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of the timed runs")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    compared = [
        "base",
        "lora_r8",
        "prompt_tuning_20",
        "prefix_tuning_20",
        "static_20",
        "mept_sample_20",
        "mept_token_20",
    ]
    result = {
        "exact": [
            *exact_rows("bert-base", "SEQ_CLS", bert, bert, batch=8, length=128),
            *exact_rows("llama-1b", "CAUSAL_LM", llama, two_llama_layers, batch=8, length=128),
        ],
        "step": step_times("SEQ_CLS", bert, compared[1:], batch=8, length=128, repeats=args.repeats),
        "decode": decode_times(compared, batch=4, prompt=64, tokens=16, repeats=args.repeats),
    }
    show(result)
    if args.output:
        write(result, args.output)


if __name__ == "__main__":
    main()
