# SPDX-License-Identifier: Apache-2.0
"""The animation of README: which expert each token of a generated film review chose, layer by layer.

python docs/pictures/routing_animation.py             # draws it, for light and for dark pages
python docs/pictures/routing_animation.py --measure   # first trains SmolLM2 on film reviews, a few minutes
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context

from peft_promptmoe import TokenRouting, token_routing

HERE = Path(__file__).resolve().parent
MEASURED = HERE / "token_routing.json"
REQUEST = "Write one sentence of a {kind} film review."
KINDS = ("negative", "positive")
THEMES = {"light": ("#ffffff", "#1f2328"), "dark": ("#0d1117", "#e6edf3")}
TEXTS, BATCH = 320, 4


def measured() -> dict[str, Any]:
    """Train MEPT by token to write sentences of film reviews, let it write one, and keep who took which token."""
    sys.path.insert(0, str(HERE.parents[1] / "examples" / "advanced"))
    from peft import get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    import assets
    from peft_promptmoe import MEPTConfig

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())

    def asked(kind: str) -> str:
        messages = [{"role": "user", "content": REQUEST.format(kind=kind)}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        before = tokenizer(asked(KINDS[row["label"]]), add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["text"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        return {"input_ids": before + answer, "labels": [-100] * len(before) + answer}

    reviews = assets.rotten_tomatoes(train=TEXTS)["train"]
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.float32)
    model = get_peft_model(model, MEPTConfig(task_type="CAUSAL_LM"))
    trainer = Trainer(
        model,
        TrainingArguments(
            tempfile.mkdtemp(),
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            logging_steps=20,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
        ),
        train_dataset=reviews.map(encode, remove_columns=reviews.column_names),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    model.eval()
    batch = tokenizer(asked("positive"), add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**batch, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    routing = token_routing(model, tokenizer.convert_ids_to_tokens(ids[0, :-1]))
    print(tokenizer.decode(ids[0]))
    return {
        "model": "SmolLM2-135M-Instruct",
        "texts": TEXTS,
        "generated_from": batch["input_ids"].shape[1],
        "layers": routing.layers,
        "tokens": routing.tokens,
        "experts": routing.experts.tolist(),
        "num_experts": routing.num_experts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="train and generate anew")
    if parser.parse_args().measure:
        MEASURED.write_text(json.dumps(measured()) + "\n", encoding="utf-8")
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    start = found["generated_from"]  # the template and the request are the same in every text
    experts = torch.tensor(found["experts"])[:, start:]
    routing = TokenRouting(found["layers"], found["tokens"][start:], experts, found["num_experts"])
    for name, (page, ink) in THEMES.items():
        inked = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), ink)
        with rc_context(inked | {"figure.facecolor": page, "axes.facecolor": page}):
            path = HERE / f"token-routing-{name}.gif"
            routing.animate(path)
            print(path, f"{path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
