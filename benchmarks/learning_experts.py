# SPDX-License-Identifier: Apache-2.0
"""What several frozen backbones bring, and what the dispatcher brings, on real images that ask for several.

    python benchmarks/learning_experts.py
    python benchmarks/learning_experts.py --methods pmoe-token "head concat"

The images are those of `examples/advanced/digits_on_photos.py`, the backbones DINOv2-S and the two small vision
transformers that `examples/advanced/small_experts.py` trains. Compared are each backbone alone with a head, with
VPT-Deep and with VAPT; DINOv2-S with LoRA; ensembles of the three (mean of their probabilities); a linear head on the
frozen features of all; pMoE with each dispatcher; and pMoE without one, but with as many trained parameters as the
default dispatcher has, in more prompts. Every method gets the same images, epochs, batches and number of learning
rates. The rate is chosen on the development split with seed 0 and tested with seeds 1 to 3; pMoE's is chosen with its
default dispatcher and kept for the others. Heads beside prompts train at one fixed rate. Finished cells are kept in
the JSON file and not run again.
"""

import argparse
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from peft_promptmoe import PMoEConfig, VAPTConfig, parameter_report, routing_report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "advanced"))

import assets
import digits_on_photos
import small_experts
from harness import search
from harness.reading import FOLDER
from harness.records import rounded
from harness.rows import DISPATCHERS
from harness.search import HEADINGS, cell_key, line, ranking, run_method, time_steps
from harness.training import Budget, Results, predict_logits, train_cell
from harness.vision_methods import lora
from harness.vision_tasks import Classifier, Features, Images, head_alone, pixels_of

PROMPTS = 5  # per block; those of pMoE stay, so its last block has sixty
WIDE_PROMPTS = 46  # and no dispatcher: as many parameters as five prompts and the default dispatcher
BACKBONES = ("dinov2", "digits", "photos")
RATES = (3e-3, 1e-2)
LORA_RATES = (3e-4, 1e-3)
WIDE = "pmoe-none-equal"
METHODS = (
    *(f"{tuner} {backbone}" for tuner in ("head", "vpt-deep", "vapt") for backbone in BACKBONES),
    "head ensemble",
    "vpt-deep ensemble",
    "vapt ensemble",
    "head concat",
    *(f"pmoe-{dispatcher}" for dispatcher in DISPATCHERS),
    "lora dinov2",
    WIDE,
)
MEAN, STD = (torch.tensor(each)[:, None, None] for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
HALF = torch.full((3, 1, 1), 0.5)


@dataclass(frozen=True)
class Bench:
    """All that a cell needs.

    Attributes:
        images: by backbone and split, the images as that backbone wants them.
        results: whose chosen rates ensembles are made with.
        features: by backbone and split, once they are computed.
        logits: by method, seed and split, of cells that were run by this process.
    """

    images: dict[str, dict[str, Images]]
    budget: Budget
    results: Results
    features: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    logits: dict[tuple[str, int, str], Tensor] = field(default_factory=dict)

    def lrs(self, name: str) -> tuple[float, ...]:
        if name.endswith("ensemble"):
            return (0.0,)  # its members' rates are chosen already
        if name == "lora dinov2":
            return LORA_RATES
        if name.startswith("pmoe-") and name not in ("pmoe-token", WIDE):  # so that nothing but the dispatcher differs
            return (self.results.summaries["pmoe-token"]["lr"],)
        return RATES

    def run(self, name: str, lr: float, seed: int, final: bool) -> dict[str, Any]:
        """One cell: train `name` at `lr` with `seed`; score the development split, or the test split if `final`."""
        split = "test" if final else "dev"
        if name.endswith("ensemble"):
            tuner = name.split(maxsplit=1)[0]
            members = [f"{tuner} {backbone}" for backbone in BACKBONES]
            made = [self._made(member, self.results.summaries[member]["lr"], seed, final) for member in members]
            cell: dict[str, Any] = {
                "trainable": sum(each["trainable"] for each in made),
                "train_seconds": round(sum(each["train_seconds"] for each in made), 1),
            }
            chances = torch.stack([self.logits[member, seed, split].softmax(-1) for member in members]).mean(dim=0)
        else:
            cell = self._train(name, lr, seed, final)
            chances = self.logits[name, seed, split]
        labels = self.images["dinov2"][split].labels
        right = (chances.argmax(-1) == labels).double().mean().item()
        return {"accuracy": round(right, 5), **cell}

    def details(self, cells: list[dict[str, Any]]) -> dict[str, Any]:
        return {key: cells[0][key] for key in ("held", "decided", "shares") if key in cells[0]}

    def _made(self, name: str, lr: float, seed: int, final: bool) -> dict[str, Any]:
        """A member's cell, with its logits in `logits`: of a cell that an earlier run finished, they are gone."""
        key = cell_key(name, lr, seed, final)
        if (name, seed, "test" if final else "dev") in self.logits and key in self.results.cells:
            return self.results.cells[key]
        return self._train(name, lr, seed, final)

    def _train(self, name: str, lr: float, seed: int, final: bool) -> dict[str, Any]:
        trained, scored = ("both", "test") if final else ("train", "dev")
        torch.manual_seed(seed)
        model, data = self.ready(name, trained)
        held_out = self._data(name, scored)
        cell = train_cell(model, data, lr, seed, self.budget, f"{name} lr={lr:g} seed={seed}")
        self.logits[name, seed, scored] = predict_logits(model, held_out, self.budget)
        return cell | (self._routes(model.model) if name.startswith("pmoe") else {})

    def ready(self, name: str, split: str = "train") -> tuple[Classifier, Images | Features]:
        tuner, _, of = name.partition(" ")
        data = self._data(name, split)
        if isinstance(data, Features):
            return head_alone(nn.Linear(data.features.shape[1], len(digits_on_photos.CLASSES))), data
        return Classifier(self._pmoe(tuner) if tuner.startswith("pmoe") else self._prompted(tuner, of)), data

    def _data(self, name: str, split: str) -> Images | Features:
        """What a method is trained on or scored with: a head alone on features, which are there at once."""
        tuner, _, of = name.partition(" ")
        return self._features(of, split) if tuner == "head" else self.images[of or "dinov2"][split]

    def _prompted(self, tuner: str, of: str) -> nn.Module:
        if tuner == "lora":
            return get_peft_model(backbone(of, len(digits_on_photos.CLASSES)), lora(digits_on_photos.CANVAS))
        static = {"num_static_layers": "all"} if tuner == "vpt-deep" else {}
        size = self.images[of]["test"].pixels.shape[-1]
        return get_peft_model(
            backbone(of, len(digits_on_photos.CLASSES)),
            VAPTConfig(num_virtual_tokens=PROMPTS, image_size=[size, size], **static),
        )

    def _pmoe(self, tuner: str) -> nn.Module:
        config = PMoEConfig(
            experts=[small_experts.digits_expert(), small_experts.photos_expert()],
            num_virtual_tokens=WIDE_PROMPTS if tuner == WIDE else PROMPTS,
            dispatcher="none" if tuner == WIDE else tuner.removeprefix("pmoe-"),
            carry_prompts=tuner != WIDE,  # carried ones would be over five hundred in the last block
            image_mean=MEAN.flatten().tolist(),
            image_std=STD.flatten().tolist(),
        )
        # As for DINOv2 below: experts without the fused backward pass take a tenth less time.
        fused = timm.layers.use_fused_attn()
        timm.layers.set_fused_attn(False)
        try:
            return get_peft_model(backbone("dinov2", len(digits_on_photos.CLASSES)), config)
        finally:
            timm.layers.set_fused_attn(fused)

    def _routes(self, model: nn.Module) -> dict[str, Any]:
        """Parameters held, which expert decided the last predictions, and what the prompts were made of."""
        report = routing_report(model)
        return {
            "held": parameter_report(model).total[0],
            "decided": dict(zip(BACKBONES, rounded(report.decided), strict=True)),
            "shares": dict(zip((*BACKBONES, "carried", "patches"), rounded(report.shares.mean(dim=0)), strict=True)),
        }

    def _features(self, of: str, split: str) -> Features:
        """What the head of a frozen backbone reads, or of all of them, one behind the other."""
        names = BACKBONES if of == "concat" else (of,)
        for name in names:
            if (name, split) not in self.features:
                encoder = Classifier(backbone(name, 0))
                self.features[name, split] = predict_logits(encoder, self.images[name][split], self.budget)
        read = [self.features[name, split] for name in names]
        return Features(torch.cat(read, dim=-1), self.images["dinov2"][split].labels)


def backbone(name: str, classes: int) -> nn.Module:
    """With a head for `classes`; without classes, what gives the features that a head reads."""
    if name != "dinov2":
        folder = small_experts.digits_expert() if name == "digits" else small_experts.photos_expert()
        return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=classes)
    # Eager attention: the fused bf16 backward pass on CPU takes as long as the whole rest of the step.
    model = AutoModelForImageClassification.from_pretrained(
        assets.dinov2_small(), num_labels=classes or 1, attn_implementation="eager"
    )
    if not classes:
        model.classifier = nn.Identity()
    return model


def prepared(splits: datasets.DatasetDict) -> dict[str, dict[str, Images]]:
    """The splits, and `both` of those to train on, as every backbone wants them."""
    splits["both"] = datasets.concatenate_datasets([splits["train"], splits["dev"]])
    sizes = {"dinov2": digits_on_photos.CANVAS}
    for name, folder in {"digits": small_experts.digits_expert(), "photos": small_experts.photos_expert()}.items():
        sizes[name] = timm.create_model(f"local-dir:{folder}", pretrained=False).patch_embed.img_size[0]
    return {
        name: {
            split: Images(
                pixels_of(data["pixel_values"], size),
                torch.tensor(data["label"]),
                *((MEAN, STD) if name == "dinov2" else (HALF, HALF)),
            )
            for split, data in splits.items()
        }
        for name, size in sizes.items()
    }


def add_ensemble_steps(results: Results) -> None:
    """A step of an ensemble is one of each of its members."""
    seconds = results.data["step_seconds"]
    for tuner in ("head", "vpt-deep", "vapt"):
        members = [seconds.get(f"{tuner} {name}") for name in BACKBONES]
        if None not in members:
            seconds[f"{tuner} ensemble"] = round(sum(members), 6)
    results.save()


def print_table(results: Results) -> None:
    print(f"\n{HEADINGS}  decided by")
    for name, row in ranking(results):
        print(f"{line(name, row)}  {row.get('decided', '')}")


def parse_args() -> argparse.Namespace:
    parser = search.parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--results", type=Path, default=FOLDER / "learning_experts.json")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    search.prepare(args)
    budget = Budget(epochs=args.epochs, batch_size=16)
    images = prepared(digits_on_photos.splits())
    config = {
        "task": "digits on photos",
        "images": {name: len(split) for name, split in images["dinov2"].items()},
        "prompts": PROMPTS,
        "budget": asdict(budget),
    }
    results = Results(args.results, config)
    bench = Bench(images, budget, results)
    if args.times:
        time_steps(bench, results, [name for name in args.methods if not name.endswith("ensemble")])
        add_ensemble_steps(results)
        return
    for name in args.methods:
        run_method(bench, results, name, args.seeds)
    print_table(results)


if __name__ == "__main__":
    main(parse_args())
