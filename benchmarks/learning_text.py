# SPDX-License-Identifier: Apache-2.0
"""What each method learns on real text with a pretrained encoder, on one budget.

    python benchmarks/learning_text.py                          # Rotten Tomatoes by movie
    python benchmarks/learning_text.py --task mixture           # four tasks in one training set, 2 to 16 experts
    python benchmarks/learning_text.py --methods lora head      # some methods only
    python benchmarks/learning_text.py --task mixture --pathways mept-centered    # draws each task's way
    python benchmarks/learning_text.py --sizes                  # every method in several sizes
    python benchmarks/learning_text.py --sizes --epochs 10 --two-rates    # the same on a longer budget
    python benchmarks/learning_text.py --sizes --epochs 10 --device cuda --workers 12    # all rates, on a GPU

Every method gets the same texts, epochs, batches and number of learning rates. The rate is chosen on the development
split with seed 0; the test split is scored at that rate only, with seeds 1 to 3. Classifiers read the mean over the
tokens, as the packaged encoder was trained to be read. The head trains at one fixed rate in every method. Finished
cells are kept in the JSON file and not run again, and any method may be added later.
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
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_promptmoe import MEPTConfig, record_routing

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "advanced"))

import assets
from harness import search, text_tasks
from harness.methods import config
from harness.reading import FOLDER
from harness.reading import results as read_results
from harness.records import rounded
from harness.rows import Row
from harness.search import (
    HEADINGS,
    admitted,
    line,
    ranking,
    run_cells_beside,
    run_method,
    time_steps,
    training_step,
    two_rates,
)
from harness.shapes import SHAPES
from harness.training import Budget, Results, predict, prediction_order, train, train_cell
from pooling import pool_by_mean

SIZES = {
    "sentiment": {"train": 2000, "dev": 800, "test": 2000},
    "mixture": {"train": 2000, "dev": 800, "test": 2000},
}


def head_only(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


def peft(row: Row) -> Callable[[nn.Module], nn.Module]:
    """A method of PEFT's own; MiniLM is a BERT."""
    return lambda model: get_peft_model(model, config(SHAPES["bert-base"], row))


def lora(rank: int, targets: str | None = None) -> Callable[[nn.Module], nn.Module]:
    """LoRA of a rank; without `targets` on queries, keys, values and outputs of attention."""
    made = LoraConfig(
        task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=targets or SHAPES["bert-base"].attention
    )
    return lambda model: get_peft_model(model, copy.deepcopy(made))


def mept(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: get_peft_model(model, MEPTConfig(task_type="SEQ_CLS", **options))


@dataclass(frozen=True)
class Method:
    build: Callable[[nn.Module], nn.Module]
    lrs: tuple[float, ...]
    routed: bool = False


# Three rates each, a factor of about three apart, around what trial runs suggest. MEPT's tensors are stored scaled (by
# `prompt_scale`), which under Adam multiplies their rate: its grid is LoRA's, and stands for rates like the prompts'.
MATRICES = (3e-4, 1e-3, 3e-3)
PROMPTS = (1e-2, 3e-2, 1e-1)
METHODS = {
    "head": Method(head_only, (3e-3, 1e-2, 3e-2)),
    "lora": Method(peft(Row("lora_r8")), MATRICES),
    "prompt": Method(peft(Row("prompt_tuning", 20)), PROMPTS),
    "prefix": Method(peft(Row("prefix_tuning", 20)), (3e-3, 1e-2, 3e-2)),
    "static": Method(mept(num_experts=1, num_shared_experts=0), MATRICES),
    "mept-sample": Method(mept(routing="sample"), MATRICES, routed=True),
    "mept-centered": Method(mept(routing="sample", router_centering=True), MATRICES, routed=True),
    "mept-token": Method(mept(routing="token"), MATRICES, routed=True),
}
# What more experts are worth. A static prompt of equal active length is "static" above; this one is as long as all the
# experts of MEPT together, the shared one included.
SIZES_OF_MEPT = {
    "static-50": Method(mept(num_experts=1, num_shared_experts=0, num_virtual_tokens=50), MATRICES),
    **{f"mept-sample-{e}": Method(mept(routing="sample", num_experts=e), MATRICES, routed=True) for e in (2, 8, 16)},
    "mept-centered-16": Method(mept(routing="sample", router_centering=True, num_experts=16), MATRICES, routed=True),
    "mept-token-16": Method(mept(routing="token", num_experts=16), MATRICES, routed=True),
}
# Accuracy against trained parameters. LoRA of rank 1 on queries and values is as small as ten static prompts.
CURVES = {
    "lora-r1-qv": Method(lora(1, r".*attention\.self\.(query|value)"), MATRICES),
    **{f"lora-r{rank}": Method(lora(rank), MATRICES) for rank in (1, 2, 4, 16)},
    **{
        f"static-{slots}": Method(mept(num_experts=1, num_shared_experts=0, num_virtual_tokens=slots), MATRICES)
        for slots in (5, 20, 100)
    },
    **{
        f"mept-{routing}-{slots}x4": Method(mept(routing=routing, num_virtual_tokens=slots), MATRICES, routed=True)
        for routing in ("sample", "token")
        for slots in (2, 5, 20)
    },
}
IN_SIZES = ["head", "lora", "prompt", "prefix", "static", "mept-sample", "mept-centered", "mept-token"]
DEFAULTS = {"sentiment": list(METHODS), "mixture": [*METHODS, *SIZES_OF_MEPT]}
METHODS |= SIZES_OF_MEPT | CURVES


@dataclass(frozen=True)
class Bench:
    """All that a cell needs: the base model's folder, the tokenised data and the budget."""

    model: str
    data: text_tasks.Data
    budget: Budget
    device: str = "cpu"
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)  # where not all are tried

    def lrs(self, name: str) -> tuple[float, ...]:
        return self.rates.get(name, METHODS[name].lrs)

    def run(self, name: str, lr: float, seed: int, final: bool) -> dict[str, Any]:
        """One cell: train `name` at `lr` with `seed`; score the development split, or the test split if `final`."""
        torch.manual_seed(seed)
        model, data = self.ready(name)
        cell = train_cell(model, data, lr, seed, self.budget, f"{name} lr={lr:g} seed={seed}")
        return cell | self._scores(model, self.data.splits["test" if final else "dev"], METHODS[name].routed)

    def draw_pathways(self, name: str, lr: float, seed: int, path: Path) -> float:
        """Train a routed method as its cell of the test split, and draw each task's way through the experts.

        Returns:
            Accuracy, which should be that of the cell.
        """
        torch.manual_seed(seed)
        model, data = self.ready(name)
        train(model, data, lr, seed, self.budget, f"{name} lr={lr:g} seed={seed}")
        split = self.data.splits["test"]
        tasks = [self.data.tasks[task] for task in split.tasks[prediction_order(split)]]
        with record_routing(model, labels=tasks) as record:
            predicted = predict(model, split, self.budget)
        record.plot_pathways(path)
        return float(self._accuracies(predicted, split)["accuracy"])

    def ready(self, name: str) -> tuple[nn.Module, text_tasks.Texts]:
        # Eager attention: the fused bf16 backward pass on CPU takes as long as the whole rest of the step.
        base = AutoModelForSequenceClassification.from_pretrained(
            self.model, num_labels=2, attn_implementation="eager"
        )
        return METHODS[name].build(pool_by_mean(base)).to(self.device), self.data.splits["train"]

    def _scores(self, model: nn.Module, split: text_tasks.Texts, routed: bool) -> dict[str, Any]:
        """Accuracy, by task where there are several; for a routed method also what its routers did, layer by layer.

        `load_entropy` is the entropy of the experts' shares: 1 is an even load, 0 one expert that takes all.
        `task_expert_bits` is the mutual information of task and chosen expert; of one task alone, `class_expert_bits`
        is that of class and chosen expert.
        """
        if not routed:
            return self._accuracies(predict(model, split, self.budget), split)
        several = len(self.data.tasks) > 1
        groups = split.tasks if several else split.labels
        with record_routing(model, labels=groups[prediction_order(split)]) as record:
            scores = self._accuracies(predict(model, split, self.budget), split)
        scores["load_entropy"] = rounded(record.report().entropy)
        scores["task_expert_bits" if several else "class_expert_bits"] = rounded(record.mutual_information())
        return scores

    def _accuracies(self, predicted: Tensor, split: text_tasks.Texts) -> dict[str, Any]:
        right = (predicted == split.labels).double()
        scores: dict[str, Any] = {"accuracy": round(right.mean().item(), 5)}
        if len(self.data.tasks) > 1:
            hits = {task: right[split.tasks == i].mean().item() for i, task in enumerate(self.data.tasks)}
            scores["by_task"] = {task: round(share, 5) for task, share in hits.items()}
        return scores

    def details(self, cells: list[dict[str, Any]]) -> dict[str, Any]:
        """Means over the cells of what routers did and of the accuracy by task."""
        row: dict[str, Any] = {}
        for measure in ("load_entropy", "task_expert_bits", "class_expert_bits"):
            if measure in cells[0]:
                row[measure] = rounded(torch.tensor([cell[measure] for cell in cells]).mean(0))
        if "by_task" in cells[0]:
            tasks = cells[0]["by_task"]
            row["by_task"] = {task: round(statistics.mean(c["by_task"][task] for c in cells), 4) for task in tasks}
        return row


def in_sizes(epochs: int) -> list[str]:
    """What `--sizes` runs: on the usual budget without the methods that the results without `--sizes` have."""
    return [*(IN_SIZES if epochs != Budget.epochs else []), "static-50", *CURVES]


def usual_results(task: str) -> dict[str, Any]:
    """Summaries of the usual budget, in all sizes."""
    if task == "mixture":
        return read_results("learning_text_mixture")
    files = ("learning_text", f"learning_text_sizes_{Budget.epochs}_epochs")
    return {"summary": {name: row for file in files for name, row in read_results(file).get("summary", {}).items()}}


def print_table(results: Results) -> None:
    print(f"\n{HEADINGS}  load entropy by layer")
    for name, row in ranking(results):
        print(f"{line(name, row)}  " + " ".join(f"{x:.2f}" for x in row.get("load_entropy", [])))
        if "task_expert_bits" in row:
            print(f"{'':14} bits of the task in the expert: {row['task_expert_bits']}")


def parse_args() -> argparse.Namespace:
    parser = search.parser(__doc__)
    parser.add_argument("--task", choices=sorted(SIZES), default="sentiment")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: all that are for the task")
    parser.add_argument("--model", help="local folder or Hub id of an encoder (default: packaged MiniLM)")
    parser.add_argument(
        "--results", type=Path, help="JSON file (default: benchmarks/results/learning_text[_TASK].json)"
    )
    parser.add_argument("--sizes", action="store_true", help="every method in several sizes")
    parser.add_argument("--epochs", type=int, default=Budget.epochs)
    parser.add_argument("--two-rates", action="store_true", help="only the usual budget's rate and the next smaller")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="cells that are made side by side")
    parser.add_argument(
        "--pathways",
        choices=[name for name, method in METHODS.items() if method.routed],
        help="only draw one routed method's pathways, of the first seed, beside the results",
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    search.prepare(args)
    folder, budget, max_length = args.model or assets.minilm(), Budget(epochs=args.epochs), 64
    tokenizer = AutoTokenizer.from_pretrained(folder)
    make = {"sentiment": text_tasks.sentiment, "mixture": text_tasks.mixture}[args.task]
    data = make(tokenizer, SIZES[args.task], max_length)
    methods = args.methods or (in_sizes(args.epochs) if args.sizes else DEFAULTS[args.task])
    usual = usual_results(args.task)
    rates = {name: two_rates(METHODS[name].lrs, usual, name) for name in methods} if args.two_rates else {}
    bench = Bench(folder, data, budget, args.device, rates)
    settings = {
        "task": args.task,
        "model": args.model or "all-MiniLM-L6-v2",
        "texts": SIZES[args.task],
        "max_length": max_length,
        "budget": asdict(budget),
    }
    suffix = "" if args.task == "sentiment" else f"_{args.task}"
    suffix += f"_sizes_{args.epochs}_epochs" if args.sizes else ""
    results = Results(args.results or FOLDER / f"learning_text{suffix}.json", settings)
    if args.times:
        time_steps(bench, results, methods)
        return
    if args.pathways:
        row, path = results.summaries[args.pathways], results.path.with_name(f"{results.path.stem}_pathways.png")
        accuracy = bench.draw_pathways(args.pathways, row["lr"], args.seeds[0], path)
        print(f"{path}: of a model with accuracy {accuracy:.4f}; the results have {row['test']}")
        return
    methods = [name for name in methods if admitted(results, name, lambda name=name: training_step(bench, name)())]
    if args.workers > 1:
        run_cells_beside(bench, results, methods, args.seeds, args.workers)
    for name in methods:
        run_method(bench, results, name, args.seeds)
    print_table(results)


if __name__ == "__main__":
    main(parse_args())
