# SPDX-License-Identifier: Apache-2.0
"""How a method is scored: its learning rate is searched on the development split, then tested with several seeds.

Besides: what the command lines and the tables of all learning benchmarks have in common.
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from typing import Any, Protocol

import torch
import transformers
from torch import nn

from .refusals import refusal
from .timing import Device, Run, interleaved, step
from .training import Budget, Results, Split, device_of


class Bench(Protocol):
    """What a benchmark has to offer to be searched."""

    budget: Budget

    def lrs(self, name: str) -> tuple[float, ...]:
        """Learning rates to try."""

    def run(self, name: str, lr: float, seed: int, final: bool) -> dict[str, Any]:
        """One cell: train `name` at `lr` with `seed`; score the development split, or the test split if `final`.

        Returns:
            `accuracy`, `trainable` and `train_seconds` at least.
        """

    def details(self, cells: list[dict[str, Any]]) -> dict[str, Any]:
        """What the method's summary says besides, from its final cells."""

    def ready(self, name: str) -> tuple[nn.Module, Split]:
        """A model as `run` would train it, and what it is trained on."""


def run_method(bench: Bench, results: Results, name: str, seeds: list[int]) -> None:
    """Search the learning rate on the development split, then score the chosen one on the test split.

    Where there is one rate, nothing is searched.
    """
    lrs = bench.lrs(name)
    searched = lrs if len(lrs) > 1 else ()
    dev = {lr: run_cell(bench, results, name, lr, 0, final=False)["accuracy"] for lr in searched}
    chosen = max(lrs, key=lambda lr: dev.get(lr, 0.0))
    cells = [run_cell(bench, results, name, chosen, seed, final=True) for seed in seeds]
    results.summaries[name] = {
        "dev_by_lr": {f"{lr:g}": accuracy for lr, accuracy in dev.items()},
        "lr": chosen,
        **spread(cells),
        "trainable": cells[0]["trainable"],
        "train_seconds": min(cell["train_seconds"] for cell in cells),
        **bench.details(cells),
    }
    results.save()


# A cell that one of several processes is to make: method, learning rate, seed, whether of the test split.
Job = tuple[str, float, int, bool]


def run_cells_beside(bench: Bench, results: Results, names: list[str], seeds: list[int], workers: int) -> None:
    """Make all cells that `run_method` will ask for in several processes, which pays on a GPU and many cores."""

    def make(jobs: list[Job]) -> None:
        missing = [job for job in jobs if cell_key(*job) not in results.cells]
        for job, cell in pool.imap_unordered(_made, missing):
            results.cell(cell_key(*job), lambda cell=cell: cell)

    with multiprocessing.get_context("spawn").Pool(workers, _begin, (bench,)) as pool:
        make([(name, lr, 0, False) for name in names for lr in bench.lrs(name)])
        best: dict[str, float] = {}
        for name in names:
            dev = {lr: results.cells[cell_key(name, lr, 0, False)]["accuracy"] for lr in bench.lrs(name)}
            best[name] = max(dev, key=lambda lr: dev[lr])
        make([(name, best[name], seed, True) for name in names for seed in seeds])


_bench: Bench | None = None  # of a worker process


def _begin(bench: Bench) -> None:
    global _bench  # noqa: PLW0603  set once, as a process begins
    _bench = bench
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def _made(job: Job) -> tuple[Job, dict[str, Any]]:
    name, lr, seed, final = job
    assert _bench is not None
    of = {"method": name, "lr": lr, "seed": seed, "split": "test" if final else "dev"}
    return job, of | _bench.run(name, lr, seed, final)


def two_rates(lrs: tuple[float, ...], usual: dict[str, Any], name: str) -> tuple[float, ...]:
    """For a long budget: the rate that `usual`, the results of the usual budget, chose, and the next smaller one.

    More steps rarely want a larger rate. Where the smallest was chosen, the second is the next larger.
    """
    if name not in usual.get("summary", {}):
        raise SystemExit(f"Run `{name}` on the usual budget first, which chooses its rate.")
    chosen = lrs.index(usual["summary"][name]["lr"])
    return lrs[max(0, chosen - 1) :][:2]


def admitted(results: Results, name: str, work: Callable[[], object]) -> bool:
    """Whether the libraries that are there can run a method: if not, their reason is kept with the results.

    A method that has results is not tried: other libraries could run it.
    """
    if name in results.summaries:
        return True
    results.data.get("refused", {}).pop(name, None)  # that was by other libraries, perhaps
    reason = refusal(name, work)
    if reason:
        results.data.setdefault("refused", {})[name] = reason
        print(f"{name} is not run: {reason}")
    results.save()
    return reason is None


def run_cell(
    bench: Bench, results: Results, name: str, lr: float, seed: int, final: bool, **options: float
) -> dict[str, Any]:
    """A cell with what it is of; `options` are what `bench.run` takes besides, and part of the cell's key."""
    key = " ".join([cell_key(name, lr, seed, final), *(f"{option}={value:g}" for option, value in options.items())])
    of = {"method": name, "lr": lr, "seed": seed, "split": "test" if final else "dev"}
    return results.cell(key, lambda: of | bench.run(name, lr, seed, final, **options))


def cell_key(name: str, lr: float, seed: int, final: bool) -> str:
    return f"{name} lr={lr:g} seed={seed} {'test' if final else 'dev'}"


def time_steps(bench: Bench, results: Results, names: list[str], turns: int = 5) -> None:
    """Least seconds of a training step of each method, the methods taking turns; kept with the results.

    The seconds of whole cells say little: cells are run on different days and beside other work. A method that the
    libraries that are there refuse loses the time of an earlier run, which would not be one of the same turns.
    """
    runs: dict[str, Run] = {}
    for name in names:
        torch.manual_seed(0)
        run = training_step(bench, name)
        if reason := refusal(name, run):
            print(f"{name} is not timed: {reason}")
            results.data.get("step_seconds", {}).pop(name, None)
        else:
            runs[name] = run
    times = interleaved(runs, turns, 1, "training steps in turn")
    results.data.setdefault("step_seconds", {}).update({name: row["step"]["min_s"] for name, row in times.items()})
    results.save()


def training_step(bench: Bench, name: str) -> Run:
    """A training step of a method, on a batch of samples of middle length."""
    (model, data), budget = bench.ready(name), bench.budget
    middle = len(data) // 2 - budget.batch_size // 2
    chosen = sorted(range(len(data)), key=data.length)[middle : middle + budget.batch_size]
    device = device_of(model)
    batch = {name: value.to(device) for name, value in data.batch(chosen).items()}
    return step(model, batch, Device(device.type, bf16=budget.bf16))


def spread(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies of cells that differ in their seed, with mean and standard deviation."""
    scores = [cell["accuracy"] for cell in cells]
    return {
        "test": scores,
        "mean": round(statistics.mean(scores), 4),
        "sd": round(statistics.stdev(scores), 4) if len(scores) > 1 else None,
    }


def ranking(results: Results) -> list[tuple[str, dict[str, Any]]]:
    """Summaries, the best mean first."""
    return sorted(results.summaries.items(), key=lambda item: -item[1]["mean"])


HEADINGS = f"{'method':14} {'test mean':>9} {'sd':>7} {'lr':>7} {'trainable':>11} {'seconds':>8}"


def line(name: str, row: dict[str, Any]) -> str:
    """A method's summary under `HEADINGS`."""
    deviation = "-" if row["sd"] is None else f"{row['sd']:.4f}"
    numbers = f"{row['mean']:9.4f} {deviation:>7} {row['lr']:7g} {row['trainable']:11,} {row['train_seconds']:8.0f}"
    return f"{name:14} {numbers}"


def parser(description: str | None) -> argparse.ArgumentParser:
    """A learning benchmark's parser, with what all of them can be asked for."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds scored on the test split")
    made.add_argument("--times", action="store_true", help="only time a training step of each method, in turns")
    made.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    return made


def prepare(args: argparse.Namespace) -> None:
    """What comes before all else: threads, and no word from transformers of the new head that every cell makes."""
    transformers.logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
