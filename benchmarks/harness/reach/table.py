# SPDX-License-Identifier: Apache-2.0
"""The page of families, made from the records."""

from __future__ import annotations

from collections import Counter
from typing import Any

Record = dict[str, Any]

OUTCOMES = ("right", "left out", "refused", "late", "error", "wrong", "not run")
OTHERS = {"lora": "LoRA", "prefix": "prefix tuning"}
# What stood in the way of a tiny model or its input, in words; of other types, what was raised.
UNFIT = "the small sizes of this sweep do not fit its parts"
WANTS = "wants more than the inputs of this sweep"
PACKAGE = "needs a package that is not installed"
FAULT = "its own code fails in this version of transformers"
NOT_RUN = {
    "bailing_hybrid": UNFIT,
    "blt": UNFIT,
    "dbrx": FAULT,
    "dinat": PACKAGE,
    "dots3_note": UNFIT,
    "fun_asr_nano": UNFIT,
    "gemma3n": UNFIT,
    "gemma4_assistant": UNFIT,
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it wants",
    "layoutlmv2": PACKAGE,
    **dict.fromkeys(("musicgen", "musicgen_melody"), "is made from the config of its decoder, which has another type"),
    "shieldgemma2": "wants text, too; see vision-language",
    "xlstm": UNFIT,
    "apertus1p5": UNFIT,
    "blip-2": WANTS,
    "cosmos3_edge": UNFIT,
    "deepseek_ocr2": WANTS,
    "diffusion_gemma": WANTS,
    "emu3": UNFIT,
    "ernie4_5_vl_moe": UNFIT,
    "evolla": "is not of this kind, though transformers lists it",
    "fast_vlm": UNFIT,
    "glm5_next": UNFIT,
    "granite4_vision": WANTS,
    "hunyuan_vl": WANTS,
    "hy_v4_vl": UNFIT,
    "idefics": WANTS,
    "instructblip": WANTS,
    "instructblipvideo": WANTS,
    "kosmos-2": WANTS + "; see with images",
    "llama4": FAULT,
    "muse_spark": UNFIT,
    "nemotron_h_omni": UNFIT,
    "perception_lm": UNFIT,
    "pi0": "wants the state of a robot",
    "pix2struct": WANTS,
    "pp_formulanet": WANTS,
    "qwen2_5_omni_thinker": FAULT,
    "qwen3_omni_moe_thinker": FAULT,
    "step3p7": UNFIT,
    "vision-encoder-decoder": WANTS,
}

HEAD = """\
# Which models prompts can join

Made by `make reach` from `benchmarks/results/reach.json`: one tiny random model of every type of transformers and of
every kind of timm's blocks, under a default `MEPTConfig`, and models of images under a default `VAPTConfig`, too.

*Right* means that prompts move the output and learn, disabling and unloading give the base model back bit for bit, no
later token reaches an earlier output, and padding, the rest of the batch and the cache change nothing. *Left out* is
right, too, with layers that have no prompts, of which `get_peft_model` says which. All other models are refused by
`get_peft_model`. The last columns say on how many models PEFT's LoRA on all linear layers and its prefix tuning run,
of those that they were tried on.
"""


def table(records: list[Record], kinds: list[str]) -> str:
    """Counts by kind, then each type with what is to be said of it."""
    lines = [HEAD, f"| kind | {' | '.join((*OUTCOMES, *OTHERS.values()))} |"]
    lines.append(f"| --- |{' ---: |' * (len(OUTCOMES) + len(OTHERS))}")
    for kind in kinds:
        here = [record for record in records if record["kind"] == kind]
        lines.append(_row(kind, [record["outcome"] for record in here], here))
        if by_vapt := [record.get("vapt", record["outcome"]) for record in here if _has_vapt(record)]:
            lines.append(_row(f"{kind}, VAPT", by_vapt, []))
    for kind in kinds:
        here = sorted((record for record in records if record["kind"] == kind), key=lambda record: record["type"])
        lines += ["", f"## {kind.capitalize()}", ""]
        for outcome in OUTCOMES:
            names = [_name(record) for record in here if record["outcome"] == outcome]
            lines += [f"- {outcome} ({len(names)}): {', '.join(names)}"] if names else []
        names = [f"`{record['type']}`" for record in here if record.get("vapt") in ("right", "left out")]
        lines += [f"- right under VAPT ({len(names)}): {', '.join(names)}"] if names else []
    return "\n".join(lines) + "\n"


def _has_vapt(record: Record) -> bool:
    return "vapt" in record


def _row(name: str, outcomes: list[str], records: list[Record]) -> str:
    counts = Counter(outcomes)
    cells = [str(counts[outcome]) for outcome in OUTCOMES]
    for method in OTHERS:
        tried = [record[method] for record in records if method in record]
        cells.append(f"{sum(tried)} of {len(tried)}" if tried else "-")
    return f"| {name} | {' | '.join(cells)} |"


def _name(record: Record) -> str:
    name = f"`{record['type']}`"
    if record["outcome"] != "not run":
        return name
    return f"{name} ({NOT_RUN.get(record['type'], record['says'].rstrip('.'))})"
