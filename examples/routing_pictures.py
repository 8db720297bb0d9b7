# SPDX-License-Identifier: Apache-2.0
"""Look at routing: a table, two pictures, and an animation of which expert each generated token takes, layer by layer.

python examples/routing_pictures.py    # writes load.png, pathways.png and tokens.gif
"""

import torch
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from peft_promptmoe import MEPTConfig, record_routing, routing_report

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

# Generate, then hand the tokens in one by one: after each, the report is of that token alone.
start = tokenizer("Once upon a time", return_tensors="pt")
ids, cache, chosen = model.generate(**start, max_new_tokens=16, do_sample=False), None, []
for token in ids[0]:
    with torch.no_grad(), record_routing(model) as record:
        cache = model(input_ids=token[None, None], past_key_values=cache, use_cache=True).past_key_values
    chosen.append(record.report().gate.argmax(dim=-1))
experts = torch.stack(chosen, dim=1)  # layers x tokens
print(routing_report(model))

figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
words = [tokenizer.decode(token).replace("\n", "\\n") for token in ids[0]]
axes.set(title="The expert that each token takes", ylabel="layer", xticks=range(len(words)), yticks=[])
axes.set_xticklabels(words, rotation=60, ha="right")
image = axes.imshow(experts, cmap=colormaps["tab10"].with_extremes(bad="white"), vmin=0, vmax=9, aspect="auto")


def show(layer: int) -> None:
    image.set_data(experts.double().masked_fill(torch.arange(len(experts))[:, None] > layer, float("nan")))


FuncAnimation(figure, show, frames=len(experts)).save("tokens.gif", PillowWriter(fps=4))
