# SPDX-License-Identifier: Apache-2.0
"""Classify images by several frozen backbones at once: pMoE in a plain PyTorch loop.

python examples/pmoe.py          # a ViT and DINOv2-S look at drawn shapes
"""

import random

import torch
from peft import PeftModel, get_peft_model
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification

from peft_promptmoe import PMoEConfig, parameter_report, routing_report

MODEL, EXPERTS = "WinKawaks/vit-tiny-patch16-224", ["facebook/dinov2-small"]
SIDES = {"triangle": 3, "square": 4, "circle": 40}


def picture(number: int) -> Image.Image:
    dice = random.Random(number)
    made = Image.new("RGB", (224, 224), tuple(dice.randrange(90) for _ in "rgb"))
    circle = (dice.randrange(60, 164), dice.randrange(60, 164), dice.randrange(24, 60))
    colour, turn = tuple(dice.randrange(120, 256) for _ in "rgb"), dice.randrange(360)
    ImageDraw.Draw(made).regular_polygon(circle, list(SIDES.values())[number % 3], rotation=turn, fill=colour)
    return made


def base_model() -> torch.nn.Module:
    return AutoModelForImageClassification.from_pretrained(
        MODEL, id2label=dict(enumerate(SIDES)), ignore_mismatched_sizes=True
    )


torch.manual_seed(0)
# Each expert gets the pixels in its own size and normalisation. dispatcher="none" is the one to compare others with.
model = get_peft_model(base_model(), PMoEConfig(experts=EXPERTS, dispatcher="token"))
print(parameter_report(model))

processor = AutoImageProcessor.from_pretrained(MODEL)
rows = [(processor(picture(n), return_tensors="pt")["pixel_values"][0], n % 3) for n in range(144)]
train, test = DataLoader(rows[:96], batch_size=16, shuffle=True), DataLoader(rows[96:], batch_size=16)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
for epoch in range(3):
    for images, labels in train:
        loss = model.train()(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        right = sum(int((model.eval()(images).logits.argmax(-1) == labels).sum()) for images, labels in test)
    print(f"epoch {epoch}: {right} of {len(rows) - 96} held-out pictures right")
print(routing_report(model))  # what the prompts of each block were made of, for the last batch

model.save_pretrained("pmoe-adapter")  # the experts' names and a hash of their weights, not the weights
model = PeftModel.from_pretrained(base_model(), "pmoe-adapter").eval()
print(list(SIDES)[int(model(rows[-1][0][None]).logits.argmax())], "is a", list(SIDES)[rows[-1][1]])
