# SPDX-License-Identifier: Apache-2.0
"""What each method teaches a frozen DINOv2-S about motion or depth, on pairs with exact labels.

    python benchmarks/learning_motion.py                       # optical flow
    python benchmarks/learning_motion.py --task depth
    python benchmarks/learning_motion.py --ablations           # parts of ProMotion left out, one at a time
    python benchmarks/learning_motion.py --data /data/MPI-Sintel    # scored on these too

Pairs are those of `examples/moving_layers.py`, shown at 224 pixels. A seed's heads are trained on the frozen backbone
first; every method starts from these heads and trains on with them, on the same pairs, in the same order, for as many
steps. A rate is chosen with seed 0, on development pairs made of training photos; scores are of pairs of other photos,
of the same pairs under image noise, and of real ones. Blocks behind the last one that is read are left out. A cell
takes three to four minutes on one core.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import assets
import motion
import motion_data
from harness import search
from harness.bottleneck import add_bottlenecks
from harness.reading import FOLDER
from harness.records import rounded
from harness.search import run_cell
from harness.training import Budget, Results, train_cell
from moving_layers import IMAGENET, GeneratedPairs
from peft_promptmoe import DepthModel, FlowModel, ProMotionConfig, VAPTConfig, assignment_report
from peft_promptmoe.motion import DepthError, EndPointError

SIZES = {"train": 320, "dev": 48, "test": 80}
NOISE = (5, 10, 25)  # spread of image noise, of a range of 255
NOISY = 24  # test pairs that are scored with it
HEAD_BUDGET = Budget(epochs=6, batch_size=4, bf16=False)
BUDGET = Budget(epochs=2, batch_size=4, head_lr=1e-3, bf16=False)
HEAD_RATE = 3e-3
CLASSES: dict[str, Any] = {"flow": FlowModel, "depth": DepthModel}
COLUMNS = {"flow": ("pixel_values", "next_pixel_values", "flow_labels"), "depth": ("pixel_values", "depth_labels")}
SCORE = {"flow": "epe", "depth": "abs_rel"}


@dataclass(frozen=True)
class Method:
    """How to make a model of one with heads, and the rates to try."""

    attach: Callable[[nn.Module, list[int]], nn.Module]
    lrs: tuple[float, ...] = (1e-3, 3e-3)
    frozen: bool = True


def lora(model: Any, blocks: list[int]) -> nn.Module:
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(target_modules=names, layers_to_transform=blocks, modules_to_save=model.head_names)
    return get_peft_model(model, config)


def prompts(**settings: Any) -> Callable[[Any, list[int]], nn.Module]:
    def attach(model: Any, blocks: list[int]) -> nn.Module:
        size = [motion.SHOWN, motion.SHOWN]
        return get_peft_model(model, VAPTConfig(image_size=size, modules_to_save=model.head_names, **settings))

    return attach


def promotion(**settings: Any) -> Callable[[Any, list[int]], nn.Module]:
    return lambda model, blocks: get_peft_model(model, ProMotionConfig(modules_to_save=model.head_names, **settings))


METHODS = {
    "head": Method(lambda model, blocks: model, (1e-3,)),
    "bottleneck": Method(add_bottlenecks),
    "promotion": Method(promotion()),
    "lora": Method(lora),
    "lora-all": Method(lambda model, blocks: lora(model, list(range(blocks[-1] + 1)))),
    "vapt": Method(prompts(), (3e-3, 1e-2)),
    "vpt-deep": Method(prompts(num_static_layers="all"), (3e-3, 1e-2)),
    "full": Method(lambda model, blocks: model, (1e-5, 1e-4), frozen=False),
}
# At ProMotion's own rate.
ABLATIONS = {
    "no denoiser": {"denoise_steps": 0},
    "no denoiser loss": {"denoise_weight": 0.0},
    "no feedback": {"feedback": False},
    "no margin loss": {"margin_weight": 0.0},
    "softmax": {"balance": 0.0},
    "not centred": {"center": False},
    "pool": {"proposal": "pool"},
    "8 prototypes": {"num_prototypes": 8},
    "64 prototypes": {"num_prototypes": 64},
}


class Pairs:
    """Pairs of one task, made once and kept."""

    def __init__(self, task: str, photos: Any, count: int, seed: int) -> None:
        made = GeneratedPairs(photos, count, seed)
        names = {
            "flow": ("pixel_values", "next_pixel_values", "flow_labels"),
            "depth": ("pixel_values", "depth_labels"),
        }
        rows = [made[index] for index in range(count)]
        self.columns = {name: torch.stack([row[name] for row in rows]) for name in names[task]}
        self.occluded = torch.stack([row["occluded"] for row in rows])
        self.labels = torch.zeros(count)

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        return 1

    def batch(self, chosen: list[int]) -> dict[str, Tensor]:
        return {name: values[chosen] for name, values in self.columns.items()}

    def noisy(self, spread: float, count: int) -> Dataset[dict[str, Tensor]]:
        """The first pairs with Gaussian noise on their frames, of a range of 255."""
        generator = torch.Generator().manual_seed(0)
        noise = spread / 255 / torch.tensor(IMAGENET[1])[:, None, None]

        def worn(name: str, values: Tensor) -> Tensor:
            values = values[:count]
            frames = name.endswith("pixel_values") and spread > 0
            return values + noise * torch.randn(values.shape, generator=generator) if frames else values

        columns = {name: worn(name, values) for name, values in self.columns.items()}
        columns["occluded"] = self.occluded[:count]
        return [{name: values[i] for name, values in columns.items()} for i in range(min(count, len(self)))]  # type: ignore[return-value]


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
    backbone: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        depth = motion.blocks(self.task)[-1] + 1
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
            train_cell(model, self.train, HEAD_RATE, seed, self.head_budget, f"heads seed={seed}")
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({n: p for n, p in model.state_dict().items() if n.startswith(tuple(model.head_names))}, file)
        found: dict[str, Tensor] = torch.load(file, weights_only=True)
        return found

    def run(self, name: str, lr: float, seed: int, final: bool) -> dict[str, Any]:
        """One cell: train `name` at `lr` from the heads of `seed`, and score it on all that there is."""
        method, heads = self.methods[name], self.trained_heads(seed)
        base = self.base(seed, method.frozen)
        base.load_state_dict(heads, strict=False)
        model = method.attach(base, motion.blocks(self.task))
        cell = train_cell(model, self.train, lr, seed, self.budget, f"{name} lr={lr:g} seed={seed}")
        cell["dev"] = self.score(model, self.dev.noisy(0, len(self.dev)))
        cell["test"] = self.score(model, self.test.noisy(0, len(self.test)))
        cell |= {f"noise {spread}": self.score(model, self.test.noisy(spread, NOISY)) for spread in (0, *NOISE)}
        cell["real"] = {of: self.score(model, data, batch=1) for of, data in self.real.items()}
        if name.startswith("promotion"):
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
    parser.add_argument("--data", nargs="*", type=Path, default=[], help="folders of data sets to score on too")
    parser.add_argument("--small", action="store_true", help="few pairs, to see that it works")
    parser.add_argument("--results", type=Path)
    return parser.parse_args()


def make_bench(args: argparse.Namespace) -> tuple[Bench, Results]:
    sizes = dict.fromkeys(SIZES, 8) if args.small else SIZES
    train, test = motion_data.photos("train"), motion_data.photos("test")
    splits = {"train": (train, 0), "dev": (train, 500), "test": (test, 1000)}
    pairs = {name: Pairs(args.task, photos, sizes[name], seed) for name, (photos, seed) in splits.items()}
    methods = METHODS | {f"promotion, {name}": Method(promotion(**settings)) for name, settings in ABLATIONS.items()}
    bench = Bench(
        args.task, **pairs, real=motion.real_sets(args), heads=assets.cache_dir() / "motion-heads", methods=methods
    )
    if args.small:
        bench.budget = bench.head_budget = Budget(epochs=1, batch_size=4, bf16=False)
        bench.heads = bench.heads / "small"
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
    if args.ablations:
        lr = search_rate(bench, results, "promotion", METHODS["promotion"].lrs)
        for seed_count in range(1, len(args.seeds) + 1):  # all with one seed before any with two
            for name in ABLATIONS:
                summarise(bench, results, f"promotion, {name}", lr, args.seeds[:seed_count])
        return
    chosen = {name: search_rate(bench, results, name, METHODS[name].lrs) for name in args.methods}
    for seed_count in range(1, len(args.seeds) + 1):
        for name, lr in chosen.items():
            summarise(bench, results, name, lr, args.seeds[:seed_count])
    for name, row in sorted(results.summaries.items(), key=lambda item: item[1]["mean"]):
        print(f"{name:28} {row['mean']:.4f} +- {row['sd']}")


if __name__ == "__main__":
    main(parse_args())
