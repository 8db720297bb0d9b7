# SPDX-License-Identifier: Apache-2.0
"""Photos to make moving pairs of, and real stereo pairs with their true disparity, from the package index.

The photos are scikit-image's and those of `mvtb-data` (of Peter Corke's robotics toolbox; pinned and checked as in
`assets.py`). Held-out pairs are made of photos of other scenes. The stereo pairs are scikit-image's motorcycle
(Middlebury 2014) and, where Debian's package opencv-doc is installed, aloe (Middlebury 2006).
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import assets
from peft_promptmoe.motion import Example
from peft_promptmoe.motion.formats import Array, flow_of_disparity, read_grey

MVTB = assets.Archive("mvtb-data", "1.6.1", "0ca9c30e100fa272421068a167ea6529085ff8f4afdca72e5fad681c52cabdbf")
SHORTER_SIDE = 320  # pixels that photos are resized to
SKIMAGE = {
    "train": ["astronaut.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg", "rocket.jpg"],
    "test": ["chelsea.png", "coffee.png"],
}
# No two splits show the same place.
TOOLBOX = {
    "train": [
        *("58060.png", "butterfly.jpg", "castle.png", "church.jpg", "eiffel-1.png", "eiffel-2.png", "image3.jpg"),
        *(f"flowers{number}.png" for number in range(1, 8)),
        *("lab-scene.png", "monalisa.png", "notre-dame.png", "penguins.png", "road.png", "roof.png", "street.png"),
        *("walls-l.png", "campus/*"),
    ],
    "test": ["building2-3.png", "flowers8.png", "flowers9.png", "rocks2-l.png", "campus/holdout/*"],
}
ALOE = Path("/usr/share/doc/opencv-doc/examples/data")
MOTORCYCLE, ALOE_NAME = "motorcycle (Middlebury 2014)", "aloe (Middlebury 2006)"


def photos(split: str) -> list[NDArray[np.float32]]:
    """(H, W, 3) from 0 to 1, the shorter side 320 pixels: those to train on ("train") or held out ("test")."""
    target = assets.cache_dir() / f"photos-{MVTB.version}-{SHORTER_SIDE}"
    if not target.is_dir():
        print("preparing photos (once) ...", flush=True)
        with assets.filling(target) as partial_:
            for name in ("train", "test"):
                _resize_all(_files(name), partial_ / name)
    files = sorted((target / split).glob("*.png"))
    return [np.asarray(Image.open(file), dtype=np.float32) / 255 for file in files]


def _files(split: str) -> list[Path]:
    import skimage.data

    folder = assets.unpacked(MVTB) / "mvtbdata" / "images"
    found = [Path(skimage.data.__file__).parent / name for name in SKIMAGE[split]]
    for pattern in TOOLBOX[split]:
        found += sorted(file for file in folder.glob(pattern) if file.is_file() and file.suffix in (".png", ".jpg"))
    return found


def _resize_all(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, file in enumerate(files):
        with Image.open(file) as image:
            photo = image.convert("RGB")
        scale = SHORTER_SIDE / min(photo.size)
        size = [max(round(length * scale), SHORTER_SIDE) for length in photo.size]
        photo.resize((size[0], size[1]), Image.Resampling.LANCZOS).save(folder / f"{number:02d}-{file.stem}.png")


def real_pairs() -> list[Example]:
    """The stereo pairs at hand: flow is (-disparity, 0), depth is 1 / disparity, in no unit known here."""
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    read = partial(_motorcycle, folder / "motorcycle_disp.npz")
    found = [_stereo(MOTORCYCLE, folder / "motorcycle_left.png", folder / "motorcycle_right.png", read)]
    if (ALOE / "aloeGT.png").exists():
        read = partial(read_grey, ALOE / "aloeGT.png")
        found.append(_stereo(ALOE_NAME, ALOE / "aloeL.jpg", ALOE / "aloeR.jpg", read))
    return found


def _stereo(name: str, left: Path, right: Path, disparity: Any) -> Example:
    return Example(name, left, right, flow=partial(_flow, disparity), depth=partial(_depth, disparity))


def _motorcycle(file: Path) -> Array:
    disparity = np.load(file)["arr_0"].astype(np.float32)
    return np.where(np.isfinite(disparity) & (disparity > 0), disparity, np.float32(np.nan))


def _flow(disparity: Any) -> Array:
    return flow_of_disparity(disparity())


def _depth(disparity: Any) -> Array:
    return (1 / disparity()).astype(np.float32)
