# SPDX-License-Identifier: Apache-2.0
"""Sequence to sequence with MEPT on T5: prompts in the encoder, scored by exact match of what is generated.

python examples/advanced/seq2seq.py         # t5-small from the Hub: sentiment of review snippets
python examples/advanced/seq2seq.py --model google/flan-t5-base
python examples/advanced/seq2seq.py --tiny  # a tiny random T5 on made-up data: no network, seconds
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
    set_seed,
)

import assets
from peft_promptmoe import MEPTConfig, RoutingCallback, routing_report

ANSWERS = ("negative", "positive")
Collator = Callable[[list[Any]], dict[str, Tensor]]
Parts = tuple[PreTrainedModel, DatasetDict, Collator]


def pretrained(args: argparse.Namespace) -> Parts:
    """Model, data and collator of a real T5: `sentiment: <snippet>` -> `positive` or `negative`."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model)

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        return tokenizer(
            f"sentiment: {row['text']}", text_target=ANSWERS[row["label"]], truncation=True, max_length=96
        )

    splits = assets.rotten_tomatoes(train=args.train_size, test=args.test_size)
    data = splits.map(encode, remove_columns=splits["train"].column_names)
    return model, data, DataCollatorForSeq2Seq(tokenizer, model=model)


def tiny(args: argparse.Namespace) -> Parts:
    """A random T5 of 0.1 M parameters: which of the tokens 10 and 11 is more frequent? Shows the mechanics only."""
    config = T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    ids = torch.randint(10, 12, (args.train_size + args.test_size, 15))
    answers = 20 + (ids == 11).sum(1).gt(7).long()
    rows = {
        "input_ids": ids.tolist(),
        "attention_mask": torch.ones_like(ids).tolist(),
        "labels": [[answer, config.eos_token_id] for answer in answers.tolist()],
    }
    splits = Dataset.from_dict(rows).train_test_split(test_size=args.test_size, shuffle=False)
    return T5ForConditionalGeneration(config), splits, default_data_collator


@torch.no_grad()
def exact_match(model: torch.nn.Module, data: Dataset, collate: Collator) -> float:
    """Share of rows whose greedily generated token ids are the label's."""
    model.eval()
    right = 0
    for start in range(0, len(data), 32):
        batch = collate([data[i] for i in range(start, min(start + 32, len(data)))])
        wanted = batch["labels"].masked_fill(batch["labels"] == -100, 0)
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        made = model.generate(**inputs, max_new_tokens=wanted.shape[1], do_sample=False)[:, 1:].cpu()
        made = torch.nn.functional.pad(made, (0, wanted.shape[1] - made.shape[1]))
        right += int((made == wanted).all(1).sum())
    return right / len(data)


def main(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    model, data, collate = tiny(args) if args.tiny else pretrained(args)
    match_before = exact_match(model, data["test"], collate)

    model = get_peft_model(model, MEPTConfig(task_type="SEQ_2_SEQ_LM"))
    model.print_trainable_parameters()
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(args.output),
            learning_rate=args.lr,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            logging_steps=20,
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
            report_to="none",
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=collate,
        callbacks=[RoutingCallback()],
    )
    loss_before = trainer.evaluate()["eval_loss"]
    trainer.train()
    loss_after = trainer.evaluate()["eval_loss"]
    model.save_pretrained(args.output / "adapter")

    match_after = exact_match(model, data["test"], collate)
    print(f"\n{len(data['test'])} unseen inputs, before and after training:")
    print(f"  loss {loss_before:.3f} -> {loss_after:.3f}   exact match {match_before:.3f} -> {match_after:.3f}")
    routing_report(model).plot(args.output / "routing.png")
    print(f"adapter: {args.output / 'adapter'}   routing: {args.output / 'routing.png'}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google-t5/t5-small", help="Hub id or local folder of a T5")
    parser.add_argument("--tiny", action="store_true", help="a tiny random T5 on made-up sequences")
    parser.add_argument("--train-size", type=int, default=960)
    parser.add_argument("--test-size", type=int, default=200)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/seq2seq"))
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
