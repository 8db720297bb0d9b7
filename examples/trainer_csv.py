# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Classify the texts of a CSV file
# MEPT with the Trainer: train on `FILE`, with columns `text` and `label`, score texts that were held out, save
# the adapter, load it again and label a new text. Where there is no such file, one is written to show the form.

# %%
from pathlib import Path

import torch
from datasets import load_dataset
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

from peft_promptmoe import MEPTConfig, RoutingCallback

MODEL, FILE = "sentence-transformers/all-MiniLM-L6-v2", Path("tickets.csv")
if not FILE.exists():
    billing = "I was charged twice|Please refund my order|The invoice is wrong|My card was declined|I need a receipt|"
    billing += "How much is the plan?|Cancel my subscription|The discount is missing|Where is my bill of May?|"
    billing += "Change my bank account|The price went up without notice|I want my money back"
    technical = (
        "The app crashes on start|The screen stays black|Login gives error 500|Sync never ends|No sound at all|"
    )
    technical += "My phone does not connect|The update failed|The page does not load|The button does nothing|"
    technical += "It freezes when I open a file|Videos stop after a second|The export writes an empty file"
    labelled = {"billing": billing.split("|"), "technical": technical.split("|")}
    FILE.write_text("text,label\n" + "\n".join(f'"{text}",{label}' for label in labelled for text in labelled[label]))

# %% Data: the labels become numbers, the texts tokens
set_seed(0)
data = load_dataset("csv", data_files=str(FILE), split="train").class_encode_column("label")
names = dict(enumerate(data.features["label"].names))
tokenizer = AutoTokenizer.from_pretrained(MODEL)
parts = data.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True).train_test_split(0.25, seed=0)

# %% Model and training
model = AutoModelForSequenceClassification.from_pretrained(MODEL, id2label=names)
model = get_peft_model(model, MEPTConfig(task_type="SEQ_CLS"))
model.print_trainable_parameters()
trainer = Trainer(
    model,
    TrainingArguments("outputs", learning_rate=1e-3, num_train_epochs=30, logging_steps=30, report_to="none"),
    train_dataset=parts["train"],
    eval_dataset=parts["test"],
    processing_class=tokenizer,
    compute_metrics=lambda seen: {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean())},
    callbacks=[RoutingCallback()],  # logs how evenly the experts are used
)
trainer.train()
print(f"accuracy on {len(parts['test'])} held-out texts: {trainer.evaluate()['eval_accuracy']:.2f}")

# %% Save, load, predict
model.save_pretrained("adapter")
tokenizer.save_pretrained("adapter")
model = AutoPeftModelForSequenceClassification.from_pretrained("adapter", id2label=names).eval()
batch = tokenizer(["Why is there a second payment on my account?"], return_tensors="pt")
with torch.no_grad():
    print(names[int(model(**batch).logits.argmax())])
