# SPDX-License-Identifier: Apache-2.0
"""Look at routing: a table, two pictures, and an animation of which expert each generated token takes, layer by layer.

python examples/routing_pictures.py    # writes load.png, pathways.png and tokens.gif
"""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from peft_promptmoe import MEPTConfig, record_routing, routing_report, token_routing

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CODE = ["def add(a, b):\n    return a + b", "for i in range(3):\n    print(i)", "x = [1, 2, 3]\nprint(sum(x))"]
STORY = ["It was a dark and windy night.", "She closed the door and ran.", "The old man smiled at the sea."]

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
batch = tokenizer(CODE + STORY, padding=True, return_tensors="pt")
model = AutoModelForCausalLM.from_pretrained(MODEL)
model = get_peft_model(model, MEPTConfig(task_type="CAUSAL_LM", router_centering=True))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for _ in range(15):
    model.train()(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

with torch.no_grad(), record_routing(model.eval(), labels=["code"] * 3 + ["story"] * 3) as record:
    model(**batch)
record.report().plot("load.png")  # which expert took how much, layer by layer
record.plot_pathways("pathways.png")  # the same, class by class
print(record.report().to_dataframe().groupby("expert")["load"].mean())

# Generate a text; the report and the animation are of all of its tokens.
ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=16, do_sample=False)
print(routing_report(model))
tokens = tokenizer.convert_ids_to_tokens(ids[0, :-1])  # the last token was never an input
token_routing(model, tokens).animate("tokens.gif")
