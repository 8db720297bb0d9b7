# SPDX-License-Identifier: Apache-2.0
"""The page of families, made from the records."""

from __future__ import annotations

from collections import Counter
from typing import Any

Record = dict[str, Any]

OUTCOMES = ("right", "left out", "refused", "late", "error", "wrong", "not run")
OTHERS = {"lora": "LoRA", "prefix": "prefix tuning"}
# What stood in the way of a tiny model or its input, in words; of other types, what was raised.
UNFIT = "cannot be built in the small sizes of this test"
WANTS = "needs other inputs than this test has"
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
    "gemma4_unified_assistant": "needs the keys and values of another model",
    "layoutlmv2": PACKAGE,
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"), "is built from the config of its decoder, which has another type"
    ),
    "shieldgemma2": "needs text too, see vision-language",
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
    "kosmos-2": WANTS + ", see with images",
    "llama4": FAULT,
    "muse_spark": UNFIT,
    "nemotron_h_omni": UNFIT,
    "perception_lm": UNFIT,
    "pi0": "needs the state of a robot",
    "pix2struct": WANTS,
    "pp_formulanet": WANTS,
    "qwen2_5_omni_thinker": FAULT,
    "qwen3_omni_moe_thinker": FAULT,
    "step3p7": UNFIT,
    "vision-encoder-decoder": WANTS,
}

HEAD = """\
# Which models

Search this page for the `model_type` in your model's `config.json`, or for the name of a timm model. `make reach`
writes this page. It builds a tiny random model of every type of transformers and of every kind of block in timm, and
adds an adapter with the default `MEPTConfig`. It tests models of images with the default `VAPTConfig` too.

| result | meaning |
| --- | --- |
| right | Prompts change the output and train. Without the adapter the output is the base model's, bit for bit. No \
later token changes an earlier output. Padding, the rest of the batch and the cache change nothing. |
| left out | Right, but some layers get no prompts. A warning of `get_peft_model` says which. |
| refused | `get_peft_model` raises an error that says why. |
| late | An error that says why, but in the first forward pass only. |
| error | Another error. |
| wrong | One of the checks fails. |
| not run | The tiny model could not be built or run. The reason is in brackets. |

| kind | models |
| --- | --- |
| causal, classification, seq2seq | models of text, by task |
| vision | image classification |
| audio, speech | audio classification; speech to text |
| vision-language, with images | models of text and images: with text alone, and with an image |
| dense, detection, video | segmentation, depth and poses; object detection; video classification |
| towers | image encoders without a head |
| timm | models of timm |

The last two columns of the next table say, for comparison, on how many of these models PEFT's LoRA (on all linear \
layers) and PEFT's prefix tuning run.
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
