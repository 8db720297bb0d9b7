# SPDX-License-Identifier: Apache-2.0
"""What each method learns on 1,000 real images with a pretrained vision transformer, on one budget.

    python benchmarks/learning_vision.py                          # CIFAR-10
    python benchmarks/learning_vision.py --task mnist
    python benchmarks/learning_vision.py --epochs 20 --two-rates  # on a longer budget
    python benchmarks/learning_vision.py --methods vapt lora      # some methods only
    python benchmarks/learning_vision.py --of-vapt                # VAPT in other sizes and by its official recipe
    python benchmarks/learning_vision.py --low-data               # and with 1, 10 and 30 per cent of the images

The protocol is VTAB-1k's. Every method gets the same images, epochs, batches and number of learning rates. The rate is
chosen by training on 800 images and scoring 200 with seed 0; at that rate only, all 1,000 are trained on with seeds 1
to 3, and 2,000 others are scored. The head trains at one fixed rate in every method. Finished cells are kept in the
JSON file and not run again, and any method may be added later.
"""

import argparse
import math
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "advanced"))

import assets
from harness import search, vision_tasks
from harness.reading import FOLDER
from harness.reading import results as read_results
from harness.search import HEADINGS, line, ranking, run_cell, run_method, spread, time_steps, two_rates
from harness.training import Budget, Results, Split, predict, train_cell
from harness.vision_methods import ALL, METHODS, OF_VAPT, PROMPTS

SIZES = {"cifar10": 98, "mnist": 56}  # pixels, grids of 7 x 7 and 4 x 4 patches
TEST = 2000
EPOCHS = 5
LOW_DATA = ("vpt-deep", "vapt")
SHARES = (0.01, 0.1, 0.3)
FEWEST_STEPS = 100  # with few images an epoch is a step or two, and five of them would teach no method anything


@dataclass(frozen=True)
class Bench:
    """All that a cell needs: the base model's folder, the images, of `size` pixels a side, and the budget."""

    model: str
    size: int
    images: dict[str, vision_tasks.Images]
    budget: Budget
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)  # where not all are tried
    features: dict[str, vision_tasks.Features] = field(default_factory=dict)

    def lrs(self, name: str) -> tuple[float, ...]:
        return self.rates.get(name, ALL[name].lrs)

    def details(self, cells: list[dict[str, Any]]) -> dict[str, Any]:
        return {}

    def run(self, name: str, lr: float, seed: int, final: bool, share: float = 1.0) -> dict[str, Any]:
        """One cell: train `name` at `lr` with `seed`; score the development split, or the test split if `final`.

        `share` is that of the training images that are used.
        """
        torch.manual_seed(seed)
        trained, scored = ("both", "test") if final else ("train", "dev")
        model, data = self.ready(name, trained)
        held_out = self.images[scored] if ALL[name].build else self._features(scored)
        budget = self.budget
        if share < 1.0:
            # As many images while a rate is chosen as at the end; those that choose are others.
            count = round(share * len(self.images["both"]))
            data = data.select(vision_tasks.subset(data.labels, count, seed))
            epochs = math.ceil(FEWEST_STEPS / math.ceil(len(data) / budget.batch_size))
            budget = replace(budget, epochs=max(budget.epochs, epochs))
        label = f"{name} lr={lr:g} seed={seed} share={share:g}"
        cell = train_cell(model, data, lr, seed, budget, label, ALL[name].recipe)
        accuracy = self._accuracy(model, held_out)
        return {**cell, "images": len(data), "epochs": budget.epochs, "accuracy": accuracy}

    def ready(self, name: str, split: str = "train") -> tuple[nn.Module, Any]:
        base, build = self._base(), ALL[name].build
        if build is None:
            return vision_tasks.head_alone(base.classifier), self._features(split)
        return build(base, self.size), self.images[split]

    def _base(self) -> PreTrainedModel:
        # Eager attention: the fused bf16 backward pass on CPU takes as long as the whole rest of the step.
        return AutoModelForImageClassification.from_pretrained(self.model, num_labels=10, attn_implementation="eager")

    def _accuracy(self, model: nn.Module, split: Split) -> float:
        return round((predict(model, split, self.budget) == split.labels).double().mean().item(), 5)

    def _features(self, split: str) -> vision_tasks.Features:
        """What the head of the frozen model reads, so that training it need not run the model again."""
        if split not in self.features:
            found: list[Tensor] = []
            base = self._base()
            base.classifier.register_forward_pre_hook(lambda _, args: found.append(args[0].float()))
            predict(base, self.images[split], self.budget)
            self.features[split] = vision_tasks.Features(torch.cat(found), self.images[split].labels)
        return self.features[split]


def run_low_data(bench: Bench, results: Results, name: str, seeds: list[int]) -> None:
    """Score a method with few images, at the learning rate that is best with as many."""
    row = results.summaries[name]
    curve = {}
    for share in SHARES:
        lrs = bench.lrs(name)
        dev = {lr: run_cell(bench, results, name, lr, 0, final=False, share=share)["accuracy"] for lr in lrs}
        best = max(lrs, key=lambda lr: dev[lr])
        cells = [run_cell(bench, results, name, best, seed, final=True, share=share) for seed in seeds]
        curve[str(cells[0]["images"])] = spread(cells) | {"lr": best}
    curve[str(len(bench.images["both"]))] = {key: row[key] for key in ("test", "mean", "sd", "lr")}
    results.data.setdefault("low_data", {})[name] = curve
    results.save()


def print_tables(results: Results) -> None:
    print(f"\n{HEADINGS}")
    for name, row in ranking(results):
        print(line(name, row))
    for name, curve in results.data.get("low_data", {}).items():
        points = sorted(curve.items(), key=lambda item: int(item[0]))
        print(f"{name:14} " + "   ".join(f"{images} images {row['mean']:.4f}" for images, row in points))


def parse_args() -> argparse.Namespace:
    parser = search.parser(__doc__)
    parser.add_argument("--task", choices=sorted(vision_tasks.TASKS), default="cifar10")
    parser.add_argument("--methods", nargs="+", choices=list(ALL), help="default: all that the results are of")
    parser.add_argument("--of-vapt", action="store_true", help="VAPT in other sizes and by its official recipe")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="bf16 autocast, which halves a step's time on CPUs that have AMX",
    )
    parser.add_argument("--two-rates", action="store_true", help="only the usual budget's rate and the next smaller")
    parser.add_argument("--low-data", action="store_true", help=f"also train {', '.join(LOW_DATA)} on few images")
    parser.add_argument(
        "--results",
        type=Path,
        help="JSON file (default: benchmarks/results/learning_vision_TASK[_vapt][_N_epochs].json)",
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    search.prepare(args)
    folder, budget = assets.dinov2_small(), Budget(epochs=args.epochs, batch_size=16, head_lr=1e-2, bf16=args.bf16)
    size = SIZES[args.task]
    usual = f"learning_vision_{args.task}{'_vapt' * args.of_vapt}"
    methods = args.methods or list(OF_VAPT if args.of_vapt else METHODS)
    rates = {}
    if args.two_rates:
        rates = {name: two_rates(ALL[name].lrs, read_results(usual), name) for name in methods}
    bench = Bench(folder, size, vision_tasks.load(args.task, folder, size, TEST), budget, rates)
    settings = {
        "task": args.task,
        "model": Path(folder).name,
        "images": {name: len(split) for name, split in bench.images.items()},
        "image_size": size,
        "prompts": PROMPTS,
        "budget": asdict(budget),
    }
    suffix = "" if args.epochs == EPOCHS else f"_{args.epochs}_epochs"
    results = Results(args.results or FOLDER / f"{usual}{suffix}.json", settings)
    if args.times:
        time_steps(bench, results, methods)
        return
    for name in methods:
        run_method(bench, results, name, args.seeds)
        if args.low_data and name in LOW_DATA:
            run_low_data(bench, results, name, args.seeds)
    print_tables(results)


if __name__ == "__main__":
    main(parse_args())
