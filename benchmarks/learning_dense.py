# SPDX-License-Identifier: Apache-2.0
"""What several frozen backbones bring on a dense task: the depth of every patch of a photo.

    python benchmarks/learning_dense.py
    python benchmarks/learning_dense.py --methods pmoe-none "head concat"

Photos are frames of `examples/advanced/moving_layers.py`, 112 pixels a side: cut-outs before a background, with exact
depth. Backbones are DINOv2-S and the two of `examples/advanced/small_experts.py`, neither of which has learned depth.
The head, a 3 x 3 convolution, reads the patches' features of all backbones that a method has, on the grid of the
first, and trains at one fixed rate. A patch counts as right if its mean depth, on a logarithmic scale, is off by less
than a quarter. Rates are chosen on development photos with seed 0, test photos are scored with seeds 1 to 3. Finished
cells are kept in the JSON file and not run again.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import ImageClassifierOutput

from peft_promptmoe import PMoEConfig, VAPTConfig, patch_maps

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "advanced"))

import assets
import disparity
import motion_data
import small_experts
from harness import search
from harness.motion_pairs import Pairs
from harness.reading import FOLDER
from harness.search import HEADINGS, line, ranking, run_method, time_steps
from harness.training import Budget, Results, predict_logits, train_cell
from harness.vision_methods import lora

SIZES = {"train": 320, "dev": 80, "test": 160}
SIDE, PATCH = 112, 14  # pixels
GRID = SIDE // PATCH
PROMPTS = 5
NEAR = math.log(1.25)
MEAN, STD = (torch.tensor(each)[:, None, None] for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
RATES = (1e-3, 3e-3)
Maps = Callable[[Tensor], Tensor]  # of images (B, 3, SIDE, SIDE), (B, channels, GRID, GRID)


class Photos:
    """Images and, as `labels` (N, GRID * GRID), the mean logarithm of depth in every patch."""

    def __init__(self, pairs: Pairs) -> None:
        pixels = pairs.columns["pixel_values"]
        self.pixels = nn.functional.interpolate(pixels, size=(SIDE, SIDE), mode="area")
        depth = pairs.columns["depth_labels"].log()
        self.labels = nn.functional.adaptive_avg_pool2d(depth[:, None], GRID).flatten(1)

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        return 1

    def batch(self, chosen: list[int]) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[chosen], "labels": self.labels[chosen]}


class DenseModel(nn.Module):
    """Backbones, and a head that reads their maps."""

    def __init__(self, backbones: nn.Module, maps: Maps) -> None:
        super().__init__()
        self.backbones, self.maps = backbones, maps
        with torch.no_grad():
            self.head = disparity.DepthHead(maps(torch.zeros(1, 3, SIDE, SIDE)).shape[1])

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        found = self.head(self.maps(pixel_values)).flatten(1)
        loss = None if labels is None else (found - labels).abs().mean()
        return ImageClassifierOutput(loss=loss, logits=found)


def dinov2_maps(model: nn.Module) -> Maps:
    def maps(pixels: Tensor) -> Tensor:
        patches: Tensor = model(pixel_values=pixels).last_hidden_state[:, 1:]
        return patches.transpose(1, 2).unflatten(2, (GRID, GRID))

    return maps


def maps_of_all(backbones: nn.ModuleList) -> Maps:
    """Maps of all backbones, each as it is, on the grid of the first."""
    first, *others = backbones

    def of(model: Any, pixels: Tensor) -> Tensor:
        side = model.patch_embed.img_size[0]
        half = (pixels * STD + MEAN - 0.5) / 0.5  # as the small experts have learned to see
        shown = nn.functional.interpolate(half, size=(side, side), mode="bilinear", antialias=True)
        patches = model.forward_features(shown)[:, model.num_prefix_tokens :]
        found = patches.transpose(1, 2).unflatten(2, model.patch_embed.grid_size)
        return nn.functional.interpolate(found, size=(GRID, GRID), mode="bilinear")

    return lambda pixels: torch.cat([dinov2_maps(first)(pixels), *(of(model, pixels) for model in others)], dim=1)


def dinov2() -> nn.Module:
    # Eager attention: the fused bf16 backward pass on CPU takes as long as the whole rest of the step.
    return AutoModel.from_pretrained(assets.dinov2_small(), attn_implementation="eager")


def experts() -> list[str]:
    return [small_experts.digits_expert(), small_experts.photos_expert()]


def head_alone() -> DenseModel:
    model = dinov2().requires_grad_(False).eval()
    return DenseModel(model, dinov2_maps(model))


def head_on_all() -> DenseModel:
    small = (timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0) for folder in experts())
    backbones = nn.ModuleList([dinov2(), *small]).requires_grad_(False)
    return DenseModel(backbones, maps_of_all(backbones))


def adapted(model: PeftModel) -> DenseModel:
    return DenseModel(model, dinov2_maps(model))


def pmoe(dispatcher: str, names: Callable[[], list[str]] = experts, prompts: int = PROMPTS) -> DenseModel:
    pixels = {"image_mean": MEAN.flatten().tolist(), "image_std": STD.flatten().tolist()}
    config = PMoEConfig(experts=names(), num_virtual_tokens=prompts, dispatcher=dispatcher, **pixels)
    model = get_peft_model(dinov2(), config)
    return DenseModel(model, lambda images: patch_maps(model, images))


def vpt_deep() -> DenseModel:
    config = VAPTConfig(num_virtual_tokens=PROMPTS, image_size=SIDE, num_static_layers="all")
    return adapted(get_peft_model(dinov2(), config))


METHODS: dict[str, Callable[[], DenseModel]] = {
    "head dinov2": head_alone,
    "head concat": head_on_all,
    "vpt-deep dinov2": vpt_deep,
    "lora": lambda: adapted(get_peft_model(dinov2(), lora(SIDE))),
    "pmoe-alone": lambda: pmoe("token", list),
    "pmoe-token": lambda: pmoe("token"),
    "pmoe-none": lambda: pmoe("none"),
}


@dataclass(frozen=True)
class Bench:
    """All that a cell needs."""

    photos: dict[str, Photos]
    budget: Budget

    def lrs(self, name: str) -> tuple[float, ...]:
        return RATES

    def run(self, name: str, lr: float, seed: int, final: bool) -> dict[str, Any]:
        """One cell: train `name` at `lr` with `seed`; score the development split, or the test split if `final`."""
        torch.manual_seed(seed)
        model, data = self.ready(name)
        cell = train_cell(model, data, lr, seed, self.budget, f"{name} lr={lr:g} seed={seed}")
        photos = self.photos["test" if final else "dev"]
        off = (predict_logits(model, photos, self.budget) - photos.labels).abs()
        return cell | {
            "accuracy": round((off < NEAR).double().mean().item(), 5),
            "off": round(off.double().mean().item(), 5),
        }

    def details(self, cells: list[dict[str, Any]]) -> dict[str, Any]:
        return {"off": round(sum(cell["off"] for cell in cells) / len(cells), 4)}

    def ready(self, name: str) -> tuple[DenseModel, Photos]:
        return METHODS[name](), self.photos["train"]


def constant(photos: dict[str, Photos]) -> float:
    """Share of test patches that the middle depth of the training photos gets right."""
    off = (photos["test"].labels - photos["train"].labels.median()).abs()
    return round((off < NEAR).double().mean().item(), 5)


def parse_args() -> argparse.Namespace:
    parser = search.parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--results", type=Path, default=FOLDER / "learning_dense.json")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    search.prepare(args)
    train, test = motion_data.photos("train"), motion_data.photos("test")
    sources = {"train": (train, 0), "dev": (train, 500), "test": (test, 1000)}
    photos = {name: Photos(Pairs("depth", of, SIZES[name], seed)) for name, (of, seed) in sources.items()}
    budget = Budget(epochs=args.epochs, batch_size=16)
    config = {"task": "depth of patches", "images": SIZES, "prompts": PROMPTS, "budget": asdict(budget)}
    results = Results(args.results, config)
    results.data["constant"] = constant(photos)
    bench = Bench(photos, budget)
    if args.times:
        time_steps(bench, results, args.methods)
        return
    for name in args.methods:
        run_method(bench, results, name, args.seeds)
    print(f"\n{HEADINGS}  off")
    for name, row in ranking(results):
        print(f"{line(name, row)}  {row['off']:.3f}")
    print(f"the middle depth everywhere: {results.data['constant']:.4f}")


if __name__ == "__main__":
    main(parse_args())
