# SPDX-License-Identifier: Apache-2.0
"""The README's tables, made from the committed results.

    python benchmarks/readme_tables.py            # writes them into the README
    python benchmarks/readme_tables.py --check    # fails if the README has others

A table stands between two lines, `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

NAMES = {
    "head": "head only",
    "lora": "LoRA r8",
    "prompt": "PEFT prompt tuning, 20",
    "prefix": "PEFT prefix tuning, 20",
    "static": "deep prompts, `num_experts=1`",
    "mept-sample": 'MEPT, `routing="sample"`',
    "mept-centered": 'MEPT, `routing="sample"`, `router_centering=True`',
    "mept-token": 'MEPT, `routing="token"`',
    "lora_r8": "LoRA r8",
    "prompt_tuning_20": "PEFT prompt tuning, 20",
    "prefix_tuning_20": "PEFT prefix tuning, 20",
    "static_20": "deep prompts, 20",
    "mept_sample_20": "MEPT by sample, 20",
    "mept_token_20": "MEPT by token, 20",
}


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return found


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def learning(name: str) -> str:
    """Accuracy by method, the best first; what routers did, where there are any."""
    summary = results(name)["summary"]
    bits = any("task_expert_bits" in row for row in summary.values())
    headings = ["method", "test accuracy", "over seeds", "trained", "rate", "load entropy"]
    headings += ["bits of the task"] if bits else []
    rows = []
    for method, row in sorted(summary.items(), key=lambda item: -item[1]["mean"]):
        line = [NAMES[method], f"{row['mean']:.3f}", f"± {row['sd']:.3f}", f"{row['trainable']:,}", f"{row['lr']:g}"]
        line.append(spread(row["load_entropy"]) if "load_entropy" in row else "")
        if bits:
            line.append(spread(row["task_expert_bits"]) if "task_expert_bits" in row else "")
        rows.append(line)
    return table(headings, rows)


def cost_text() -> str:
    """FLOPs and saved bytes on BERT-base and the shape of Llama-1B; times on BERT-base and the shape of SmolLM2."""
    found = results("cost_text")
    exact = {(row["model"], row["method"]): row for row in found["exact"]}
    rows = []
    for method in ("lora_r8", "prompt_tuning_20", "prefix_tuning_20", "static_20", "mept_sample_20", "mept_token_20"):
        line = [NAMES[method]]
        for model in ("bert-base", "llama-1b"):
            row = exact[model, method]
            for key in ("forward_vs_base", "train_vs_lora", "saved_vs_lora"):
                line.append(f"{row[key]:.3f}" if key in row else "")
        line.append(f"{found['step'][method]['min_vs_lora_r8']:.2f}")
        line.append(f"{found['decode'][method]['min_vs_base']:.2f}")
        rows.append(line)
    headings = [""]
    headings += [f"{model}: {what}" for model in ("BERT", "Llama-1B") for what in ("forward", "train", "saved bytes")]
    return table([*headings, "BERT: step time", "SmolLM2: decoding"], rows)


def cost_vision() -> str:
    found = results("cost_vision")
    exact = {(row["model"], row["method"]): row for row in found["exact"]}
    rows = []
    for prompts in (10, 50):
        for method, name in (("vapt", "VAPT"), ("vpt_deep", "VPT-Deep"), ("mept_sample", "MEPT by sample")):
            line = [f"{name}, {prompts}"]
            for model in ("vit-b16-hf", "vit-b16-timm"):
                row = exact[model, f"{method}_{prompts}"]
                line += [f"{row[key]:.3f}" for key in ("forward_vs_base", "train_vs_lora", "saved_vs_lora")]
                time = found["step"][model].get(f"{method}_{prompts}")
                tokens = found["step"][model].get(f"{method}_{prompts}_tokens")
                line.append(f"{time['min_vs_lora_r8']:.2f} ({tokens['min_vs_lora_r8']:.2f})" if time else "")
            rows.append(line)
    what = ("forward", "train", "saved bytes", "step time (as tokens)")
    return table(["", *[f"{model}: {each}" for model in ("ViT-B/16", "timm") for each in what]], rows)


def cost_experts() -> str:
    found = results("cost_experts")
    rows = []
    for row in found["exact"]:
        time = found["forward"].get(f"{row['backbones']} backbones", {}).get(row["dispatcher"])
        rows.append(
            [
                f"{row['backbones']}, `{row['dispatcher']}`",
                f"{row['parameters'] / 1e6:.1f} M",
                f"{row['trained']:,}",
                f"{row['forward_vs_frozen']:.4f}",
                f"{row['saved_bytes'] / 1e6:,.0f} MB",
                f"{time['min_vs_frozen']:.3f}" if time else "",
            ]
        )
    return table(["backbones, dispatcher", "held", "trained", "forward FLOPs", "saved bytes", "forward time"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "learning_text": lambda: learning("learning_text"),
    "learning_text_mixture": lambda: learning("learning_text_mixture"),
    "cost_text": cost_text,
    "cost_vision": cost_vision,
    "cost_experts": cost_experts,
}


def filled(text: str) -> str:
    """The text with every table made anew."""
    return PLACE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[4]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="do not write, fail if there is anything to write")
    args = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    made = filled(text)
    if args.check and made != text:
        raise SystemExit("The README's tables are not those of benchmarks/results: run this without --check.")
    README.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
