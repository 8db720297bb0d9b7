# SPDX-License-Identifier: Apache-2.0
"""What a frozen DINOv2-S knows of motion, block by block, before anything is trained.

    python benchmarks/motion_levels.py     # writes results/motion_levels.json, in some three minutes on one core

In every block: the error of the flow that matching alone finds, a softmax over the cosines of patches with those of
the other frame, each less the mean of all patches; and how units would group the block's patches with and without
centring, before any training. Pairs are held-out ones of `learning_motion.py`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "advanced"))

import assets
import motion_data
from harness.motion_pairs import Pairs
from harness.reading import FOLDER
from harness.records import rounded
from harness.training import Results
from peft_promptmoe import ProMotionConfig, assignment_report
from peft_promptmoe.motion import EndPointError

PAIRS = 24
TEMPERATURES = (0.01, 0.02, 0.04)  # the best one counts, for each block
BATCH = 8


def maps_of(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """Of every block, patches (B, N, D)."""
    with torch.no_grad():
        states = [model(part, output_hidden_states=True).hidden_states[1:] for part in pixels.split(BATCH)]
    return [torch.cat([each[block][:, 1:] for each in states]) for block in range(len(states[0]))]


def matched(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """(B, 2, rows, columns) flow in cells, from patches (B, N, D) of both frames."""
    side = round(first.shape[1] ** 0.5)
    mean = torch.cat([first, second]).mean((0, 1))
    one, other = (F.normalize(x - mean, dim=-1) for x in (first, second))
    y, x = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    places = torch.stack([x, y]).flatten(1)
    found = torch.einsum("bnm,cm->bcn", (one @ other.transpose(1, 2) / temperature).softmax(-1), places)
    return (found - places).unflatten(2, (side, side))


def matching(pairs: Pairs, model: nn.Module) -> dict[str, Any]:
    """Error of the flow that each block's patches give by themselves."""
    labels = pairs.columns["flow_labels"]
    firsts, seconds = (maps_of(model, pairs.columns[name]) for name in ("pixel_values", "next_pixel_values"))
    errors, scores = [], {}
    for first, second in zip(firsts, seconds, strict=True):
        tried = []
        for temperature in TEMPERATURES:
            flow = matched(first, second, temperature)
            scale = labels.shape[-1] / flow.shape[-1]
            metric = EndPointError()
            large = F.interpolate(scale * flow, labels.shape[-2:], mode="bilinear", align_corners=False)
            metric.add_batch(predictions=large, references=labels)
            scores = metric.compute()
            tried.append(float(scores["epe"]))
        errors.append(round(min(tried), 4))
    return {"epe": errors, "zero flow": scores["epe_zero_flow"], "constant flow": scores["epe_constant_flow"]}


def grouping(pairs: Pairs, folder: str, center: bool) -> dict[str, Any]:
    """How units behind all blocks group patches by the banks that the first batch starts."""
    torch.manual_seed(0)
    base = AutoModel.from_pretrained(folder)
    blocks = list(range(base.config.num_hidden_layers))
    model = get_peft_model(base, ProMotionConfig(layers_to_transform=blocks, center=center))
    pixels = pairs.columns["pixel_values"]
    with torch.no_grad():
        model.train()(pixels[:BATCH])
        model.eval()(pixels[BATCH : 2 * BATCH])
    report = assignment_report(model)
    return {name: rounded(getattr(report, name)) for name in ("entropy", "margin", "nearest", "between")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--results", type=Path, default=FOLDER / "motion_levels.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    pairs, folder = Pairs("flow", motion_data.photos("test"), PAIRS, 1000), assets.dinov2_small()
    results = Results(args.results, {"model": "DINOv2-S", "pairs": PAIRS, "temperatures": list(TEMPERATURES)})
    results.cell("matching", lambda: matching(pairs, AutoModel.from_pretrained(folder).eval()))
    for name, center in (("centred", True), ("not centred", False)):
        results.cell(name, lambda center=center: grouping(pairs, folder, center))
    for block, error in enumerate(results.cells["matching"]["epe"]):
        between = [results.cells[name]["between"][block] for name in ("centred", "not centred")]
        print(f"block {block:2}: EPE {error:.2f}, cosine between prototypes {between[0]:.2f} and {between[1]:.2f}")


if __name__ == "__main__":
    main()
