# SPDX-License-Identifier: Apache-2.0
"""The tables of the README and of this folder's README, made from the committed results.

    python benchmarks/readme_tables.py            # writes them
    python benchmarks/readme_tables.py --check    # fails if a README has others

A table stands between two lines, `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from harness.claims import claims
from harness.client_table import clients
from harness.markdown import deviation, table
from harness.motion_tables import learning_motion, motion_assignments, motion_levels, motion_transfer, unit_scale
from harness.reading import NAMES, exact_records, exact_row, results, row_of, time_ratio, times
from harness.rows import Row
from harness.size_curves import size_table
from harness.start_scale import start_table
from harness.targets import GPU, LENGTHS, targets
from harness.vision_tables import low_data, of_vapt

HERE = Path(__file__).resolve().parent
READMES = (HERE.parent / "README.md", HERE / "README.md", HERE.parent / "docs" / "clients.md")
PLACE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
TEXT = (
    Row("head"),
    Row("full"),
    Row("lora_r8"),
    Row("prompt_tuning", 20),
    Row("prefix_tuning", 20),
    Row("p_tuning", 20),
    Row("static", 20, 1),
    Row("mept_sample", 20, 4),
    Row("mept_sample", 20, 64),
    Row("mept_token", 20, 4),
    Row("mept_token", 20, 64),
)
IMAGES = (
    Row("head"),
    Row("full"),
    Row("lora_r8"),
    *(Row(method, prompts) for prompts in (10, 50) for method in ("vpt_deep", "vapt")),
    *(Row("mept_sample", prompts, 4) for prompts in (10, 50)),
    Row("mept_token", 10, 4),
    Row("promotion", 16),
)


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


# What a summary says of routers, and the headings of it.
ROUTERS = {
    "load_entropy": "load entropy",
    "task_expert_bits": "bits of the task",
    "class_expert_bits": "bits of the class",
}


def learning(name: str, score: str = "test accuracy", by_task: bool = False) -> str:
    """Score by method, the best first; what was forgotten, where it was measured; seconds of a training step; what
    routers did, where there are any; by task. The number of seeds is shown where it is not the same for all."""
    summary, seconds = results(name)["summary"], results(name).get("step_seconds", {})
    measures = {name: shown for name, shown in ROUTERS.items() if any(name in row for row in summary.values())}
    tasks = sorted({task for row in summary.values() for task in row["by_task"]}) if by_task else []
    forgets = any("forgotten" in row for row in summary.values())
    seeds_differ = len({len(row["test"]) for row in summary.values()}) > 1
    headings = ["method", *(["seeds"] * seeds_differ), score, "over seeds", *(["forgotten"] * forgets)]
    headings += ["trained", "rate"] + ["a step"] * bool(seconds) + [*measures.values(), *tasks]
    rows = []
    for method, row in sorted(summary.items(), key=lambda item: -item[1]["mean"]):
        line = [NAMES.get(method, method), *([str(len(row["test"]))] * seeds_differ)]
        line += [f"{row['mean']:.3f}", deviation(row["sd"]), *([f"{row['forgotten']:.3f}"] if forgets else [])]
        line += [f"{row['trainable']:,}", f"{row['lr']:g}" if row["lr"] else ""]
        line += [f"{seconds[method]:.2g} s" if method in seconds else ""] * bool(seconds)
        line += [spread(row[measure]) if measure in row else "" for measure in measures]
        rows.append(line + [f"{row['by_task'][task]:.2f}" for task in tasks])
    return table(headings, rows)


# What README shows: a task, its results, and the routing that MEPT takes there by default.
FRONT = (
    ("sentiment", "learning_text", "mept-sample"),
    ("four text tasks mixed", "learning_text_mixture", "mept-sample"),
    ("answers of a chat model", "learning_causal", "mept-token"),
    ("six instructions to a chat model", "learning_mixture", "mept-token"),
    ("CIFAR-10, 1,000 images", "learning_vision_cifar10", "mept-sample"),
    ("MNIST, 1,000 images", "learning_vision_mnist", "mept-sample"),
)


def front() -> str:
    """One line for each task, one column for each kind of method."""
    lines = []
    for task, name, routed in FRONT:
        summary = results(name)["summary"]
        shown = ("head",), ("static", "vpt-deep"), (routed,), ("vapt",), ("lora",)
        scores = [next((summary[method]["mean"] for method in kinds if method in summary), None) for kinds in shown]
        lines.append([task, *(number(score) for score in scores)])
    return table(["", "head only", "deep prompts or VPT-Deep", "MEPT", "VAPT", "LoRA r8"], lines)


def name_of(row: Row) -> str:
    """A row's name: method, prompts, and experts if there are several."""
    name = NAMES.get({"static": "static_sized"}.get(row.method, row.method), row.method)
    sizes = [] if row.prompts is None else [f"{row.prompts}"]
    sizes += [f"{row.experts} experts"] if row.experts and row.experts > 1 else []
    return ", ".join([name, *sizes])


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def figures(model: str, row: Row) -> list[str]:
    """Forward FLOPs over the frozen model's, training FLOPs and saved bytes over LoRA's."""
    found, base, lora = exact_row(model, *row), exact_row(model, "base"), exact_row(model, "lora_r8")
    if "forward_flops" not in found:
        return ["", "", ""]
    return [
        number(found["forward_flops"] / base["forward_flops"]),
        number(found["train_flops"] / lora["train_flops"]),
        number(found["saved_bytes"] / lora["saved_bytes"]),
    ]


def cost(rows: tuple[Row, ...], models: dict[str, str], timed: list[tuple[str, str, str, str]]) -> str:
    """Rows by methods; the columns are exact figures of each model, and times where there are any.

    `timed` are columns: heading, group, kind, and the row whose time is 1.
    """
    timed = [column for column in timed if column[1] in times()]
    first = next(iter(models))
    lines = []
    for row in rows:
        found = exact_row(first, *row)
        if not found:  # a language model has no head of its own
            continue
        line = [name_of(row), f"{found['trainable']:,}" if "trainable" in found else ""]
        for model in models:
            line += figures(model, row)
        line += [number(time_ratio(group, kind, str(row), to)) for _, group, kind, to in timed]
        lines.append(line)
    headings = ["", f"trained, {models[first]}"]
    headings += [f"{name}: {what}" for name in models.values() for what in ("forward", "train", "saved")]
    return table(headings + [heading for heading, *_ in timed], lines)


def cost_text() -> str:
    models = {"bert-base": "BERT-base", "llama-1b": "Llama-1B"}
    timed = [
        ("BERT: step time", "bert-base step", "step", "lora_r8"),
        ("SmolLM2: decoding time", "smollm2 generation", "decode", "base"),
    ]
    return cost(TEXT, models, timed)


def cost_t5() -> str:
    return cost(TEXT, {"t5-base": "T5-base"}, [])


def cost_vision() -> str:
    models = {"vit-b16-hf": "ViT-B/16", "vit-b16-timm": "timm"}
    timed = [(f"{name}: step time", f"{model} step", "step", "lora_r8") for model, name in models.items()]
    return cost(IMAGES, models, timed)


def cost_many() -> str:
    """Token routing by number of experts, beside its plain form, in which every expert's rows are columns."""
    before = {(each["model"], each["experts"]): each for each in results("token_routing_dense")["records"]}
    models = {"bert-base": "128 tokens", "bert-base-1024": "1,024 tokens"}
    lines = []
    for experts in (4, 16, 64, 256):
        line = [f"{experts} experts"]
        for model in models:
            now = figures(model, Row("mept_token", 10, experts))
            then = [number(before[model, experts][figure]) for figure in ("forward", "train", "saved")]
            line += [f"{one}, {other}" for one, other in zip(then, now, strict=True)]
        lines.append(line)
    what = ("forward", "train", "saved")
    return table(["", *(f"{length}: {each}" for length in models.values() for each in what)], lines)


def cost_long() -> str:
    """Methods on long texts, without a mask and with one."""
    rows = (Row("prefix_tuning", 20), Row("mept_sample", 20, 4), Row("mept_token", 20, 4), Row("mept_token", 20, 64))
    lines = []
    for mask in ("", "-mask"):
        for row in rows:
            found = [figures(f"llama-1b-{length}{mask}", row) for length in LENGTHS]
            if any(found[0]):
                name = name_of(row) + (", masked" if mask else "")
                lines.append([name, *(ratio for ratios in found for ratio in ratios)])
    what = ("forward", "train", "saved")
    return table(["", *(f"{length:,}: {each}" for length in LENGTHS for each in what)], lines)


def cost_experts() -> str:
    rows = []
    group = "several backbones forward"
    for row in exact_records():
        if row["method"].startswith("pmoe"):
            dispatcher = row["method"].removeprefix("pmoe_")
            rows.append(
                [
                    f"{row['experts']}, `{dispatcher}`, {row['prompts']}",
                    f"{row['trainable']:,}",
                    f"{row['file_bytes'] / 1e6:.1f} MB",
                    number(row["forward_flops"] / row["frozen_flops"]),
                    f"{row['saved_bytes'] / 1e6:,.0f} MB",
                    number(time_ratio(group, "forward", str(row_of(row)), "frozen")),
                ]
            )
    headings = ["backbones, dispatcher, prompts", "trained", "file", "forward FLOPs", "saved bytes", "forward time"]
    return table(headings, rows)


def gpu() -> str:
    """Steps, memory and decoding on a GPU over LoRA r8, decoding over the base model, by method."""
    columns = {
        "ViT-B/16: step": ("step vit-b16-hf", "step", "lora_r8"),
        "peak memory": ("step vit-b16-hf", "peak_bytes", "lora_r8"),
        "compiled, 4 layers: step": ("compiled vit-b16-hf 4 layers", "step", "lora_r8"),
        "Llama-1B: step": ("step llama-1b", "step", "lora_r8"),
        "Llama-1B: peak memory": ("step llama-1b", "peak_bytes", "lora_r8"),
        "decoding, over the base": ("decode llama-1b", "decode", "base"),
        "8,192 tokens: step": ("long llama-1b 8192 tokens", "step", "lora_r8"),
        "8,192 tokens, padded: step": ("long llama-1b 8192 tokens, padded", "step", "lora_r8"),
    }
    found = times(GPU)

    def value(group: str, kind: str, name: str) -> float | None:
        measured = found.get(group, {}).get(name, {}).get(kind)
        return measured["min_s"] if isinstance(measured, dict) else measured

    names = list(dict.fromkeys(name for group, _, _ in columns.values() for name in found.get(group, {})))
    rows = []
    for name in sorted(names, key=lambda name: (name != "base", name != "lora_r8")):
        cells = [f"`{name}`"]
        for group, kind, to in columns.values():
            own, other = value(group, kind, name), value(group, kind, to)
            cells.append("" if own is None or other is None else f"{own / other:.2f}")
        rows.append(cells)
    return table(["", *columns], rows)


def target_table() -> str:
    rows = [[target.name, target.what, target.limit, target.measured, target.verdict] for target in targets()]
    return table(["", "target", "at most", "measured", "verdict"], rows)


def claim_table() -> str:
    rows = [[each.paper, each.says, each.task, each.budget, each.found, each.verdict] for each in claims()]
    return table(["paper", "says", "here, on", "trained on", "found", "verdict"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "clients": clients,
    "front": front,
    "learning_text": lambda: learning("learning_text"),
    "start_scale": start_table,
    "sizes_text": lambda: size_table("learning_text"),
    "learning_text_10_epochs": lambda: learning("learning_text_sizes_10_epochs"),
    "learning_text_mixture": lambda: learning("learning_text_mixture"),
    "learning_vision_cifar10": lambda: learning("learning_vision_cifar10"),
    "learning_vision_mnist": lambda: learning("learning_vision_mnist"),
    "learning_vision_mnist_20_epochs": lambda: learning("learning_vision_mnist_20_epochs"),
    "vapt_mnist": lambda: of_vapt("learning_vision_mnist"),
    "low_data_cifar10": lambda: low_data("learning_vision_cifar10"),
    "low_data_mnist": lambda: low_data("learning_vision_mnist"),
    "learning_experts": lambda: learning("learning_experts"),
    "learning_dense": lambda: learning("learning_dense", "patches right"),
    "learning_causal": lambda: learning("learning_causal", "exact match"),
    "learning_mixture": lambda: learning("learning_mixture", "exact match", by_task=True),
    "learning_mixture_sequence": lambda: learning("learning_mixture_sequence", "exact match", by_task=True),
    "learning_motion_flow": lambda: learning_motion("flow"),
    "learning_motion_depth": lambda: learning_motion("depth"),
    "unit_scale": unit_scale,
    "motion_assignments": motion_assignments,
    "motion_transfer": motion_transfer,
    "motion_levels": motion_levels,
    "cost_text": cost_text,
    "cost_t5": cost_t5,
    "cost_vision": cost_vision,
    "cost_experts": cost_experts,
    "gpu": gpu,
    "cost_many": cost_many,
    "cost_long": cost_long,
    "targets": target_table,
    "claims": claim_table,
}


def filled(text: str) -> str:
    """The text with every table made anew."""
    return PLACE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[4]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="do not write, fail if there is anything to write")
    args = parser.parse_args()
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        made = filled(text)
        if not args.check:
            readme.write_text(made, encoding="utf-8")
        elif made != text:
            raise SystemExit(f"Tables of {readme} are not those of benchmarks/results: run this without --check.")


if __name__ == "__main__":
    main()
