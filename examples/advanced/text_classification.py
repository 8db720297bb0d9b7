# SPDX-License-Identifier: Apache-2.0
r"""Text classification with MEPT and the stock Trainer, beside training the head alone.

    python examples/advanced/text_classification.py    # packaged model and data, four minutes on two CPU cores
    python examples/advanced/text_classification.py --model FacebookAI/roberta-base --dataset stanfordnlp/sst2 \
        --text-column sentence --splits train validation validation
    python examples/advanced/text_classification.py --predict outputs/text_classification/adapter \
        --text "A quiet triumph."
    torchrun --nproc-per-node 2 examples/advanced/text_classification.py    # two processes (DDP), on CPUs or GPUs
"""

import argparse
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import assets
from peft_promptmoe import MEPTConfig, RoutingCallback, routing_report

HEAD = {"pooler", "classifier", "score"}  # BERT's pooler too: sentence encoders such as MiniLM never trained theirs


def load_splits(args: argparse.Namespace) -> datasets.DatasetDict:
    """Splits `train`, `dev` and `test` with the columns `text` and `label`."""
    sizes = dict(zip(("train", "dev", "test"), args.sizes, strict=True))
    if args.dataset is None:
        return assets.rotten_tomatoes(**sizes)
    source = datasets.load_dataset(args.dataset, args.dataset_config)
    splits = datasets.DatasetDict()
    for (split, size), name in zip(sizes.items(), args.splits, strict=True):
        data = source[name].select_columns([args.text_column, args.label_column])
        data = data.rename_columns({args.text_column: "text", args.label_column: "label"}).shuffle(seed=0)
        splits[split] = assets.first(data, size)
    if isinstance(splits["train"].features["label"], datasets.ClassLabel):
        return splits
    return splits.class_encode_column("label")


def score(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train(model: torch.nn.Module, data: datasets.DatasetDict, args: argparse.Namespace, name: str) -> dict[str, float]:
    """Train what is trainable in `model` with the stock Trainer; returns its scores on the test split."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output / name),
            learning_rate=args.lr,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=64,
            train_sampling_strategy="group_by_length",
            warmup_steps=0.1,
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=50,
            bf16=args.bf16,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
            report_to="none",
        ),
        train_dataset=data["train"],
        eval_dataset=data["dev"],
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(args.model)),
        compute_metrics=score,
        callbacks=[RoutingCallback()] if name == "mept" else [],
    )
    seconds = trainer.train().metrics["train_runtime"]
    scores = trainer.evaluate(data["test"], metric_key_prefix="test")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"accuracy": scores["test_accuracy"], "loss": scores["test_loss"], "trainable": trainable, "s": seconds}


def head_only(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze everything but the head."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not HEAD.isdisjoint(name.split("."))
    return model


def fine_tune(args: argparse.Namespace) -> None:
    splits = load_splits(args)
    labels = splits["train"].features["label"].names
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = splits.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=args.max_length), batched=True
    ).select_columns(["input_ids", "attention_mask", "label"])

    def base_model() -> PreTrainedModel:
        set_seed(args.seed)  # both runs start from the same head
        names = dict(enumerate(labels))
        return AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(labels), id2label=names)

    head_scores = train(head_only(base_model()), data, args, "head")

    base = base_model()
    head = sorted(HEAD & {name.rpartition(".")[-1] for name, _ in base.named_modules()})
    model = get_peft_model(base, MEPTConfig(task_type="SEQ_CLS", modules_to_save=head))
    model.print_trainable_parameters()
    mept_scores = train(model, data, args, "mept")
    if not PartialState().is_main_process:
        return
    model.save_pretrained(args.output / "adapter")
    tokenizer.save_pretrained(args.output / "adapter")

    print(f"\nTest split, {len(data['test'])} texts:")
    for name, scores in {"head only": head_scores, "MEPT": mept_scores}.items():
        print(f"  {name:10}", "   ".join(f"{key} {value:.6g}" for key, value in scores.items()))

    print("\nThe saved adapter in a fresh process, on the first held-out texts:", flush=True)
    shown = splits["test"].select(range(min(args.show, len(splits["test"]))))
    command = [sys.executable, __file__, "--predict", args.output / "adapter", "--output", args.output]
    command += [f"--text={text}" for text in shown["text"]]
    command += [f"--truth={labels[label]}" for label in shown["label"]]
    subprocess.run([*command, "--labels", *labels], check=True)


@torch.no_grad()
def predict(args: argparse.Namespace) -> None:
    """Load the adapter in `args.predict` as its card says, label `args.text`, and show which experts were chosen."""
    names = dict(enumerate(args.labels))
    model = AutoPeftModelForSequenceClassification.from_pretrained(args.predict, id2label=names).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.predict)
    batch = tokenizer(args.text, padding=True, truncation=True, return_tensors="pt")
    chances = model(**batch).logits.softmax(-1)
    for text, truth, row in zip_longest(args.text, args.truth, chances):
        found = names[int(row.argmax())]
        remark = "" if truth in (None, found) else f"wrong, it is {truth}: "
        print(f"  {found:8} {row.max():.2f}  {remark}{text}")

    report = routing_report(model)
    print("\nWho took these texts, layer by layer:")
    print(report.to_dataframe().to_string(index=False, float_format="{:.3f}".format))
    args.output.mkdir(parents=True, exist_ok=True)
    report.plot(args.output / "routing.png")
    print(f"\npicture: {args.output / 'routing.png'}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or local folder (default: packaged MiniLM)")
    parser.add_argument("--dataset", help="Hub id or local folder (default: packaged Rotten Tomatoes snippets)")
    parser.add_argument("--dataset-config", help="configuration of the data set, where it has several")
    parser.add_argument("--splits", nargs=3, default=["train", "validation", "test"], metavar=("TRAIN", "DEV", "TEST"))
    parser.add_argument("--sizes", nargs=3, type=int, default=[8000, 400, 1000], metavar=("TRAIN", "DEV", "TEST"))
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--max-length", type=int, default=48, help="longest text, in tokens")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="one learning rate for head and prompts")
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/text_classification"))
    parser.add_argument("--predict", metavar="ADAPTER", help="load this adapter and label --text instead of training")
    parser.add_argument("--show", type=int, default=10, help="how many held-out texts to show with their true labels")
    parser.add_argument(
        "--text", action="append", default=[], help="a text to label with --predict; give it repeatedly"
    )
    parser.add_argument("--truth", action="append", default=[], help="its true label, where it is known")
    parser.add_argument("--labels", nargs="+", default=["rotten", "fresh"], help="names of the classes, for --predict")
    args = parser.parse_args()
    if args.model is None and args.predict is None:
        args.model = assets.minilm()
    if args.predict and not args.text:
        parser.error("--predict needs a --text to label")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    predict(arguments) if arguments.predict else fine_tune(arguments)
