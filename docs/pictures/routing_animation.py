# SPDX-License-Identifier: Apache-2.0
"""The animation of README: which expert each token of a generated sentence chose, layer by layer.

python docs/pictures/routing_animation.py             # draws it, for light and for dark pages
python docs/pictures/routing_animation.py --measure   # first trains SmolLM2 to turn sentences into questions, minutes

The task has one right answer, so that whoever looks at the animation can tell that the sentence is right.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context

from peft_promptmoe import TokenRouting, token_routing

HERE = Path(__file__).resolve().parent
MEASURED = HERE / "token_routing.json"
REQUEST = "Turn this sentence into a question.\n\n{sentence}"
# Longer than any sentence that is trained on.
SENTENCE = "the children have planted a small tree in the garden behind the old school"
THEMES = {"light": ("#ffffff", "#1f2328"), "dark": ("#0d1117", "#e6edf3")}
TEXTS, BATCH = 320, 4


def measured() -> dict[str, Any]:
    """Train MEPT by token on BIG-bench's question formation, ask it for `SENTENCE`, and keep who took which token."""
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

    def asked(sentence: str) -> str:
        messages = [{"role": "user", "content": REQUEST.format(sentence=sentence)}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        before = tokenizer(asked(row["input"]), add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["target"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        return {"input_ids": before + answer, "labels": [-100] * len(before) + answer}

    rows = random.Random(0).sample(assets.big_bench("linguistic_mappings/question_formation_json"), TEXTS)
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.float32)
    model = get_peft_model(model, MEPTConfig(task_type="CAUSAL_LM"))
    trainer = Trainer(
        model,
        TrainingArguments(
            tempfile.mkdtemp(),
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            logging_steps=20,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
        ),
        train_dataset=[encode(row) for row in rows],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    model.eval()
    batch = tokenizer(asked(SENTENCE), add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**batch, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    routing = token_routing(model, tokenizer.convert_ids_to_tokens(ids[0, :-1]))
    print(tokenizer.decode(ids[0]))
    return {
        "model": "SmolLM2-135M-Instruct",
        "texts": TEXTS,
        "sentence": SENTENCE,
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
    start = found["generated_from"]  # behind the chat template and the request
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
