# SPDX-License-Identifier: Apache-2.0
"""What the package is meant to cost at most, beside what it costs, from the committed results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from .reading import FOLDER, exact_records, exact_row, time_ratio, times

IMAGE_MODELS = ("vit-b16-hf", "vit-b16-timm")
MODELS = ("bert-base", "t5-base", "llama-1b", *IMAGE_MODELS)
OURS = ("static", "vpt_deep", "vapt", "mept_sample", "mept_token")
BY_SAMPLE = ("static", "vpt_deep", "vapt", "mept_sample")
NAMED = {"train_flops": "training FLOPs", "saved_bytes": "saved bytes"}
EXACT, LENGTHS = ("forward_flops", "train_flops", "saved_bytes"), (512, 2048, 8192)
EXPERTS = {"static": 1, "mept_sample": 4, "mept_token": 4}
GPU = "gpu_nvidia_h100_80gb_hbm3"
Found = tuple[float, str]  # a figure, and what it is of


@dataclass(frozen=True)
class Target:
    """A limit, and the worst of the figures that it is on; none where nothing was measured."""

    name: str
    what: str
    at_most: float
    figures: list[Found]
    unit: str = "x"
    needs_gpu: bool = False

    @property
    def limit(self) -> str:
        return self._show(self.at_most)

    @property
    def measured(self) -> str:
        if not self.figures:
            return ""
        worst, where = max(self.figures)
        return f"{self._show(worst)} ({where})" if len(self.figures) > 1 else self._show(worst)

    @property
    def verdict(self) -> str:
        if not self.figures:
            return "not measurable here" if self.needs_gpu else "not measured yet"
        missed = sum(figure > self.at_most for figure, _ in self.figures)
        if not missed:
            return "met"
        return "**not met**" + (f" by {missed} of {len(self.figures)}" if len(self.figures) > 1 else "")

    def _show(self, value: float) -> str:
        if self.unit == "x":
            return f"x {value:.4f}"
        return f"{value:.0f} {self.unit}".strip()


def targets() -> Iterator[Target]:
    """All targets, in the order of their names."""
    yield from forward()
    yield from training()
    yield from experts()
    yield from step_time()
    yield from memory()
    yield from serving()
    yield from overhead()
    yield from compilation()
    yield from several_backbones()
    yield from many_experts()
    yield from mixed_batches()
    yield from decoding()
    yield from long_texts()
    yield from units()


def against(
    figure: str, to: str, models: tuple[str, ...], methods: tuple[str, ...], prompts: tuple[int, ...]
) -> list[Found]:
    """A figure of each of these methods, with four experts if it has any, over that of another on the same model."""
    found = []
    for model in models:
        for method in methods:
            for number in prompts:
                row = exact_row(model, method, number, EXPERTS.get(method))
                if figure in row:
                    found.append((row[figure] / exact_row(model, to)[figure], f"{model} {method}_{number}"))
    return found


def timed(group: str, kind: str, to: str, methods: tuple[str, ...], file: str = "times_cpu") -> list[Found]:
    """Times of rows of a group over those of another row."""
    model = group.removesuffix(f" {kind}")
    ratios = [(time_ratio(group, kind, method, to, file), f"{model} {method}") for method in methods]
    return [(ratio, name) for ratio, name in ratios if ratio is not None]


def forward() -> Iterator[Target]:
    def of(*where: tuple[str, ...], prompts: int) -> list[Found]:
        return against("forward_flops", "base", *where, (prompts,))

    images = IMAGE_MODELS, ("vapt", "mept_sample")
    yield Target("P1", "forward FLOPs, ViT-B/16, VAPT or MEPT, 10 prompts", 1.02, of(*images, prompts=10))
    yield Target("P1", "forward FLOPs, ViT-B/16, VAPT or MEPT, 50 prompts", 1.06, of(*images, prompts=50))
    for model, name, limits in (
        ("llama-1b", "Llama-1B", (1.02, 1.04, 1.02)),
        ("bert-base", "BERT-base", (1.035, 1.16, 1.05)),
    ):
        cases = (("mept_sample", 20), ("mept_sample", 100), ("mept_token", 20))
        for (method, prompts), limit in zip(cases, limits, strict=True):
            what = f"forward FLOPs, {name}, by {method.removeprefix('mept_')}, {prompts} prompts"
            yield Target("P1", what, limit, of((model,), (method,), prompts=prompts))


def training() -> Iterator[Target]:
    def of(methods: tuple[str, ...], *prompts: int) -> list[Found]:
        return against("train_flops", "lora_r8", MODELS, methods, prompts)

    yield Target("P2", "training FLOPs over LoRA r8, up to 20 prompts", 1.05, of(BY_SAMPLE, 10, 20))
    yield Target("P2", "training FLOPs over LoRA r8, up to 20 prompts, by token", 1.05, of(("mept_token",), 10, 20))

    yield Target("P2", "training FLOPs over LoRA r8, 50 prompts", 1.08, of(BY_SAMPLE, 50))
    yield Target("P2", "training FLOPs over LoRA r8, 50 prompts, by token", 1.08, of(("mept_token",), 50))


def experts() -> Iterator[Target]:
    few, many = ({model: exact_row(model, "mept_sample", 20, number) for model in MODELS} for number in (4, 64))
    growth = [
        (many[model][figure] / few[model][figure], f"{model} {figure}")
        for model in MODELS
        for figure in ("forward_flops", "train_flops")
    ]
    yield Target("P3", "FLOPs of 64 experts over 4, by sample", 1.01, growth)
    step = timed("bert-base step", "step", "mept_sample_20_E4", ("mept_sample_20_E64",))
    yield Target("P3", "step time of 64 experts over 4, by sample", 1.03, step)
    decode = timed("smollm2 generation", "decode", "mept_token_20_E4", ("mept_token_20_E64",))
    yield Target("P3", "decoding time of 64 experts over 4, by token", 1.03, decode)


def step_time() -> Iterator[Target]:
    text = ("static_20", "mept_sample_20_E4", "mept_token_20_E4")
    images = ("vpt_deep_10", "vapt_10", "mept_sample_10_E4")
    rows = {"bert-base step": text} | {f"{model} step": images for model in IMAGE_MODELS}
    found = [each for group, methods in rows.items() for each in timed(group, "step", "lora_r8", methods)]
    yield Target("P4", "step time over LoRA r8, CPU", 1.10, found)
    compiled = ("vapt_10", "mept_token_10_E4")
    found = timed("compiled vit-b16-hf 4 layers", "step", "lora_r8", compiled, GPU)
    yield Target("P4", "step time over LoRA r8, GPU, bf16, compiled", 1.05, found, needs_gpu=True)
    found = timed("bert-base step", "step", "prompt_tuning_20", text)
    yield Target("P4", "step time over PEFT prompt tuning, 20 prompts", 1.0, found)


def memory() -> Iterator[Target]:
    def of(*methods: str) -> list[Found]:
        return against("saved_bytes", "lora_r8", MODELS, methods, (10, 20))

    yield Target("P5", "saved bytes over LoRA r8, up to 20 prompts", 1.05, of(*BY_SAMPLE))
    yield Target("P5", "saved bytes over LoRA r8, up to 20 prompts, by token", 1.15, of("mept_token"))
    peaks = []
    for group, rows in times(GPU).items():
        lora = rows.get("lora_r8", {}).get("peak_bytes")
        ours = [name for name in rows if name.startswith(OURS) and lora]
        peaks += [(rows[name]["peak_bytes"] / lora, f"{group.split()[0]} {name}") for name in ours]
    yield Target("P5", "peak memory of a step over LoRA r8, GPU", 1.03, peaks, needs_gpu=True)


def serving() -> Iterator[Target]:
    found = timed("bert-base forward", "forward", "base", ("static_cached_50",))
    for model in IMAGE_MODELS:
        found += timed(f"{model} forward", "forward", "base", ("vpt_cached_50",))
    yield Target("P6", "forward time with `cached_prompts` over the frozen model, 50 static prompts", 1.02, found)


def overhead() -> Iterator[Target]:
    seconds = times().get("import", {}).get("peft_promptmoe", {}).get("import", {}).get("min_s")
    yield Target("P7", "import beyond peft's", 150, [] if seconds is None else [(1000 * seconds, "")], "ms")
    for kind in ("attach", "load"):
        found = [
            (1000 * kinds[kind]["min_s"], f"{model} {name}")
            for model in ("bert-base", "vit-b16-hf")
            for name, kinds in times().get(f"{model} adapters", {}).items()
            if name.startswith(OURS)
        ]
        yield Target("P7", f"{kind} an adapter of 12 layers", 100, found, "ms")
    sizes = [
        (row["file_bytes"] - 1.02 * row["tensor_bytes"], f"{row['model']} {row['method']}_{row['prompts']}")
        for row in exact_records()
        if row["method"].startswith((*OURS, "pmoe"))
    ]
    yield Target("P7", "adapter file beyond 1.02 times its tensors", 8192, sizes, "bytes")


def compilation() -> Iterator[Target]:
    ours = [row for row in exact_records() if row["method"].startswith((*OURS, "pmoe"))]
    named = [(row, f"{row['model']} {row['method']}") for row in ours]
    yield Target(
        "P8", "graph breaks of a training forward", 0, [(row["graph_breaks"], name) for row, name in named], ""
    )
    unread = [(float("saved_bytes" not in row), name) for row, name in named]
    yield Target("P8", "methods that cannot run on tensors without values", 0, unread, "")
    groups = [f"{model} graphs" for model in ("bert-base", "vit-b16-hf")]
    more = [(row["graphs"] - 1, name) for group in groups for name, row in times().get(group, {}).items()]
    yield Target("P8", "recompilations between training and evaluation", 1, more, "")


def several_backbones() -> Iterator[Target]:
    rows = [row for row in exact_records() if row["method"].startswith("pmoe")]
    found = [
        (row["forward_flops"] / row["frozen_flops"], f"{row['method']}_{row['prompts']}, {row['experts']} backbones")
        for row in rows
    ]
    yield Target("P9", "pMoE, forward FLOPs over its frozen backbones with as many tokens", 1.03, found)
    group = "several backbones forward"
    names = tuple(name for name in times().get(group, {}) if name.startswith("pmoe"))
    yield Target(
        "P9",
        "pMoE, forward time over that of its frozen backbones with as many tokens",
        1.03,
        timed(group, "forward", "frozen", names),
    )


def many_experts() -> Iterator[Target]:
    """Token routing at a cost that does not grow with the number of experts, of 10 prompts each."""
    growth: dict[str, list[Found]] = {"bert-base": [], "bert-base-1024": []}
    for model, found in growth.items():
        few, many = (exact_row(model, "mept_token", 10, number) for number in (4, 64))
        found += [(many[figure] / few[figure], figure) for figure in EXACT]
    what = "FLOPs and saved bytes of 64 experts over 4, by token, 8 texts of"
    yield Target("P10", f"{what} 1,024 tokens", 1.02, growth["bert-base-1024"])
    yield Target("P10", f"{what} 128 tokens", 1.02, growth["bert-base"])
    step = timed("bert-base experts step", "step", "mept_token_10_E4", ("mept_token_10_E64",))
    yield Target("P10", "step time of 64 experts over 4, by token", 1.10, step)
    for figure, limit in (("train_flops", 1.06), ("saved_bytes", 1.15)):
        found = [
            (exact_row(model, "mept_token", 10, 64)[figure] / exact_row(model, "lora_r8")[figure], model)
            for model in growth
        ]
        yield Target("P10", f"{NAMED[figure]} over LoRA r8, 64 experts by token", limit, found)
    found = against("saved_bytes", "lora_r8", ("bert-base",), ("mept_token",), (10, 20))
    yield Target("P10", "saved bytes over LoRA r8, 4 experts by token, BERT-base", 1.10, found)


def mixed_batches() -> Iterator[Target]:
    cells = json.loads((FOLDER / "mixed_batch.json").read_text())["cells"]
    found = [(cell["flops_ratio"], name) for name, cell in cells.items()]
    yield Target("P14", "forward FLOPs of a batch with eight adapters over one with one", 1.05, found)


def decoding() -> Iterator[Target]:
    rows = ("mept_token_20_E4", "mept_token_20_E64")
    for limit, how, file in ((1.10, "eager", "times_cpu"), (1.05, "compiled, static cache", "times_cpu_compile")):
        found = timed("smollm2 generation", "decode", "base", rows, file)
        yield Target("P11", f"decoding time by token over the frozen model, {how}", limit, found)


def long_texts() -> Iterator[Target]:
    models = tuple(f"llama-1b-{length}{mask}" for length in LENGTHS for mask in ("", "-mask"))
    for figure in ("train_flops", "saved_bytes"):
        found = against(figure, "lora_r8", models, ("mept_sample", "mept_token"), (20,))
        what = f"{NAMED[figure]} over LoRA r8, texts of 512 to 8,192 tokens, with and without a mask"
        yield Target("P12", what, 1.05, found)


def units() -> Iterator[Target]:
    """ProMotion behind all twelve blocks."""
    of = IMAGE_MODELS, ("promotion",), (16,)  # prototypes
    found = against("forward_flops", "base", *of)
    yield Target("P13", "forward FLOPs, ViT-B/16, ProMotion behind 12 blocks", 1.015, found)
    for figure, limit in (("train_flops", 1.05), ("saved_bytes", 1.10)):
        found = against(figure, "lora_r8", *of)
        yield Target("P13", f"{NAMED[figure]} over LoRA r8, ProMotion behind 12 blocks", limit, found)
