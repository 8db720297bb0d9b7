# SPDX-License-Identifier: Apache-2.0
"""Instruction tuning of a causal language model with MEPT: answer a question about a text, scored by exact match.

python examples/advanced/causal_lm.py    # packaged SmolLM2-135M-Instruct, a few minutes on CPU
python examples/advanced/causal_lm.py --model HuggingFaceTB/SmolLM2-360M-Instruct
"""

import argparse
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import assets
from peft_promptmoe import MEPTConfig, RoutingCallback, record_routing

INSTRUCTION = "Is this sentence from a film review positive or negative? Answer with one word.\n\n{text}"
ANSWERS = ("negative", "positive")


def question(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The instruction about `text`, up to where the model's answer begins."""
    messages = [{"role": "user", "content": INSTRUCTION.format(text=text)}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Question and answer as one text, with a loss on the answer only: label -100 means "no loss here"."""
    asked = tokenizer(question(row["text"], tokenizer), add_special_tokens=False)["input_ids"]  # the template has them
    answer = tokenizer(ANSWERS[row["label"]] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    ids = asked + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(asked) + answer}


@torch.no_grad()
def generate(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[str]:
    """The model's greedy answers."""
    model.eval()
    answers: list[str] = []
    for start in range(0, len(texts), 32):
        asked = [question(text, tokenizer) for text in texts[start : start + 32]]
        batch = tokenizer(asked, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        batch = batch.to(model.device)
        generated = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answered = generated[:, batch["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(answered, skip_special_tokens=True)]
    return answers


def exact_match(answers: list[str], data: datasets.Dataset) -> float:
    return sum(a == ANSWERS[label] for a, label in zip(answers, data["label"], strict=True)) / len(answers)


def main(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    splits = assets.rotten_tomatoes(train=args.train_size, test=args.test_size)
    train_data = splits["train"].map(lambda row: encode(row, tokenizer), remove_columns=splits["train"].column_names)
    test_texts = list(splits["test"]["text"])

    model = AutoModelForCausalLM.from_pretrained(args.model)
    before = generate(model, tokenizer, test_texts)

    model = get_peft_model(model, MEPTConfig(task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            learning_rate=args.lr,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            logging_steps=10,
            save_strategy="no",
            bf16=args.bf16,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
            report_to="none",
        ),
        train_dataset=train_data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads the labels too
        callbacks=[RoutingCallback()],
    )
    trainer.train()
    model.save_pretrained(args.output / "adapter")

    with record_routing(model) as record:
        after = generate(model, tokenizer, test_texts)
    print(f"\nexact match on {len(test_texts)} unseen snippets:")
    print(f"  before {exact_match(before, splits['test']):.3f}   after {exact_match(after, splits['test']):.3f}")
    for text, old, new in list(zip(test_texts, before, after, strict=True))[:4]:
        print(f"\n  {text}\n    before: {old!r}   after: {new!r}")

    args.output.mkdir(parents=True, exist_ok=True)
    record.report().plot(args.output / "routing.png")
    print(f"\nadapter: {args.output / 'adapter'}   routing: {args.output / 'routing.png'}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or local folder of a chat model (default: packaged SmolLM2-135M)")
    parser.add_argument("--train-size", type=int, default=480)
    parser.add_argument("--test-size", type=int, default=200)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/causal_lm"))
    args = parser.parse_args()
    args.model = args.model or assets.smollm2()
    return args


if __name__ == "__main__":
    main(parse_args())
