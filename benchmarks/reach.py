# SPDX-License-Identifier: Apache-2.0
"""Which architectures prompts can join: every model type of transformers and every module of timm, tiny and random.

    python benchmarks/reach.py                                  # what is not in the results yet; about an hour
    python benchmarks/reach.py --kinds causal --only llama gemma2
    python benchmarks/reach.py --others                         # only LoRA and prefix tuning, where not known yet
    python benchmarks/reach.py --table                          # docs/families.md from the results

`make reach` runs it on the CPU and offline. Each model runs in a process of its own with a limit of time. Outcomes are
"right" (all checks pass), "left out" (right, and some layers have no prompts), "refused" (one clear error from
get_peft_model), "late" (one from the first forward), "error" (from inside), "wrong" (a check fails), or "not run" (the
tiny base could not be made or fed).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import traceback
from pathlib import Path
from typing import Any

import timm
import torch
import transformers

from harness.reach.checks import attach, faults, run
from harness.reach.inputs import IMAGES, Inputs, candidates, with_image
from harness.reach.others import reached_by_others
from harness.reach.table import OTHERS, table
from harness.reach.tiny import KINDS, build, enliven, model_types
from harness.reach.vision import CASES, TIMM, build_case
from harness.records import provenance, write
from peft_promptmoe import MEPTConfig, VAPTConfig

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "reach.json"
TABLE = HERE.parent / "docs" / "families.md"
TASKS = {"causal": "CAUSAL_LM", "classification": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM", "with images": "CAUSAL_LM"}
ALL_KINDS = (*KINDS, "with images", *CASES, "timm")
OF_IMAGES = ("vision", *CASES, "timm")
SECONDS = 120


def parse_args(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", choices=ALL_KINDS, default=ALL_KINDS)
    parser.add_argument("--only", nargs="*", help="model types to run, whether they are in the results or not")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--others", action="store_true", help="only what PEFT's methods reach of types in the results")
    parser.add_argument("--table", action="store_true", help="write the table from the results, and no more")
    return parser.parse_args(given)


def main(args: argparse.Namespace) -> None:
    found = {key(r): r for r in json.loads(args.results.read_text())["records"]} if args.results.exists() else {}
    if args.others:
        for (kind, name), record in found.items():
            if kind in args.kinds and kind != "timm" and record["outcome"] != "not run" and "lora" not in record:
                record |= {field: value for field, value in in_a_process(kind, name, True).items() if field in OTHERS}
                write(args.results, provenance(), sorted(found.values(), key=key))
    elif not args.table:
        for kind in args.kinds:
            for name in names(kind):
                if name in args.only if args.only else (kind, name) not in found:
                    found[kind, name] = in_a_process(kind, name)
                    write(args.results, provenance(), sorted(found.values(), key=key))
                    print(
                        kind, name, found[kind, name]["outcome"], found[kind, name].get("says", "")[:150], flush=True
                    )
    records = list(found.values())
    shown = table(records, [kind for kind in ALL_KINDS if any(kind == each["kind"] for each in records)])
    if args.results == RESULTS:
        TABLE.write_text(shown)
    else:
        print(shown)


def key(record: dict[str, Any]) -> tuple[str, str]:
    return record["kind"], record["type"]


def names(kind: str) -> list[str]:
    if kind in CASES:
        return list(CASES[kind])
    return list(TIMM) if kind == "timm" else list(IMAGES) if kind == "with images" else model_types(kind)


def in_a_process(kind: str, name: str, others: bool = False) -> dict[str, Any]:
    """The record of one model, from a process that may crash or hang."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_report, args=(kind, name, others, theirs))
    process.start()
    theirs.close()
    record: dict[str, Any] = {"kind": kind, "type": name}
    try:
        record |= ours.recv() if ours.poll(SECONDS) else {"outcome": "not run", "says": "takes too long"}
    except EOFError:
        record |= {"outcome": "error", "says": "the process ended"}
    process.kill()
    process.join()
    return record


def _report(kind: str, name: str, others: bool, pipe: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.alarm(SECONDS + 20)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    pipe.send(compare(kind, name) if others else judge(kind, name))


def judge(kind: str, name: str) -> dict[str, Any]:
    """Outcome of one model under each method, and what was said."""
    try:
        base, inputs = prepare(kind, name)
    except Exception as error:  # whatever stands in the way of a tiny model and its input
        return {"outcome": "not run", "says": _line(error)}
    task = TASKS.get(kind)
    base.requires_grad_(False)  # as PEFT leaves it; some layers of torch take another path then
    record: dict[str, Any] = {"model": type(base).__name__} | verdict(base, MEPTConfig(task_type=task), kind, inputs)
    if kind in OF_IMAGES:
        found = verdict(base, VAPTConfig(), kind, inputs)
        if "image_size" in found["says"]:  # which some models do not say
            found = verdict(base, VAPTConfig(image_size=_side_of(inputs)), kind, inputs)
        record |= {"vapt": found["outcome"], "vapt_says": found["says"]}
    return record | reached_by_others(base, kind, task, inputs)


def compare(kind: str, name: str) -> dict[str, Any]:
    """What PEFT's own methods reach of one model."""
    base, inputs = prepare(kind, name)
    base.requires_grad_(False)
    return reached_by_others(base, kind, TASKS.get(kind), inputs)


def _side_of(inputs: Inputs) -> int:
    return next(
        int(value.shape[-1]) for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim > 3
    )


def verdict(base: Any, config: Any, kind: str, inputs: Inputs) -> dict[str, Any]:
    """Outcome of one model under one adapter, and what was said."""
    try:
        model, said = attach(base, config)
    except Exception as error:
        return {"outcome": "refused" if _is_clear(error) else "error", "says": _line(error)}
    try:
        run(model, inputs)
    except Exception as error:
        return {"outcome": "late" if _is_clear(error) else "error", "says": _line(error)}
    try:
        wrong = faults(base, model, kind, inputs)
    except Exception as error:
        return {"outcome": "error", "says": _line(error)}
    if wrong:
        return {"outcome": "wrong", "says": "; ".join(wrong)}
    left_out = [each for each in said if "leave out" in each]
    return {"outcome": "left out" if left_out else "right", "says": " ".join(said)}


def prepare(kind: str, name: str) -> tuple[Any, Inputs]:
    """A tiny model that matters, and inputs that it takes."""
    if kind == "timm":
        model = timm.create_model(name, pretrained=False, num_classes=10).eval()
        enliven(model)
        return model, {"x": torch.randn(2, *model.pretrained_cfg["input_size"])}
    if kind in CASES:
        model, inputs = build_case(kind, name)
        enliven(model)
        run(model, inputs)
        return model, inputs
    model = build("vision-language" if kind == "with images" else kind, name)
    enliven(model)
    _settle(model, kind)
    if kind == "with images":
        inputs = with_image(model, name)
        run(model, inputs)
        return model, inputs
    decoder = getattr(model.config, "decoder", None)
    if kind in ("seq2seq", "speech") and not getattr(decoder, "add_cross_attention", True):
        raise ValueError("the decoder of the default config does not look at the encoder")
    last: Exception | None = None
    for inputs in candidates(model, kind):
        try:
            output = run(model, inputs)
        except Exception as error:  # the next candidate may suit it better
            last = last or error
            continue
        if torch.isfinite(output).all() and output.std() > 0:
            return model, inputs
    raise last or ValueError("outputs that are not finite")


def _settle(model: Any, kind: str) -> None:
    """Padding where a config names none, and generation that goes on for as long as it is asked to."""
    for config in (model.config, getattr(model.config, "text_config", None)):
        if (
            config is not None
            and kind in ("causal", "classification")
            and getattr(config, "pad_token_id", None) is None
        ):
            config.pad_token_id = 0
    if kind in ("classification", "seq2seq") and getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = 0
    if model.config.model_type == "xmod":
        model.set_default_language("en_XX")
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    for name in (
        "eos_token_id",
        "forced_eos_token_id",
        "forced_bos_token_id",
        "suppress_tokens",
        "begin_suppress_tokens",
    ):
        setattr(settings, name, None)
    settings.no_repeat_ngram_size = 0
    if settings.decoder_start_token_id is None:
        settings.decoder_start_token_id = 1


def _is_clear(error: Exception) -> bool:
    """Whether an error was raised by this package, in its own words."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return "peft_promptmoe" in last and isinstance(error, (ValueError, RuntimeError, TypeError))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:400]


if __name__ == "__main__":
    main(parse_args())
