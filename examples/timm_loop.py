# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # A vision transformer of timm in a plain PyTorch loop
# VAPT, whose prompts are computed from the image, on pictures that are drawn here: triangles, squares and circles of
# any size, place and colour. Replace `picture` by your own pictures.

# %%
import random

import timm
import torch
from peft import PeftModel, get_peft_model
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from peft_promptmoe import VAPTConfig

MODEL, SIZE = "vit_small_patch14_dinov2.lvd142m", 112
SIDES = {"triangle": 3, "square": 4, "circle": 40}


def picture(number: int) -> Image.Image:
    dice = random.Random(number)
    made = Image.new("RGB", (SIZE, SIZE), tuple(dice.randrange(90) for _ in "rgb"))
    circle = (dice.randrange(30, SIZE - 30), dice.randrange(30, SIZE - 30), dice.randrange(12, 30))
    colour, turn = tuple(dice.randrange(120, 256) for _ in "rgb"), dice.randrange(360)
    ImageDraw.Draw(made).regular_polygon(circle, list(SIDES.values())[number % 3], rotation=turn, fill=colour)
    return made


# %% The model: leave `task_type` unset for images; its head is trained with the prompts
torch.manual_seed(0)
base = timm.create_model(MODEL, pretrained=True, num_classes=len(SIDES), img_size=SIZE)
model = get_peft_model(base, VAPTConfig(image_size=[SIZE, SIZE]))
model.print_trainable_parameters()

# %% Data
prepare = timm.data.create_transform(**timm.data.resolve_data_config({"input_size": (3, SIZE, SIZE)}, model=base))
rows = [(prepare(picture(number)), number % 3) for number in range(288)]
train, test = DataLoader(rows[:192], batch_size=16, shuffle=True), DataLoader(rows[192:], batch_size=32)

# %% The loop
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
for epoch in range(3):
    total = 0.0
    for images, labels in train:
        loss = torch.nn.functional.cross_entropy(model.train()(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    with torch.no_grad():
        right = sum(int((model.eval()(images).argmax(-1) == labels).sum()) for images, labels in test)
    print(f"epoch {epoch}: loss {total / len(train):.3f}, {right} of {len(test.dataset)} held-out pictures right")

# %% Save, and load into a base model that is made as it was
model.save_pretrained("timm-adapter")
base = timm.create_model(MODEL, pretrained=True, num_classes=len(SIDES), img_size=SIZE)
model = PeftModel.from_pretrained(base, "timm-adapter").eval()
print(list(SIDES)[int(model(rows[-1][0][None]).argmax())], "is a", list(SIDES)[rows[-1][1]])
