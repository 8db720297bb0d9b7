# SPDX-License-Identifier: Apache-2.0
"""What each method teaches a chat model when six tasks ask it for different things.

    python benchmarks/learning_mixture.py                          # all tasks in one training set
    python benchmarks/learning_mixture.py --sequence               # one task after the other: what is forgotten
    python benchmarks/learning_mixture.py --methods lora static    # some methods only

SmolLM2-135M-Instruct forms questions, negates, writes past tenses and plurals, sorts words and judges reviews
(`harness/instructions.py`); a greedy answer counts if it is exactly right. Methods, rates and the way a rate is chosen
are those of `learning_causal.py`, besides centred routers and MEPT with a single expert. With `--sequence` every task
is trained by itself, in the order of the list, with its share of texts and a schedule of its own, at the rate that was
chosen for all tasks together; the score is the mean over all tasks after the last one, and what is forgotten is what a
task's own score loses from its own training to the end. Finished cells are kept in the JSON file.
"""

import argparse
import statistics
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peft_promptmoe import record_routing

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "advanced"))

import assets
import learning_causal
from harness import search
from harness.instructions import TASKS, Instructed, answered_exactly, splits
from harness.reading import FOLDER, results
from harness.records import rounded
from harness.rows import Row
from harness.search import HEADINGS, admitted, line, ranking, run_method, time_steps, training_step
from harness.training import Budget, Results, Stopwatch, device_of, prediction_order, train, train_cell

SIZES = {"train": 240, "dev": 120, "test": 300}
# `initialize_kv_prefix_from_text` starts prefix tuning on one text, which six tasks do not share.
METHODS = {name: method for name, method in learning_causal.METHODS.items() if name != "prefix"}
METHODS["mept-centered"] = replace(METHODS["mept-sample"], settings={"router_centering": True})
# MEPT by sample with nothing to choose from: each prompt is the sum of the one expert's and of the shared one's.
METHODS["static-shared"] = replace(METHODS["mept-sample"], row=Row("mept_sample", 10, 1))


@dataclass(frozen=True)
class Bench:
    """All that a cell needs: the base model's folder, the texts by split, the budget."""

    folder: str
    texts: dict[str, Instructed]
    budget: Budget
    sequence: bool = False

    def lrs(self, name: str) -> tuple[float, ...]:
        """Rates to try; one after the other the one that was best for all tasks together."""
        if not self.sequence:
            return METHODS[name].lrs
        together = results("learning_mixture").get("summary", {})
        if name not in together:
            raise SystemExit(f"The rate of {name!r} is not known: run it without --sequence first.")
        return (together[name]["lr"],)

    def run(self, name: str, lr: float, seed: int, final: bool) -> dict[str, Any]:
        """One cell: train `name` at `lr` with `seed`; score the development split, or the test split if `final`."""
        torch.manual_seed(seed)
        model, data = self.ready(name)
        split, label = self.texts["test" if final else "dev"], f"{name} lr={lr:g} seed={seed}"
        if self.sequence:
            cell = self._train_one_by_one(model, data, split, lr, seed, label)
        else:
            cell = train_cell(model, data, lr, seed, self.budget, label)
        with Stopwatch() as scoring:
            scores = self.scores(model, split, name.startswith("mept"))
        if self.sequence:
            # The last task is not followed by anything that could make it forgotten.
            lost = statistics.mean(cell["first"][task] - scores["by_task"][task] for task in TASKS[:-1])
            scores["forgotten"] = round(lost, 5)
        return cell | scores | {"score_seconds": round(scoring.seconds, 1)}

    def _train_one_by_one(
        self, model: nn.Module, data: Instructed, split: Instructed, lr: float, seed: int, label: str
    ) -> dict[str, Any]:
        """What a cell keeps of the training; `first` is each task's own score right after it was trained."""
        first: dict[str, float] = {}
        with Stopwatch() as watch:
            for task in TASKS:
                train(model, data.of(task), lr, seed, self.budget, f"{label} {task}")
                first[task] = round(self.exact(model, split.of(task)).double().mean().item(), 5)
        return {
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "train_seconds": round(watch.seconds, 1),
            "first": first,
        }

    def ready(self, name: str) -> tuple[PeftModel, Instructed]:
        return get_peft_model(self.base(), learning_causal.adapter(METHODS[name])), self.texts["train"]

    def base(self) -> nn.Module:
        # Eager attention: the fused bf16 backward pass on CPU takes longer than that of plain products.
        return AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation="eager")

    def scores(self, model: nn.Module, split: Instructed, routed: bool) -> dict[str, Any]:
        """Exact match over all texts and by task; of a routed method what its routers did, layer by layer."""
        names = [TASKS[i] for i in split.tasks[prediction_order(split)].tolist()]
        with record_routing(model, labels=names) if routed else nullcontext() as record:
            right = self.exact(model, split).double()
        hits = {task: round(right[split.tasks == i].mean().item(), 5) for i, task in enumerate(TASKS)}
        found: dict[str, Any] = {"accuracy": round(right.mean().item(), 5), "by_task": hits}
        if record is not None:
            found |= {
                "load_entropy": rounded(record.report().entropy),
                "task_expert_bits": rounded(record.mutual_information()),
            }
        return found

    @torch.no_grad()
    def exact(self, model: nn.Module, split: Instructed) -> Tensor:
        """(N,) which answers are right, in the order of `prediction_order` while predicting; put back in place."""
        model.eval()
        device, order = device_of(model), prediction_order(split)
        right = torch.empty(len(split), dtype=torch.bool)
        for start in range(0, len(order), 16):
            chosen = order[start : start + 16]
            batch = {key: value.to(device) for key, value in split.batch(chosen).items()}
            with self.budget.autocast(device):
                logits = model(**batch).logits  # labels tell sample routing where the question ends
            right[chosen] = answered_exactly(logits, batch["labels"]).cpu()
        return right

    def details(self, cells: list[dict[str, Any]]) -> dict[str, Any]:
        """Means over the cells of what routers did, of scores by task, and of what was forgotten."""
        row: dict[str, Any] = {}
        for measure in ("load_entropy", "task_expert_bits"):
            if measure in cells[0]:
                row[measure] = rounded(torch.tensor([cell[measure] for cell in cells]).mean(0))
        row["by_task"] = {task: round(statistics.mean(cell["by_task"][task] for cell in cells), 4) for task in TASKS}
        if self.sequence:
            row["forgotten"] = round(statistics.mean(cell["forgotten"] for cell in cells), 4)
        return row


def parse_args(given: list[str] | None = None) -> argparse.Namespace:
    parser = search.parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--model", help="local folder or Hub id of a chat model (default: packaged SmolLM2-135M)")
    parser.add_argument("--sequence", action="store_true", help="one task after the other")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"texts of the {name} split, all tasks together")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--results", type=Path, help="JSON file (default: results/learning_mixture[_sequence].json)")
    return parser.parse_args(given)


def main(args: argparse.Namespace) -> None:
    search.prepare(args)
    folder, sizes = args.model or assets.smollm2(), {name: getattr(args, name) for name in SIZES}
    budget = Budget(epochs=args.epochs, batch_size=args.batch_size)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    bench = Bench(folder, splits(tokenizer, sizes), budget, args.sequence)
    settings = {
        "task": "six instructions, one after the other" if args.sequence else "six instructions",
        "model": args.model or "SmolLM2-135M-Instruct",
        "texts": sizes,
        "budget": asdict(budget),
    }
    found = Results(args.results or FOLDER / f"learning_mixture{'_sequence' * args.sequence}.json", settings)
    if "untrained" not in found.data:
        found.data["untrained"] = bench.scores(bench.base(), bench.texts["test"], routed=False)
        found.save()
    if args.times:
        time_steps(bench, found, args.methods)
        return
    for name in args.methods:
        if admitted(found, name, lambda name=name: training_step(bench, name)()):
            run_method(bench, found, name, args.seeds)
    print(f"\n{HEADINGS}  by task: {', '.join(TASKS)}")
    for name, row in ranking(found):
        print(f"{line(name, row)}  " + " ".join(f"{row['by_task'][task]:.2f}" for task in TASKS))
    print(f"untrained: {found.data['untrained']['accuracy']:.4f}")


if __name__ == "__main__":
    main(parse_args())
