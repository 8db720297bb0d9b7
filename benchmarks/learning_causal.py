# SPDX-License-Identifier: Apache-2.0
"""What each method teaches a pretrained causal language model on a real task, scored by what it generates.

    python benchmarks/learning_causal.py
    python benchmarks/learning_causal.py --methods lora mept-token    # some methods only

The task, its prompt and its score are those of `examples/advanced/causal_lm.py`: SmolLM2-135M-Instruct is asked
whether a sentence of a review is positive or negative, and a greedy answer counts if it is exactly that word. Texts
are split by movie. Every method gets the same texts, epochs, batches and number of learning rates; the rate is chosen
on the development split with seed 0, and the test split is scored at that rate only, with seeds 1 to 3. Finished cells
are kept in the JSON file and not run again. A cell takes two to three minutes on one core.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftConfig, PeftModel, get_peft_model, initialize_kv_prefix_from_text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from peft_promptmoe import record_routing

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "advanced"))

import assets
import causal_lm
from harness import search
from harness.methods import config
from harness.reading import FOLDER
from harness.records import rounded
from harness.rows import Row
from harness.search import HEADINGS, admitted, line, ranking, run_method, time_steps
from harness.shapes import SHAPES
from harness.training import Budget, Results, Stopwatch, device_of, train_cell

SIZES = {"train": 256, "dev": 128, "test": 320}


@dataclass(frozen=True)
class Method:
    row: Row
    lrs: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)  # further fields of its config


# Rates a factor of about three apart. MEPT's tensors are stored scaled (by `prompt_scale`), which under Adam
# multiplies their rate: its grid is LoRA's, and stands for rates like the prompts'. With token routing a token meets
# ten prompts of its expert and ten shared ones, which is why methods without experts have twenty. Rows of unit scale,
# the default, are smaller than the layer's inputs in deep layers, and take a rate a third as high.
MATRICES, UNIT = (1e-3, 3e-3), (3e-4, 1e-3)
INPUTS = {"start_scale": "inputs"}
METHODS = {
    "lora": Method(Row("lora_r8"), MATRICES),
    "prompt": Method(Row("prompt_tuning", 20), (1e-2, 3e-2)),
    "prefix": Method(Row("prefix_tuning", 20), (3e-3, 1e-2)),
    "static": Method(Row("static", 20, 1), UNIT),
    "mept-token": Method(Row("mept_token", 10, 4), UNIT),
    "mept-sample": Method(Row("mept_sample", 10, 4), UNIT),
    "static-inputs": Method(Row("static", 20, 1), MATRICES, INPUTS),
    "mept-token-inputs": Method(Row("mept_token", 10, 4), MATRICES, INPUTS),
    "mept-sample-inputs": Method(Row("mept_sample", 10, 4), MATRICES, INPUTS),
}


def adapter(method: Method) -> PeftConfig:
    """PEFT's config of a method."""
    made = config(SHAPES["smollm2"], method.row)
    for name, value in method.settings.items():
        setattr(made, name, value)
    return made


class Questions:
    """Questions with their answers, for training."""

    def __init__(self, data: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
        self.texts = [causal_lm.encode(row, tokenizer) for row in data]
        self.labels: Tensor = torch.tensor(data["label"])
        self._collate = DataCollatorForSeq2Seq(tokenizer)

    def __len__(self) -> int:
        return len(self.texts)

    def length(self, index: int) -> int:
        return len(self.texts[index]["input_ids"])

    def batch(self, chosen: list[int]) -> dict[str, Tensor]:
        return dict(self._collate([self.texts[i] for i in chosen]))


@dataclass(frozen=True)
class Bench:
    """All that a cell needs: the base model's folder, its tokenizer, the texts and the budget."""

    folder: str
    tokenizer: PreTrainedTokenizerBase
    splits: datasets.DatasetDict
    budget: Budget

    def lrs(self, name: str) -> tuple[float, ...]:
        return METHODS[name].lrs

    def run(self, name: str, lr: float, seed: int, final: bool) -> dict[str, Any]:
        """One cell: train `name` at `lr` with `seed`; score the development split, or the test split if `final`."""
        torch.manual_seed(seed)
        model, data = self.ready(name)
        cell = train_cell(model, data, lr, seed, self.budget, f"{name} lr={lr:g} seed={seed}")
        split = "test" if final else "dev"
        routed = name.startswith("mept")
        with Stopwatch() as scoring, record_routing(model) if routed else nullcontext() as record:
            accuracy = self.exact_match(model, split)
        cell |= {"score_seconds": round(scoring.seconds, 1), "accuracy": round(accuracy, 5)}
        return cell | ({"load_entropy": rounded(record.report().entropy)} if record else {})

    def ready(self, name: str) -> tuple[PeftModel, Questions]:
        return self.model(name), Questions(self.splits["train"], self.tokenizer)

    def exact_match(self, model: torch.nn.Module, split: str) -> float:
        data = self.splits[split]
        with self.budget.autocast(device_of(model)):
            answers = causal_lm.generate(model, self.tokenizer, list(data["text"]))
        return causal_lm.exact_match(answers, data)

    def base(self) -> torch.nn.Module:
        # Eager attention: the fused bf16 backward pass on CPU takes longer than that of plain products.
        return AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation="eager")

    def model(self, name: str) -> PeftModel:
        model = get_peft_model(self.base(), adapter(METHODS[name]))
        if name == "prefix":  # as prompts of all other methods, from what the model makes of text
            text = causal_lm.INSTRUCTION.format(text=self.splits["train"]["text"][0])
            initialize_kv_prefix_from_text(model, self.tokenizer, text=text, use_chat_template=False)
        return model

    def answers_once(self, name: str) -> Callable[[], object]:
        """What a method must be able to do: training alone does not tell whether it can generate."""
        text = self.splits["dev"]["text"][:1]
        return lambda: causal_lm.generate(self.model(name), self.tokenizer, text)

    def details(self, cells: list[dict[str, Any]]) -> dict[str, Any]:
        """Mean over the cells of how even the experts' load was, layer by layer."""
        if "load_entropy" not in cells[0]:
            return {}
        return {"load_entropy": rounded(torch.tensor([cell["load_entropy"] for cell in cells]).mean(dim=0))}


def parse_args() -> argparse.Namespace:
    parser = search.parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--model", help="local folder or Hub id of a chat model (default: packaged SmolLM2-135M)")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"texts of the {name} split")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=FOLDER / "learning_causal.json")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    search.prepare(args)
    folder, sizes = args.model or assets.smollm2(), {name: getattr(args, name) for name in SIZES}
    budget = Budget(epochs=args.epochs, batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bench = Bench(folder, tokenizer, assets.rotten_tomatoes(**sizes), budget)
    settings = {
        "task": "sentiment, by generation",
        "model": args.model or "SmolLM2-135M-Instruct",
        "texts": sizes,
        "budget": asdict(budget),
    }
    results = Results(args.results, settings)
    if "untrained" not in results.data:
        results.data["untrained"] = {split: bench.exact_match(bench.base(), split) for split in ("dev", "test")}
        results.save()
    if args.times:
        time_steps(bench, results, args.methods)
        return
    for name in args.methods:
        if admitted(results, name, bench.answers_once(name)):
            run_method(bench, results, name, args.seeds)
    print(f"\n{HEADINGS}")
    for name, row in ranking(results):
        print(line(name, row))
    print(f"untrained: {results.data['untrained']['test']:.4f}")


if __name__ == "__main__":
    main(parse_args())
