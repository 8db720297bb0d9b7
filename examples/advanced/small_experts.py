# SPDX-License-Identifier: Apache-2.0
"""Two small vision transformers of different width and task, trained here on real images, to be experts of pMoE.

    python examples/advanced/small_experts.py    # trains both, some minutes each on one core, and says what they know

`digits` is 96 wide and has learned to read handwritten digits on plates in photos. `photos` is 144 wide and
has learned CIFAR-10's ten classes. Neither is a published model: they are small, and trained for minutes. No image
that they were trained on is in `digits_on_photos.splits()`.
"""

import random
from collections.abc import Callable

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm

import assets
import digits_on_photos
from digits_on_photos import numerals, paste, photos

SIZE, PATCH = 56, 7  # pixels
HELD_OUT = 500
Data = tuple[Tensor, Tensor]  # bytes (N, 3, SIZE, SIZE) and labels (N,)


def digits_expert() -> str:
    """Folder of the expert that reads digits; trained by the first call. timm loads it as `local-dir:FOLDER`."""
    return _trained("digits", digit_images, width=96, depth=4, heads=3, epochs=20)


def photos_expert() -> str:
    """Folder of the expert that tells photos apart; trained by the first call. timm loads it as `local-dir:FOLDER`."""
    return _trained("photos", photo_images, width=144, depth=6, heads=4, epochs=8)


def digit_images() -> Data:
    """Every digit of the experts' on four of their photos, with its label."""
    rng = random.Random(0)
    backgrounds, rows = photos("experts"), numerals("experts")
    pictures, labels = [], []
    for number, row in enumerate(list(rows) * 4):
        pictures.append(paste(backgrounds[number % len(backgrounds)]["image"], row["image"], rng))
        labels.append(row["label"])
    return _pixels(pictures), torch.tensor(labels)


def photo_images() -> Data:
    """The experts' photos, with their labels."""
    rows = photos("experts")
    return _pixels([row["image"].convert("RGB") for row in rows]), torch.tensor(rows["label"])


def _pixels(pictures: list) -> Tensor:
    return torch.stack([pil_to_tensor(picture.resize((SIZE, SIZE))) for picture in pictures])


def new_model(width: int, depth: int, heads: int) -> nn.Module:
    """An untrained timm vision transformer with ten classes."""
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, **_sizes(width, depth, heads))


def _sizes(width: int, depth: int, heads: int) -> dict[str, int]:
    return {"img_size": SIZE, "patch_size": PATCH, "embed_dim": width, "depth": depth, "num_heads": heads}


def _trained(name: str, data: Callable[[], Data], width: int, depth: int, heads: int, epochs: int) -> str:
    folder = assets.cache_dir() / f"expert-{name}"
    if not folder.is_dir():
        print(f"training the expert {name!r} (once, some minutes) ...", flush=True)
        torch.manual_seed(0)
        model = new_model(width, depth, heads)
        pixels, labels = data()
        order = torch.randperm(len(labels))
        kept, held_out = order[HELD_OUT:], order[:HELD_OUT]
        fit(model, (pixels[kept], labels[kept]), epochs)
        print(f"  right on {HELD_OUT} images held out: {accuracy(model, (pixels[held_out], labels[held_out])):.3f}")
        # What timm makes of the folder: how to build the model, and how to prepare its images.
        half = (0.5, 0.5, 0.5)
        model.pretrained_cfg |= {"input_size": (3, SIZE, SIZE), "mean": half, "std": half, "crop_pct": 1.0}
        with assets.filling(folder) as partial:
            save_for_hf(model, partial, model_args=_sizes(width, depth, heads), safe_serialization=True)
    return str(folder)


def fit(model: nn.Module, data: Data, epochs: int, batch_size: int = 64, lr: float = 1e-3) -> None:
    """Train all of `model`."""
    pixels, labels = data
    steps = epochs * len(labels) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    order: list[int] = []
    model.train()
    for _ in tqdm(range(steps), mininterval=5.0):
        if len(order) < batch_size:
            order = torch.randperm(len(labels)).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(normalized(pixels[chosen]))
        loss = nn.functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def normalized(pixels: Tensor) -> Tensor:
    """Bytes to numbers from -1 to 1."""
    return pixels.float() / 127.5 - 1.0


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    model.eval()
    pixels, labels = data
    return (model(normalized(pixels)).argmax(-1) == labels).double().mean().item()


if __name__ == "__main__":
    print(f"animals are {', '.join(digits_on_photos.ANIMALS)}; experts are in\n{digits_expert()}\n{photos_expert()}")
