# SPDX-License-Identifier: Apache-2.0
"""Push an adapter to the Hub, and load it as a stranger would.

huggingface-cli login
python examples/hub.py your-name/repository
"""

import sys

import torch
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from peft_promptmoe import MEPTConfig  # the import that loading needs, too; the card of the repository says so

MODEL, REPOSITORY = "sentence-transformers/all-MiniLM-L6-v2", sys.argv[1]
NAMES = {0: "billing", 1: "technical"}
TEXTS = ["I was charged twice", "Please refund my order", "The app crashes on start", "The screen stays black"]

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
model = AutoModelForSequenceClassification.from_pretrained(MODEL, id2label=NAMES)
model = get_peft_model(model, MEPTConfig(task_type="SEQ_CLS"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
for _ in range(20):
    model.train()(**batch, labels=torch.tensor([0, 0, 1, 1])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

model.push_to_hub(REPOSITORY)  # adapter_config.json, adapter_model.safetensors and a README that is a model card
tokenizer.push_to_hub(REPOSITORY)

loaded = AutoPeftModelForSequenceClassification.from_pretrained(REPOSITORY, id2label=NAMES).eval()
tokenizer = AutoTokenizer.from_pretrained(REPOSITORY)
batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
with torch.no_grad():
    scores, own = loaded(**batch).logits, model.eval()(**batch).logits
for text, label in zip(TEXTS, scores.argmax(-1).tolist(), strict=True):
    print(f"{NAMES[label]:10} {text}")
print("loaded as it was pushed:", torch.equal(scores, own))
