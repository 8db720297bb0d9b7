# SPDX-License-Identifier: Apache-2.0
"""Finds examples in the folders of the usual flow and depth benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from .data import Example, Read
from .formats import Array, flow_of_disparity, read_dpt, read_flo, read_grey, read_kitti_flow, read_pfm, read_png16

SHRUNK = {555: 2, 370: 3}  # by how much Middlebury's stereo pairs of so many rows are smaller than the full ones


def _files(root: Path, *patterns: str) -> list[Path]:
    """Files in a folder, sorted, without those that an operating system hides or puts beside others (`._name`)."""
    found = [file for pattern in patterns for file in root.glob(pattern)]
    parts = {file: file.relative_to(root).parts for file in found}
    return sorted(file for file in found if not any(part.startswith((".", "__MACOSX")) for part in parts[file]))


def middlebury_flow(root: Path) -> Iterator[Example]:
    """`other-data/<scene>/frame10.png, frame11.png`, `other-gt-flow/<scene>/flow10.flo`."""
    for file in _files(root / "other-gt-flow", "*/flow10.flo"):
        folder = root / "other-data" / file.parent.name
        yield Example(
            f"middlebury {file.parent.name}",
            folder / "frame10.png",
            folder / "frame11.png",
            flow=partial(read_flo, file),
        )


def sintel(root: Path, pass_name: str | None = None) -> Iterator[Example]:
    """`training/<clean|final>/<scene>/frame_0001.png`, `training/flow/...flo`, `depth/...dpt`, `occlusions/...png`.

    Args:
        root: folder into which Sintel's archives (flow, depth or both) were unpacked.
        pass_name: rendering pass, "clean" or "final". None: "clean" if it is there.
    """
    training = root / "training"
    if pass_name is None:
        pass_name = "clean" if (training / "clean").is_dir() else "final"
    for frame in _files(training / pass_name, "*/frame_[0-9][0-9][0-9][0-9].png"):
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
    """`training/<image_2|colored_0|image_0>/000000_10.png, 000000_11.png`, `training/flow_<occ|noc>/000000_10.png`.

    Args:
        root: folder of KITTI 2015 or 2012.
        occluded: whether to include the flow of points that are hidden in the second frame.
    """
    training = root / "training"
    names = ("image_2", "colored_0", "image_0")
    images = next((training / name for name in names if (training / name).is_dir()), training / names[0])
    for file in _files(training / ("flow_occ" if occluded else "flow_noc"), "*_10.png"):
        frames = images / file.name, images / file.name.replace("_10.png", "_11.png")
        yield Example(f"kitti {file.stem}", *frames, flow=partial(read_kitti_flow, file))


def kitti_stereo(root: Path) -> Iterator[Example]:
    """`training/image_2, image_3, disp_occ_0/000000_10.png` (2015), or `colored_0, colored_1, disp_occ` (2012).

    The disparity is read as flow from the left to the right view.
    """
    training = root / "training"
    for labels, left, right in (("disp_occ_0", "image_2", "image_3"), ("disp_occ", "colored_0", "colored_1")):
        for file in _files(training / labels, "*_10.png"):
            frames = training / left / file.name, training / right / file.name
            yield Example(f"kitti stereo {file.stem}", *frames, flow=partial(_stereo, partial(read_png16, file, 256)))


def kitti_depth(root: Path) -> Iterator[Example]:
    """KITTI's depth selection: `val_selection_cropped/image/*.png` with `groundtruth_depth/*.png`, in metres."""
    found = _files(root, "**/val_selection_cropped/groundtruth_depth/*.png")
    for file in found or _files(root / "groundtruth_depth", "*.png"):
        frame = file.parent.parent / "image" / file.name.replace("groundtruth_depth", "image")
        yield Example(f"kitti depth {file.stem}", frame, depth=partial(read_png16, file, 256))


def nyu_depth(root: Path) -> Iterator[Example]:
    """`<any folders>/rgb_00045.jpg` with `sync_depth_00045.png` beside it, or `images/*.jpg` with `annotations/*.png`.

    Depth is in metres. The 16-bit files hold millimetres.
    """
    for file in _files(root, "**/sync_depth_*.png"):
        frame = file.with_name(file.name.replace("sync_depth_", "rgb_")).with_suffix(".jpg")
        yield Example(f"nyu {file.parent.name} {file.stem}", frame, depth=partial(read_png16, file, 1000))
    for file in _files(root / "annotations", "**/*.png"):
        frame = (root / "images" / file.relative_to(root / "annotations")).with_suffix(".jpg")
        yield Example(f"nyu {file.stem}", frame, depth=partial(read_png16, file, 1000))


def flying_chairs(root: Path) -> Iterator[Example]:
    """`data/00001_img1.ppm, 00001_img2.ppm, 00001_flow.flo`, with or without the folder `data`."""
    for file in _files(root, "data/*_flow.flo", "*_flow.flo"):
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
        for file in _files(root, f"*/{name}", name):
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
