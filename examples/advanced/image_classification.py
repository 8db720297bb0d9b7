# SPDX-License-Identifier: Apache-2.0
r"""Image classification with VAPT and the stock Trainer, and a picture of what the class token attends to.

    python examples/advanced/image_classification.py    # packaged model and data, 6 minutes on 2 CPU cores
    python examples/advanced/image_classification.py --lr 1e-3 3e-3 1e-2    # the same, after a search for the rate
    python examples/advanced/image_classification.py --model google/vit-base-patch16-224-in21k \
        --dataset uoft-cs/cifar10 --image-column img
    python examples/advanced/image_classification.py --model timm/vit_small_patch16_224.augreg_in21k \
        --dataset folder/of/images
    python examples/advanced/image_classification.py --predict outputs/image_classification/adapter --images cat.png

The protocol is VTAB-1k's: of several learning rates the one is chosen that scores best on 200 images after training on
800 others; then all 1,000 are trained on, and images that none of this has seen are the test.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import assets
from peft_promptmoe import VAPTConfig

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DINOV2_SIZE = 98  # a grid of 7 x 7 patches: DINOv2 takes any size, and small images are quick on a CPU


def load_splits(args: argparse.Namespace) -> datasets.DatasetDict:
    """Splits `train`, `dev` and `test` with the columns `pixel_values`, a picture, and `label`.

    `pixel_values` is what models call their images, and the Trainer drops columns that models do not know.
    """
    train, dev, test = args.sizes
    if args.dataset is None:
        return assets.cifar10(train, dev, test).rename_column("image", "pixel_values")
    if Path(args.dataset).is_dir():
        source = datasets.load_dataset("imagefolder", data_dir=args.dataset)
    else:
        source = datasets.load_dataset(args.dataset, args.dataset_config)
    columns = {args.image_column: "pixel_values", args.label_column: "label"}
    parts = {name: data.select_columns(list(columns)).rename_columns(columns) for name, data in source.items()}
    if not isinstance(next(iter(parts.values())).features["label"], datasets.ClassLabel):
        parts = datasets.DatasetDict(parts).class_encode_column("label")
    train_name, test_name = args.splits
    splits = assets.vtab_splits(parts[train_name].shuffle(seed=0), train, dev, test)
    if test_name in parts:
        splits["test"] = assets.first(parts[test_name].shuffle(seed=0), test)
    return splits


def own_size(processor: Any) -> list[int]:
    """Rows and columns of pixels that the model was trained on."""
    if hasattr(processor, "data_config"):  # timm
        return list(processor.data_config["input_size"][1:])
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    return [size["shortest_edge"]] * 2 if "shortest_edge" in size else [size["height"], size["width"]]


def preparation(name: str, size: list[int] | None) -> Callable[[Image.Image], Tensor]:
    """What makes the model's input of a picture, resized as a whole; `size` is the model's own if None."""
    processor = AutoImageProcessor.from_pretrained(name)
    timm_data = getattr(processor, "data_config", None)
    mean, std = (timm_data["mean"], timm_data["std"]) if timm_data else (processor.image_mean, processor.image_std)
    return v2.Compose(
        [
            v2.RGB(),
            v2.Resize(size or own_size(processor), interpolation=v2.InterpolationMode.BICUBIC),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )


def collator(prepare: Callable[[Image.Image], Tensor]) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """What makes the model's batch of rows of a data set."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.stack([prepare(row["pixel_values"]) for row in rows]),
            "labels": torch.tensor([row["label"] for row in rows]),
        }

    return collate


def base_model(name: str, classes: list[str], size: list[int] | None, **options: Any) -> PreTrainedModel:
    """The pretrained model with a new head for images of `size`."""
    if is_timm(name) and size not in (None, own_size(AutoImageProcessor.from_pretrained(name))):
        options["model_args"] = {"dynamic_img_size": True}
    return AutoModelForImageClassification.from_pretrained(
        name,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        ignore_mismatched_sizes=True,  # a head that is already there is for other classes
        **options,
    )


def is_timm(name: str) -> bool:
    return AutoConfig.from_pretrained(name).model_type == "timm_wrapper"


def train(
    data: datasets.Dataset, held_out: datasets.Dataset, classes: list[str], lr: float, args: argparse.Namespace
) -> tuple[PeftModel, dict[str, float]]:
    """A VAPT model trained on `data`, and its scores on `held_out`."""
    set_seed(args.seed)  # every training starts from the same head
    base = base_model(args.model, classes, args.image_size)
    model = get_peft_model(base, VAPTConfig(image_size=args.image_size, num_virtual_tokens=args.prompts))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            learning_rate=lr,
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
        data_collator=collator(preparation(args.model, args.image_size)),
        compute_metrics=lambda seen: {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean())},
    )
    trainer.train()
    return model, trainer.evaluate(held_out)


def fine_tune(args: argparse.Namespace) -> None:
    splits = load_splits(args)
    classes = splits["train"].features["label"].names
    lr = args.lr[0]
    if len(args.lr) > 1:
        tried = {lr: train(splits["train"], splits["dev"], classes, lr, args)[1]["eval_accuracy"] for lr in args.lr}
        lr = max(tried, key=tried.__getitem__)
        print("\nright on the development split, by learning rate:", tried, "\nchosen:", lr)

    both = datasets.concatenate_datasets([splits["train"], splits["dev"]])
    model, scores = train(both, splits["test"], classes, lr, args)
    model.print_trainable_parameters()
    print(f"\nTest split, {len(splits['test'])} images, after training on {len(both)}:")
    print(f"  accuracy {scores['eval_accuracy']:.4f}   loss {scores['eval_loss']:.4f}")
    model.save_pretrained(args.output / "adapter")

    files = save_pictures(splits["test"].select(range(args.pictures)), args.output / "images")
    print("\nThe saved adapter in a fresh process:", flush=True)
    command = [sys.executable, __file__, "--predict", args.output / "adapter", "--output", args.output]
    subprocess.run([*command, "--images", *files, "--labels", *classes], check=True)


def save_pictures(rows: datasets.Dataset, folder: Path) -> list[Path]:
    """Files of the rows' pictures, named by number and class."""
    folder.mkdir(parents=True, exist_ok=True)
    classes, files = rows.features["label"].names, []
    for number, row in enumerate(rows):
        files.append(folder / f"{number}-{classes[row['label']].replace('/', '-')}.png")
        row["pixel_values"].save(files[-1])
    return files


@torch.no_grad()
def predict(args: argparse.Namespace) -> None:
    """Load the adapter in `args.predict`, label `args.images` and draw what the class token attends to."""
    config = PeftConfig.from_pretrained(args.predict)
    name, size = config.base_model_name_or_path, config.image_size
    options = (
        {} if is_timm(name) else {"attn_implementation": "eager"}
    )  # other kernels keep their weights to themselves
    model = PeftModel.from_pretrained(base_model(name, args.labels, size, **options), args.predict).eval()
    pictures = [Image.open(file).convert("RGB") for file in args.images]
    prepare = preparation(name, size)
    pixels = torch.stack([prepare(picture) for picture in pictures])
    chances = model(pixel_values=pixels).logits.softmax(-1)
    for file, row in zip(args.images, chances, strict=True):
        print(f"  {args.labels[int(row.argmax())]:12} {row.max():.2f}  {file}")

    seen = None if is_timm(name) else class_attention(model, pixels)
    if seen is None:
        print(f"\nno picture: {type(model.get_base_model()).__name__} does not tell what a class token attends to")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    draw(pictures, *seen, args.output / "attention.png")
    print("\nShare of the class token's attention that goes to prompts, by layer:")
    print(" ", " ".join(f"{share:.2f}" for share in seen[0].mean(dim=1)))
    print(f"picture: {args.output / 'attention.png'}")


def class_attention(model: PeftModel, pixels: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the class token attends to, over the heads' mean: prompts (L, B) and patches (L, B, rows, columns).

    The attention weights that a prompted model returns have columns for its own tokens only; what a row lacks to a sum
    of one went to the prompts.

    Returns:
        None where the model returns no attention weights or has no class token.
    """
    patch = getattr(model.config, "patch_size", None)
    maps = model(pixel_values=pixels, output_attentions=True).attentions
    if not maps or not isinstance(patch, int):
        return None
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    if maps[0].shape[-1] == rows * columns:
        return None
    weights = torch.stack([layer[:, :, 0].mean(dim=1) for layer in maps])
    return 1 - weights.sum(dim=-1), weights[..., -rows * columns :].unflatten(-1, (rows, columns))


def draw(pictures: list[Image.Image], prompts: Tensor, patches: Tensor, file: Path) -> None:
    """Above, what prompts and patches get in each layer; below, which patches get how much, image by image."""
    import matplotlib.pyplot as plt

    layers = len(prompts)
    figure = plt.figure(figsize=(1.1 * (layers + 1), 2.4 + 1.3 * len(pictures)), layout="constrained")
    grid = figure.add_gridspec(1 + len(pictures), layers + 1, height_ratios=[2.0] + [1.0] * len(pictures))
    bars = figure.add_subplot(grid[0, 1:])
    floor = torch.zeros(layers)
    to_patches, to_prompts = patches.sum(dim=(-2, -1)).mean(dim=1), prompts.mean(dim=1)
    for label, share in {"patches": to_patches, "prompts": to_prompts}.items():
        bars.bar(range(layers), share, bottom=floor, label=label)
        floor = floor + share
    bars.bar(range(layers), 1 - floor, bottom=floor, label="itself", color="lightgrey")
    bars.set(xlim=(-0.5, layers - 0.5), ylim=(0, 1), xticks=range(layers), title="what the class token attends to")
    corner = figure.add_subplot(grid[0, 0])
    corner.axis("off")
    corner.legend(*bars.get_legend_handles_labels(), loc="center", frameon=False)
    for row, picture in enumerate(pictures):
        for column in range(layers + 1):
            panel = figure.add_subplot(grid[1 + row, column])
            panel.set(xticks=[], yticks=[])
            if column == 0:
                panel.imshow(picture)
                continue
            panel.imshow(patches[column - 1, row], vmin=0.0)
            panel.set_xlabel(f"{prompts[column - 1, row]:.0%} prompts", fontsize=7)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, local folder or timm/... name (default: packaged DINOv2-S)")
    parser.add_argument("--dataset", help="Hub id, or folder of images in one folder per class (default: CIFAR-10)")
    parser.add_argument("--dataset-config", help="configuration of the data set, where it has several")
    parser.add_argument(
        "--splits",
        nargs=2,
        default=["train", "test"],
        metavar=("TRAIN", "TEST"),
        help="names in --dataset; without the second, images that are left over from the first are the test",
    )
    parser.add_argument("--sizes", nargs=3, type=int, default=[800, 200, 2000], metavar=("TRAIN", "DEV", "TEST"))
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--label-column", default="label")
    parser.add_argument(
        "--image-size", type=int, help="side in pixels (default: the model's own, and 98 for DINOv2-S)"
    )
    parser.add_argument("--prompts", type=int, default=10, help="prompts per layer")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3], help="of several, the best on DEV is chosen")
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pictures", type=int, default=4, help="test images to predict in a fresh process and to draw"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/image_classification"))
    parser.add_argument(
        "--predict", metavar="ADAPTER", help="load this adapter and label --images instead of training"
    )
    parser.add_argument("--images", nargs="+", type=Path, default=[], help="files to label, for --predict")
    parser.add_argument("--labels", nargs="+", default=CIFAR10, help="names of the classes, for --predict")
    args = parser.parse_args()
    if args.predict and not args.images:
        parser.error("--predict needs --images")
    if args.model is None and args.predict is None:
        args.model = assets.dinov2_small()
        args.image_size = args.image_size or DINOV2_SIZE
    args.image_size = [args.image_size] * 2 if args.image_size else None
    return args


if __name__ == "__main__":
    arguments = parse_args()
    predict(arguments) if arguments.predict else fine_tune(arguments)
