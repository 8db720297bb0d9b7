# SPDX-License-Identifier: Apache-2.0
"""Classify a folder of images, one subfolder for each class: VAPT with the Trainer.

python examples/image_folder.py          # FOLDER; where there is none, shapes are drawn into it
"""

import random
from pathlib import Path

import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

from peft_promptmoe import VAPTConfig

MODEL, SIZE, FOLDER = "facebook/dinov2-small", 112, Path("shapes")
if not FOLDER.exists():
    dice = random.Random(0)
    for name, sides in {"triangle": 3, "square": 4, "circle": 40}.items():
        (FOLDER / name).mkdir(parents=True)
        for number in range(80):
            picture = Image.new("RGB", (160, 160), tuple(dice.randrange(90) for _ in "rgb"))
            circle = (dice.randrange(45, 115), dice.randrange(45, 115), dice.randrange(20, 45))
            colour = tuple(dice.randrange(120, 256) for _ in "rgb")
            ImageDraw.Draw(picture).regular_polygon(circle, sides, rotation=dice.randrange(360), fill=colour)
            picture.save(FOLDER / name / f"{number}.png")

set_seed(0)
data = load_dataset("imagefolder", data_dir=str(FOLDER), split="train").train_test_split(0.25, seed=0)
names = dict(enumerate(data["train"].features["label"].names))
sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
prepare = AutoImageProcessor.from_pretrained(MODEL, **sizes)


def collate(rows):
    images = prepare([row["image"].convert("RGB") for row in rows], return_tensors="pt")
    return {**images, "labels": torch.tensor([row["label"] for row in rows])}


base = AutoModelForImageClassification.from_pretrained(MODEL, id2label=names)
model = get_peft_model(base, VAPTConfig(image_size=[SIZE, SIZE]))  # no task_type for images
model.print_trainable_parameters()
args = {"learning_rate": 3e-3, "num_train_epochs": 3, "per_device_train_batch_size": 16, "logging_steps": 10}
trainer = Trainer(
    model,
    TrainingArguments("outputs", **args, remove_unused_columns=False, report_to="none"),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    data_collator=collate,
    compute_metrics=lambda seen: {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean())},
)
trainer.train()
print(f"accuracy on {len(data['test'])} held-out images: {trainer.evaluate()['eval_accuracy']:.2f}")

model.save_pretrained("image-adapter")
base = AutoModelForImageClassification.from_pretrained(MODEL, id2label=names)
loaded, row = PeftModel.from_pretrained(base, "image-adapter").eval(), data["test"][0]
print("predicted", names[int(loaded(**collate([row])).logits.argmax())], "of a", names[row["label"]])
