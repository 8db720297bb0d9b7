# SPDX-License-Identifier: Apache-2.0
"""Images that ask for two kinds of knowledge: a plate with a digit, 0 to 4, on a photo of an animal or of a vehicle.

A class is the digit and the kind of the photo, "3 on an animal" and so on, ten classes in all. Photos are CIFAR-10's
and digits MNIST's; no photo and no digit is in two of the splits, nor among those that `small_experts.py` trains on.
"""

import random
from collections.abc import Iterable

import datasets
from PIL import Image

import assets

CANVAS = 98  # pixels: DINOv2's grid of 7 x 7 patches
DIGIT = 42  # pixels of a digit's side
JITTER = 14  # pixels by which it may be further in
DIGITS = 5  # kinds of digits
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
CLASSES = [f"{digit} on {kind}" for digit in range(DIGITS) for kind in ("a vehicle", "an animal")]
# What becomes of the shuffled photos and digits: the first are the task's, split by split, the rest the experts'.
PHOTOS = {"train": 800, "dev": 200, "test": 2000}
NUMERALS = {"train": 1000, "dev": 250, "test": 1250}


def photos(split: str) -> datasets.Dataset:
    """CIFAR-10 images, columns `image` and `label`, of a split or "experts"."""
    return _part(assets.cifar10(train=0, dev=0)["test"], PHOTOS, split)


def numerals(split: str) -> datasets.Dataset:
    """MNIST images, columns `image` and `label`, of a split or "experts"."""
    return _part(assets.mnist(train=0, dev=0)["test"], NUMERALS, split)


def _part(images: datasets.Dataset, sizes: dict[str, int], split: str) -> datasets.Dataset:
    start = 0
    for name, size in sizes.items():
        if name == split:
            return images.select(range(start, start + size))
        start += size
    return images.select(range(start, len(images)))


def paste(photo: Image.Image, digit: Image.Image, rng: random.Random) -> Image.Image:
    """The photo, as large as the canvas, with the digit on a plate near its lower right corner."""
    picture = photo.convert("RGB").resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    stroke = digit.resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)
    corner = tuple(CANVAS - DIGIT - rng.randrange(JITTER + 1) for _ in range(2))
    picture.paste(stroke.convert("RGB"), corner)
    return picture


def compose(backgrounds: Iterable[dict], digits: datasets.Dataset, kinds: list[str], seed: int) -> list[dict]:
    """Rows of `pixel_values`, a picture, and `label`: every photo once, each with a digit drawn at random.

    Args:
        backgrounds: rows of `image` and `label`.
        digits: as `numerals` gives them; those beyond the task's kinds are left out.
        kinds: names of the photos' labels.
        seed: of which digit goes where.
    """
    rng = random.Random(seed)
    chosen = [row for row in digits if row["label"] < DIGITS]
    rows = []
    for row in backgrounds:
        digit = rng.choice(chosen)
        label = 2 * digit["label"] + (kinds[row["label"]] in ANIMALS)
        rows.append({"pixel_values": paste(row["image"], digit["image"], rng), "label": label})
    return rows


def splits(train: int | None = None, dev: int | None = None, test: int | None = None) -> datasets.DatasetDict:
    """Splits `train`, `dev` and `test` with the columns `pixel_values`, a picture, and `label`; all rows for None."""
    folder = assets.cache_dir() / "digits-on-photos"
    if not folder.is_dir():
        features = datasets.Features({"pixel_values": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
        made = datasets.DatasetDict()
        for seed, split in enumerate(PHOTOS):
            backgrounds = photos(split)
            rows = compose(backgrounds, numerals(split), backgrounds.features["label"].names, seed)
            made[split] = datasets.Dataset.from_list(rows, features=features)
        with assets.filling(folder) as partial:
            made.save_to_disk(partial)
    sizes = {"train": train, "dev": dev, "test": test}
    found = datasets.load_from_disk(folder)
    return datasets.DatasetDict({name: assets.first(found[name], size) for name, size in sizes.items()})
