# SPDX-License-Identifier: Apache-2.0
"""Data sets for the Trainer, read from the folders of the usual flow and depth benchmarks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .formats import (
    Array,
    flow_of_disparity,
    load,
    read_dpt,
    read_flo,
    read_grey,
    read_kitti_flow,
    read_pfm,
    read_png16,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SHRUNK = {555: 2, 370: 3}  # by how much Middlebury's stereo pairs of so many rows are smaller than the full ones
Size = tuple[int, int]
Read = Callable[[], Array]


@dataclass(frozen=True)
class Example:
    """Files of one example, and functions that read its labels.

    Attributes:
        name: name for tables and pictures.
        frame: file of the image, or of the first of two frames.
        next_frame: file of the second frame.
        flow: function that returns the flow, (2, rows, columns) in pixels, NaN where unknown.
        depth: function that returns the depth, (rows, columns), NaN where unknown.
        occluded: file of a mask. It is not zero where the point is hidden in the second frame.
    """

    name: str
    frame: Path
    next_frame: Path | None = None
    flow: Read | None = None
    depth: Read | None = None
    occluded: Path | None = None


def prepare(image: Image.Image | np.ndarray[Any, Any], size: Size | None, mean: Any, std: Any) -> Tensor:
    """Normalised pixels of an image, (3, rows, columns), resized to `size` with antialiasing."""
    values = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    pixels = torch.from_numpy(np.array(values)).permute(2, 0, 1).float() / 255
    if size is not None and tuple(pixels.shape[-2:]) != tuple(size):
        pixels = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (pixels - mean) / std


class MotionDataset(Dataset[dict[str, Tensor]]):
    """Data set of frames with flow or depth, for [`FlowModel`], [`DepthModel`] and [`MotionModel`].

    An item is a dict with `pixel_values` and, if the example has them, `next_pixel_values`, `flow_labels`,
    `depth_labels` and `occluded`.

    Labels keep their own size, even if the frames are resized: the models predict at the size of the labels. Labels of
    different sizes do not fit into one batch: then use a batch size of 1.

    Args:
        examples: examples, for instance from [`find_examples`].
        size: (rows, columns) in pixels to resize the frames to. None: their own size.
        mean: mean of each channel, as in the backbone's processor.
        std: standard deviation of each channel, as in the backbone's processor.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        size: Size | None = None,
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
    ) -> None:
        self.examples = list(examples)
        self.size, self.mean, self.std = size, mean, std

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = self.examples[operator.index(index)]
        item = {"pixel_values": self._frame(example.frame)}
        if example.next_frame is not None:
            item["next_pixel_values"] = self._frame(example.next_frame)
        if example.flow is not None:
            item["flow_labels"] = torch.from_numpy(example.flow())
        if example.depth is not None:
            item["depth_labels"] = torch.from_numpy(example.depth())
        if example.occluded is not None:
            with Image.open(example.occluded) as mask:
                load(mask, example.occluded)
                item["occluded"] = torch.from_numpy(np.asarray(mask.convert("L")) > 0)
        return item

    def _frame(self, file: Path) -> Tensor:
        with Image.open(file) as image:
            load(image, file)
            return prepare(image, self.size, self.mean, self.std)


class TorchvisionPairs(Dataset[dict[str, Tensor]]):
    """Data set around one of torchvision's optical flow sets (`FlyingThings3D`, `HD1K`, ...).

    Args:
        dataset: data set with items (image, next image, flow) or (image, next image, flow, valid).
        size: (rows, columns) in pixels to resize the frames to. None: their own size.
        mean: mean of each channel, as in the backbone's processor.
        std: standard deviation of each channel, as in the backbone's processor.
    """

    def __init__(
        self,
        dataset: Any,
        size: Size | None = None,
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
    ) -> None:
        self.dataset, self.size, self.mean, self.std = dataset, size, mean, std

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        frame, next_frame, flow, *valid = self.dataset[index]
        if flow is None:
            raise ValueError("This split has no flow labels. Use split='train'.")
        labels = torch.as_tensor(flow).float()
        if valid and valid[0] is not None:
            labels = labels.where(torch.as_tensor(valid[0]).bool(), torch.nan)
        frames = (prepare(image, self.size, self.mean, self.std) for image in (frame, next_frame))
        return {**dict(zip(("pixel_values", "next_pixel_values"), frames, strict=True)), "flow_labels": labels}


# -- folders ----------------------------------------------------------------------------------------------------------


def middlebury_flow(root: Path) -> Iterator[Example]:
    """`other-data/<scene>/frame10.png, frame11.png`, `other-gt-flow/<scene>/flow10.flo`."""
    for file in sorted((root / "other-gt-flow").glob("*/flow10.flo")):
        folder = root / "other-data" / file.parent.name
        yield Example(
            f"middlebury {file.parent.name}",
            folder / "frame10.png",
            folder / "frame11.png",
            flow=partial(read_flo, file),
        )


def sintel(root: Path, pass_name: str = "clean") -> Iterator[Example]:
    """`training/<clean|final>/<scene>/frame_0001.png`, `training/flow/...flo`, `depth/...dpt`, `occlusions/...png`.

    Args:
        root: folder into which Sintel's archives (flow, depth or both) were unpacked.
        pass_name: rendering pass, "clean" or "final".
    """
    training = root / "training"
    for frame in sorted((training / pass_name).glob("*/frame_[0-9][0-9][0-9][0-9].png")):
        scene, number = frame.parent.name, int(frame.stem.removeprefix("frame_"))
        flow, depth = training / "flow" / scene / f"{frame.stem}.flo", training / "depth" / scene / f"{frame.stem}.dpt"
        hidden = training / "occlusions" / scene / frame.name
        if not flow.exists() and not depth.exists():
            continue  # the last frame of a scene has no flow
        yield Example(
            f"sintel {pass_name} {scene} {number}",
            frame,
            frame.with_name(f"frame_{number + 1:04d}.png") if flow.exists() else None,
            flow=partial(read_flo, flow) if flow.exists() else None,
            depth=partial(read_dpt, depth) if depth.exists() else None,
            occluded=hidden if hidden.exists() else None,
        )


def kitti_flow(root: Path, occluded: bool = True) -> Iterator[Example]:
    """`training/<image_2|colored_0>/000000_10.png, 000000_11.png`, `training/<flow_occ|flow_noc>/000000_10.png`.

    Args:
        root: folder of KITTI 2015 or 2012.
        occluded: whether to include the flow of points that are hidden in the second frame.
    """
    training = root / "training"
    images = next((training / name for name in ("image_2", "colored_0") if (training / name).is_dir()), training)
    for file in sorted((training / ("flow_occ" if occluded else "flow_noc")).glob("*_10.png")):
        frames = images / file.name, images / file.name.replace("_10.png", "_11.png")
        yield Example(f"kitti {file.stem}", *frames, flow=partial(read_kitti_flow, file))


def kitti_stereo(root: Path) -> Iterator[Example]:
    """`training/image_2, image_3, disp_occ_0/000000_10.png` of KITTI 2015, as flow from the left to the right view."""
    training = root / "training"
    for file in sorted((training / "disp_occ_0").glob("*_10.png")):
        frames = training / "image_2" / file.name, training / "image_3" / file.name
        yield Example(f"kitti stereo {file.stem}", *frames, flow=partial(_stereo, partial(read_png16, file, 256)))


def kitti_depth(root: Path) -> Iterator[Example]:
    """KITTI's depth selection: `val_selection_cropped/image/*.png` with `groundtruth_depth/*.png`, in metres."""
    found = sorted(root.glob("**/val_selection_cropped/groundtruth_depth/*.png"))
    for file in found or sorted((root / "groundtruth_depth").glob("*.png")):
        frame = file.parent.parent / "image" / file.name.replace("groundtruth_depth", "image")
        yield Example(f"kitti depth {file.stem}", frame, depth=partial(read_png16, file, 256))


def nyu_depth(root: Path) -> Iterator[Example]:
    """`<any folders>/rgb_00045.jpg` with `sync_depth_00045.png` beside it, or `images/*.jpg` with `annotations/*.png`.

    Depth is in metres. The 16-bit files hold millimetres.
    """
    for file in sorted(root.glob("**/sync_depth_*.png")):
        frame = file.with_name(file.name.replace("sync_depth_", "rgb_")).with_suffix(".jpg")
        yield Example(f"nyu {file.parent.name} {file.stem}", frame, depth=partial(read_png16, file, 1000))
    for file in sorted((root / "annotations").glob("**/*.png")):
        frame = (root / "images" / file.relative_to(root / "annotations")).with_suffix(".jpg")
        yield Example(f"nyu {file.stem}", frame, depth=partial(read_png16, file, 1000))


def flying_chairs(root: Path) -> Iterator[Example]:
    """`data/00001_img1.ppm, 00001_img2.ppm, 00001_flow.flo`, with or without the folder `data`."""
    for file in sorted([*root.glob("data/*_flow.flo"), *root.glob("*_flow.flo")]):
        number = file.name.removesuffix("_flow.flo")
        frames = file.with_name(f"{number}_img1.ppm"), file.with_name(f"{number}_img2.ppm")
        yield Example(f"chairs {number}", *frames, flow=partial(read_flo, file))


def middlebury_stereo(root: Path) -> Iterator[Example]:
    """`<scene>/im0.png, im1.png, disp0.pfm` (2014) and `<scene>/view1.png, view5.png, disp1.png` (2005 and 2006)."""
    kinds: list[tuple[str, str, str, Callable[[Path], Array]]] = [
        ("disp0.pfm", "im0.png", "im1.png", read_pfm),
        ("disp1.png", "view1.png", "view5.png", _read_2006),
    ]
    for name, left, right, read in kinds:
        for file in sorted([*root.glob(f"*/{name}"), *root.glob(name)]):
            frames = file.with_name(left), file.with_name(right)
            yield Example(f"middlebury {file.parent.name}", *frames, flow=partial(_stereo, partial(read, file)))


def _read_2006(file: Path) -> Array:
    """Disparity of Middlebury's sets of 2005 and 2006 in pixels of the file's own size.

    The sets come in three sizes, all with the grey values of the full one, whose images have 1110 rows.
    """
    values = read_grey(file)
    return values / np.float32(SHRUNK.get(values.shape[0], 1))


def _stereo(disparity: Read) -> Array:
    return flow_of_disparity(disparity())


LAYOUTS = (
    middlebury_flow,
    sintel,
    kitti_flow,
    kitti_stereo,
    kitti_depth,
    nyu_depth,
    flying_chairs,
    middlebury_stereo,
)


def find_examples(root: str | Path) -> list[Example]:
    """Find all examples in a folder that has one of the layouts above.

    Raises:
        FileNotFoundError: the folder has none of these layouts, or the frame of a label is missing.
    """
    root = Path(root)
    found = [example for layout in LAYOUTS for example in layout(root)]
    if not found:
        kinds = "\n".join(f"  {(layout.__doc__ or '').splitlines()[0]}" for layout in LAYOUTS)
        raise FileNotFoundError(f"{root} has none of the folder layouts that can be read:\n{kinds}")
    for example in found:
        for frame in (example.frame, example.next_frame):
            if frame is not None and not frame.exists():
                raise FileNotFoundError(f"The frame {frame} of {example.name} is missing.")
    return found
