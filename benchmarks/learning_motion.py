# SPDX-License-Identifier: Apache-2.0
"""What each method teaches a frozen DINOv2-S about motion or depth, on pairs with exact labels.

    python benchmarks/learning_motion.py                       # optical flow
    python benchmarks/learning_motion.py --task depth
    python benchmarks/learning_motion.py --ablations           # parts of ProMotion left out, one at a time
    python benchmarks/learning_motion.py --transfer            # with prototypes of the other task
    python benchmarks/learning_motion.py --data /data/MPI-Sintel    # scored on these too

Pairs are those of `examples/advanced/moving_layers.py`, shown at 224 pixels. A seed's heads are trained on the frozen
backbone first; every method starts from these heads and trains on with them, on the same pairs, in the same order, for
as many steps. A rate is chosen with seed 0, on development pairs made of training photos; scores are of pairs of other
photos, of the same pairs under image noise, and of real ones. Blocks behind the last one that is read are left out,
and those that a method leaves as they are run once for each image, so seconds of a cell are not its cost.
"""

import argparse
import copy
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "advanced"))

import assets
import motion
import motion_data
from harness import search
from harness.motion_methods import ABLATIONS, METHODS, OWN, TRANSFER, Method, is_prototypes, take_prototypes
from harness.motion_pairs import Pairs
from harness.reading import FOLDER
from harness.records import rounded
from harness.remembered import Known, remember
from harness.search import run_cell
from harness.training import Budget, Results, train_cell
from peft_promptmoe import DepthModel, FlowModel, assignment_report
from peft_promptmoe.motion import DepthError, EndPointError

SIZES = {"train": 320, "dev": 48, "test": 80}
NOISE = (5, 10, 25)  # spread of image noise, of a range of 255
NOISY = 24  # test pairs that are scored with it
HEAD_BUDGET = Budget(epochs=6, batch_size=4, bf16=False)
BUDGET = Budget(epochs=2, batch_size=4, head_lr=3e-3, bf16=False)  # the rate at which heads alone do best
HEAD_RATE = 3e-3
CLASSES: dict[str, Any] = {"flow": FlowModel, "depth": DepthModel}
OTHER = {"flow": "depth", "depth": "flow"}
SCORE = {"flow": "epe", "depth": "abs_rel"}


@dataclass
class Bench:
    """All that a cell needs."""

    task: str
    train: Pairs
    dev: Pairs
    test: Pairs
    real: dict[str, Dataset[dict[str, Tensor]]]
    heads: Path
    methods: dict[str, Method]
    budget: Budget = BUDGET
    head_budget: Budget = HEAD_BUDGET
    other: "Bench | None" = None
    backbone: nn.Module = field(init=False)
    known: list[Known] = field(init=False)  # what frozen blocks made of images

    def __post_init__(self) -> None:
        depth = motion.blocks(self.task)[-1] + 1
        self.known = [{} for _ in range(depth)]
        self.backbone = AutoModel.from_pretrained(assets.dinov2_small(), num_hidden_layers=depth)

    def base(self, seed: int, frozen: bool = True) -> Any:
        """The frozen backbone with heads of that seed, untrained."""
        torch.manual_seed(seed)
        options = {"levels": motion.levels(self.task), "freeze_backbone": frozen, **motion.DEPTHS}
        return CLASSES[self.task](copy.deepcopy(self.backbone), **options)

    def trained_heads(self, seed: int) -> dict[str, Tensor]:
        """Heads that were trained on the frozen backbone; kept in a file beside other assets."""
        file = self.heads / f"{self.task} seed={seed} epochs={self.head_budget.epochs}.pt"
        if not file.exists():
            model = self.base(seed)
            remember(model, len(self.known), self.known)
            train_cell(model, self.train, HEAD_RATE, seed, self.head_budget, f"heads seed={seed}")
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({n: p for n, p in model.state_dict().items() if n.startswith(tuple(model.head_names))}, file)
        found: dict[str, Tensor] = torch.load(file, weights_only=True)
        return found

    def trained(self, name: str, lr: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """`name` trained at `lr` from the heads of `seed`, and what the training says of itself."""
        method, heads = self.methods[name], self.trained_heads(seed)
        base = self.base(seed, method.frozen)
        base.load_state_dict(heads, strict=False)
        blocks = motion.blocks(self.task)
        model = method.attach(base, blocks)
        if method.foreign:
            assert self.other is not None
            take_prototypes(model, self.other.prototypes(lr, seed))
        remember(model, method.untouched(blocks), self.known)
        return model, train_cell(model, self.train, lr, seed, self.budget, f"{name} lr={lr:g} seed={seed}")

    def prototypes(self, lr: float, seed: int) -> dict[str, Tensor]:
        """What makes the prototypes of units that were trained on this task."""
        model = self.trained(OWN, lr, seed)[0]
        return {name: tensor for name, tensor in model.state_dict().items() if is_prototypes(name)}

    def run(self, name: str, lr: float, seed: int, final: bool) -> dict[str, Any]:
        """One cell: train `name` at `lr` from the heads of `seed`, and score it on all that there is."""
        model, cell = self.trained(name, lr, seed)
        cell["dev"] = self.score(model, self.dev.noisy(0, len(self.dev)))
        cell["test"] = self.score(model, self.test.noisy(0, len(self.test)))
        cell |= {f"noise {spread}": self.score(model, self.test.noisy(spread, NOISY)) for spread in (0, *NOISE)}
        cell["real"] = {of: self.score(model, data, batch=1) for of, data in self.real.items()}
        if name.startswith(("promotion", "units")):
            cell["assignment"] = self.assignments(model)
        return cell

    def score(self, model: nn.Module, data: Any, batch: int = 8) -> dict[str, float]:
        metric: Any = EndPointError() if self.task == "flow" else DepthError(median_scaling=batch == 1)
        labels = f"{self.task}_labels"
        model.eval()
        with torch.no_grad():
            for rows in DataLoader(data, batch_size=batch):
                found = getattr(motion.predict(model, rows), self.task)
                hidden = {"occluded": rows.get("occluded")} if self.task == "flow" else {}
                metric.add_batch(predictions=found, references=rows[labels], **hidden)
        return {name: round(float(value), 4) for name, value in metric.compute().items()}

    def assignments(self, model: nn.Module) -> dict[str, list[float]]:
        """By block: entropy of the prototypes' use, margin, cosines to the nearest and between them."""
        with torch.no_grad():
            motion.predict(model, self.dev.batch(list(range(8))))
        report = assignment_report(model)
        return {name: rounded(getattr(report, name)) for name in ("entropy", "margin", "nearest", "between")}


def search_rate(bench: Bench, results: Results, name: str, lrs: tuple[float, ...]) -> float:
    """The rate with the least error on the development pairs, with seed 0."""
    score = SCORE[bench.task]
    found = {lr: run_cell(bench, results, name, lr, 0, final=True)["dev"][score] for lr in lrs}
    return min(found, key=lambda lr: found[lr])


def summarise(bench: Bench, results: Results, name: str, lr: float, seeds: list[int]) -> None:
    cells = [run_cell(bench, results, name, lr, seed, final=True) for seed in seeds]
    score = SCORE[bench.task]
    clean = [cell["test"][score] for cell in cells]
    results.summaries[name] = {
        "lr": lr,
        "mean": round(statistics.mean(clean), 4),
        "sd": round(statistics.stdev(clean), 4) if len(clean) > 1 else None,
        "test": clean,
        "trainable": cells[0]["trainable"],
        **{f"noise {n}": round(statistics.mean(c[f"noise {n}"][score] for c in cells), 4) for n in (0, *NOISE)},
    }
    results.save()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--task", choices=list(CLASSES), default="flow")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--ablations", action="store_true", help="ProMotion without one part, instead of the methods")
    parser.add_argument(
        "--transfer", action="store_true", help="units with prototypes of the other task, instead of the methods"
    )
    parser.add_argument("--data", nargs="*", type=Path, default=[], help="folders of data sets to score on too")
    parser.add_argument("--small", action="store_true", help="few pairs, to see that it works")
    parser.add_argument("--results", type=Path)
    return parser.parse_args()


def make_bench(args: argparse.Namespace) -> tuple[Bench, Results]:
    sizes = dict.fromkeys(SIZES, 8) if args.small else SIZES
    train, test = motion_data.photos("train"), motion_data.photos("test")

    def bench_of(task: str, real: dict[str, Any]) -> Bench:
        splits = {"train": (train, 0), "dev": (train, 500), "test": (test, 1000)}
        pairs = {name: Pairs(task, photos, sizes[name], seed) for name, (photos, seed) in splits.items()}
        bench = Bench(task, **pairs, real=real, heads=assets.cache_dir() / "motion-heads", methods=methods)
        if args.small:
            bench.budget = bench.head_budget = Budget(epochs=1, batch_size=4, bf16=False)
            bench.heads = bench.heads / "small"
        return bench

    methods = METHODS | ABLATIONS | TRANSFER
    bench = bench_of(args.task, motion.real_sets(args))
    if args.transfer:
        bench.other = bench_of(OTHER[args.task], {})
    settings = {
        "task": f"{args.task} on generated pairs",
        "model": "DINOv2-S",
        "blocks": motion.blocks(args.task),
        "pairs": sizes,
        "heads": asdict(bench.head_budget) | {"lr": HEAD_RATE},
        "budget": asdict(bench.budget),
    }
    return bench, Results(args.results or FOLDER / f"learning_motion_{args.task}.json", settings)


def main(args: argparse.Namespace) -> None:
    search.prepare(args)
    bench, results = make_bench(args)
    chosen: dict[str, float] = {}
    for names, asked, source in ((ABLATIONS, args.ablations, "promotion"), (TRANSFER, args.transfer, OWN)):
        if asked:  # all at the rate of the unit as it is
            chosen |= dict.fromkeys(names, search_rate(bench, results, source, bench.methods[source].lrs))
    if not chosen:
        chosen = {name: search_rate(bench, results, name, METHODS[name].lrs) for name in args.methods}
    for seed_count in range(1, len(args.seeds) + 1):  # all with one seed before any with two
        for name, lr in chosen.items():
            summarise(bench, results, name, lr, args.seeds[:seed_count])
    for name, row in sorted(results.summaries.items(), key=lambda item: item[1]["mean"]):
        print(f"{name:48} {row['mean']:.4f} +- {row['sd']}")


if __name__ == "__main__":
    main(parse_args())
