# SPDX-License-Identifier: Apache-2.0
r"""Image classification by several frozen backbones at once, with pMoE and the stock Trainer.

    python examples/advanced/several_experts.py    # DINOv2-S and two experts trained by us, on digits on photos
    python examples/advanced/several_experts.py --dispatcher none    # the same without a dispatcher
    python examples/advanced/several_experts.py --model google/vit-base-patch16-224-in21k --dataset uoft-cs/cifar10 \
        --image-column img --experts facebook/dino-vitb16 timm/vit_base_patch16_224.mae
    python examples/advanced/several_experts.py --predict outputs/several_experts/adapter --images picture.png

The default task asks for two kinds of knowledge (see `digits_on_photos.py`), and the default experts are small vision
transformers that the first run trains on other images (see `small_experts.py`). All backbones stay frozen.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import assets
import digits_on_photos
import small_experts
from peft_promptmoe import PMoEConfig, parameter_report, routing_report


def load(args: argparse.Namespace) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Images to train on and to test, with the columns `pixel_values`, a picture, and `label`."""
    if args.dataset is None:
        splits = digits_on_photos.splits()
        train, test = datasets.concatenate_datasets([splits["train"], splits["dev"]]), splits["test"]
    else:
        columns = {args.image_column: "pixel_values", args.label_column: "label"}
        data = datasets.load_dataset(args.dataset).select_columns(list(columns)).rename_columns(columns)
        if not isinstance(data["train"].features["label"], datasets.ClassLabel):
            data = data.class_encode_column("label")
        train, test = (data[name].shuffle(seed=0) for name in ("train", "test"))
    return assets.first(train, args.train_images), assets.first(test, args.test_images)


def base_model(name: str, classes: list[str]) -> PreTrainedModel:
    return AutoModelForImageClassification.from_pretrained(
        name, num_labels=len(classes), id2label=dict(enumerate(classes)), ignore_mismatched_sizes=True
    )


def pixels(processor: Any, pictures: list[Image.Image], side: int | None) -> Tensor:
    """(B, 3, rows, columns) what the base model takes, of `side` pixels, or of the size that its processor makes."""
    size = {"size": {"height": side, "width": side}, "do_center_crop": False} if side else {}
    return processor([picture.convert("RGB") for picture in pictures], return_tensors="pt", **size).pixel_values


def train(data: datasets.Dataset, args: argparse.Namespace) -> Trainer:
    """A trainer that has trained a pMoE model on `data`."""
    set_seed(args.seed)
    processor = AutoImageProcessor.from_pretrained(args.model)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        pictures = [row["pixel_values"] for row in rows]
        labels = torch.tensor([row["label"] for row in rows])
        return {"pixel_values": pixels(processor, pictures, args.image_size), "labels": labels}

    base = base_model(args.model, data.features["label"].names)
    config = PMoEConfig(experts=args.experts, num_virtual_tokens=args.prompts, dispatcher=args.dispatcher)
    model = get_peft_model(base, config)
    print(f"\n{parameter_report(model)}\n")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            learning_rate=args.lr,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=64,
            warmup_steps=0.1,  # a share of all steps
            lr_scheduler_type="cosine",
            save_strategy="no",
            logging_steps=20,
            bf16=args.bf16,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
            report_to="none",
        ),
        train_dataset=data,
        data_collator=collate,
        compute_metrics=lambda seen: {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean())},
    )
    trainer.train()
    return trainer


def fine_tune(args: argparse.Namespace) -> None:
    data, test = load(args)
    trainer = train(data, args)
    scores = trainer.evaluate(test)
    print(f"\nTest split, {len(test)} images, after training on {len(data)}:")
    print(f"  accuracy {scores['eval_accuracy']:.4f}   loss {scores['eval_loss']:.4f}")
    report = routing_report(trainer.model)
    print(f"\nThe last batch, what its prompts were made of:\n{report}")
    report.plot(args.output / "dispatch.png")
    print(f"picture: {args.output / 'dispatch.png'}")
    trainer.model.save_pretrained(args.output / "adapter")

    classes = data.features["label"].names
    (args.output / "images").mkdir(exist_ok=True)
    files = []
    for number, row in enumerate(test.select(range(args.pictures))):
        files.append(args.output / "images" / f"{number}-{classes[row['label']].replace('/', '-')}.png")
        row["pixel_values"].save(files[-1])
    print("\nThe saved adapter in a fresh process:", flush=True)
    command = [sys.executable, __file__, "--predict", args.output / "adapter"]
    command += ["--image-size", str(args.image_size)] if args.image_size else []
    subprocess.run([*command, "--images", *files, "--labels", *classes], check=True)


@torch.no_grad()
def predict(args: argparse.Namespace) -> None:
    """Load the adapter in `args.predict` and label `args.images`."""
    name = PeftConfig.from_pretrained(args.predict).base_model_name_or_path
    model = PeftModel.from_pretrained(base_model(name, args.labels), args.predict).eval()
    processor = AutoImageProcessor.from_pretrained(name)
    batch = pixels(processor, [Image.open(file) for file in args.images], args.image_size)
    chances = model(pixel_values=batch).logits.softmax(-1)
    for file, row in zip(args.images, chances, strict=True):
        print(f"  {args.labels[int(row.argmax())]:14} {row.max():.2f}  {file}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of the base model (default: packaged DINOv2-S)")
    parser.add_argument(
        "--dataset", help="Hub id or folder with the splits train and test (default: digits on photos)"
    )
    parser.add_argument("--image-column", default="image", help="name in --dataset")
    parser.add_argument("--label-column", default="label", help="name in --dataset")
    parser.add_argument("--train-images", type=int, default=1000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--image-size", type=int, help="side in pixels (default: the processor's, 98 for DINOv2-S)")
    parser.add_argument("--experts", nargs="+", help="as --model (default: two small ones, trained by the first run)")
    parser.add_argument("--dispatcher", default="token", help="what writes the prompts of a block, see PMoEConfig")
    parser.add_argument("--prompts", type=int, default=10, help="prompts per expert and layer")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=6, help="test images to predict in a fresh process")
    parser.add_argument("--output", type=Path, default=Path("outputs/several_experts"))
    parser.add_argument("--predict", metavar="ADAPTER", help="load this adapter and label --images, nothing else")
    parser.add_argument("--images", nargs="+", type=Path, default=[], help="files to label, for --predict")
    parser.add_argument(
        "--labels", nargs="+", default=digits_on_photos.CLASSES, help="names of the classes, for --predict"
    )
    args = parser.parse_args()
    if args.predict and not args.images:
        parser.error("--predict needs --images")
    if args.model is None:
        args.model = assets.dinov2_small()
        args.image_size = args.image_size or digits_on_photos.CANVAS
    if args.experts is None and not args.predict:
        args.experts = [small_experts.digits_expert(), small_experts.photos_expert()]
    return args


if __name__ == "__main__":
    arguments = parse_args()
    predict(arguments) if arguments.predict else fine_tune(arguments)
