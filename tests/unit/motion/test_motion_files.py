# SPDX-License-Identifier: Apache-2.0
"""Readers of flow, disparity and depth, the folders of known data sets, and pictures."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from peft_promptmoe.motion import (
    Example,
    MotionDataset,
    TorchvisionPairs,
    depth_picture,
    error_picture,
    find_examples,
    flow_legend,
    flow_picture,
)
from peft_promptmoe.motion.folders import LAYOUTS, flying_chairs, kitti_flow, middlebury_stereo, sintel
from peft_promptmoe.motion.formats import (
    TAG,
    flow_of_disparity,
    read_dpt,
    read_flo,
    read_grey,
    read_kitti_flow,
    read_pfm,
    read_png16,
    write_flo,
)

ROWS, COLUMNS = 6, 9
FLOW = np.random.default_rng(0).normal(0, 5, (2, ROWS, COLUMNS)).astype(np.float32)
DEPTH = np.random.default_rng(1).uniform(1, 30, (ROWS, COLUMNS)).astype(np.float32)


def png16(values: np.ndarray[Any, Any], file: Path) -> None:
    """(rows, columns) or (rows, columns, 3) of uint16 as png; Pillow writes no 16-bit colours."""
    import struct
    import zlib

    rows, columns = values.shape[:2]
    kind = 2 if values.ndim == 3 else 0
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", columns, rows, 16, kind, 0, 0, 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )


def kitti_png(flow: np.ndarray[Any, Any], known: np.ndarray[Any, Any], file: Path) -> None:
    values = np.stack([flow[0] * 64 + 2**15, flow[1] * 64 + 2**15, known], axis=-1)
    png16(values.round().astype(np.uint16), file)


def pfm(values: np.ndarray[Any, Any], file: Path, order: str = "<") -> None:
    """(rows, columns) or (rows, columns, 3)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    head = (
        f"{'PF' if values.ndim == 3 else 'Pf'}\n{values.shape[1]} {values.shape[0]}\n{-1.0 if order == '<' else 1.0}\n"
    )
    file.write_bytes(head.encode() + values[::-1].astype(f"{order}f4").tobytes())


def dpt(values: np.ndarray[Any, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    size = np.array([values.shape[1], values.shape[0]], "<i4")
    file.write_bytes(TAG.tobytes() + size.tobytes() + values.astype("<f4").tobytes())


def image(file: Path, value: int = 128) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((ROWS, COLUMNS, 3), value, np.uint8)).save(file)


# -- formats ----------------------------------------------------------------------------------------------------------


def test_flo_by_its_bytes(tmp_path: Path) -> None:
    """Tag, columns, rows, then x and y of each pixel, row by row."""
    content = TAG.tobytes() + np.array([2, 1], "<i4").tobytes() + np.array([1, 2, 3, 1e10], "<f4").tobytes()
    (tmp_path / "a.flo").write_bytes(content)
    flow = read_flo(tmp_path / "a.flo")
    assert flow.shape == (2, 1, 2) and flow.dtype == np.float32
    assert flow[:, 0, 0].tolist() == [1, 2] and np.isnan(flow[:, 0, 1]).all()


def test_flo_is_read_as_it_was_written(tmp_path: Path) -> None:
    flow = FLOW.copy()
    flow[:, 2, 3] = np.nan
    write_flo(tmp_path / "a.flo", flow)
    assert np.array_equal(read_flo(tmp_path / "a.flo"), flow, equal_nan=True)


@pytest.mark.parametrize("harm", ["tag", "cut", "longer", "size", "huge", "empty"])
def test_a_broken_flo_is_refused(harm: str, tmp_path: Path) -> None:
    file = tmp_path / "a.flo"
    write_flo(file, FLOW)
    good = file.read_bytes()
    huge = good[:4] + np.array([2**31 - 1, 2**31 - 1], "<i4").tobytes() + good[12:]
    broken = {
        "tag": b"PIEG" + good[4:],
        "cut": good[:-4],
        "longer": good + b"\0",
        "size": good[:4] + np.array([-1, ROWS], "<i4").tobytes() + good[12:],
        "huge": huge,
        "empty": b"",
    }
    file.write_bytes(broken[harm])
    with pytest.raises(ValueError, match=r"a\.flo"):
        read_flo(file)


def test_kitti_flow_is_16_bit(tmp_path: Path) -> None:
    known = np.random.default_rng(2).uniform(size=(ROWS, COLUMNS)) > 0.5
    kitti_png(FLOW, known, tmp_path / "a.png")
    flow = read_kitti_flow(tmp_path / "a.png")
    assert np.isnan(flow[:, ~known]).all()
    assert np.abs(flow - FLOW)[:, known].max() <= 0.5 / 64 + 1e-6
    image(tmp_path / "b.png")
    with pytest.raises(ValueError, match="16-bit png"):
        read_kitti_flow(tmp_path / "b.png")


@pytest.mark.parametrize("order", ["<", ">"])
def test_pfm_in_both_orders_of_bytes(order: str, tmp_path: Path) -> None:
    values = DEPTH.copy()
    values[1, 2] = np.inf
    pfm(values, tmp_path / "a.pfm", order)
    expected = np.where(np.isinf(values), np.nan, values)
    assert np.array_equal(read_pfm(tmp_path / "a.pfm"), expected, equal_nan=True)
    colours = np.stack([DEPTH, 2 * DEPTH, 3 * DEPTH], axis=-1)
    pfm(colours, tmp_path / "b.pfm", order)
    assert np.array_equal(read_pfm(tmp_path / "b.pfm"), colours.transpose(2, 0, 1))


@pytest.mark.parametrize(
    "content", [b"", b"P5\n2 2\n255\n0000", b"Pf\n2 2\n-1.0\n0000", b"Pf\n99999999 99999999\n-1\n", b"Pf\n0 0\n-1\n"]
)
def test_a_broken_pfm_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pfm").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pfm"):
        read_pfm(tmp_path / "a.pfm")


@pytest.mark.parametrize("scale", ["-1", "-1.", "-.5", "-0.003922", "-1e-2"])
def test_pfm_with_scales_of_any_form(scale: str, tmp_path: Path) -> None:
    (tmp_path / "a.pfm").write_bytes(f"Pf\n1 1\n{scale}\n".encode() + np.array([7], "<f4").tobytes())
    assert read_pfm(tmp_path / "a.pfm").tolist() == [[7.0]]  # Middlebury's values are not to be scaled


def test_pictures_that_are_cut_are_named(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(1, 255, (64, 64, 3))
    png16(values.astype(np.uint16), tmp_path / "flow.png")
    png16(values[..., 0].astype(np.uint16), tmp_path / "depth.png")
    Image.fromarray(values[..., 0].astype(np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "frame.jpg")
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    example = Example("cut", tmp_path / "frame.jpg")
    reads: dict[str, Any] = {
        "flow.png": lambda: read_kitti_flow(tmp_path / "flow.png"),
        "depth.png": lambda: read_png16(tmp_path / "depth.png", 256),
        "grey.png": lambda: read_grey(tmp_path / "grey.png"),
        "frame.jpg": lambda: MotionDataset([example])[0],
    }
    for name, read in reads.items():
        with pytest.raises(ValueError, match=rf"{name} is not complete or damaged"):
            read()


def test_flow_of_another_shape_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x first"):
        write_flo(tmp_path / "a.flo", np.zeros((4, 4, 2)))


def test_16_bit_depth(tmp_path: Path) -> None:
    png16((DEPTH * 256).round().astype(np.uint16), tmp_path / "a.png")
    assert np.abs(read_png16(tmp_path / "a.png", 256) - DEPTH).max() <= 0.5 / 256 + 1e-6
    values = np.array([[0, 1000]], np.uint16)
    png16(values, tmp_path / "b.png")
    found = read_png16(tmp_path / "b.png", 1000)
    assert np.isnan(found[0, 0]) and found[0, 1] == 1.0
    for scale in (0, -256, np.nan, np.inf):
        with pytest.raises(ValueError, match="scale must be a positive number"):
            read_png16(tmp_path / "b.png", scale)
    image(tmp_path / "c.png")
    with pytest.raises(ValueError, match="16-bit png"):
        read_png16(tmp_path / "c.png", 256)


def test_other_depths_and_disparity_as_flow(tmp_path: Path) -> None:
    dpt(DEPTH, tmp_path / "a.dpt")
    assert np.array_equal(read_dpt(tmp_path / "a.dpt"), DEPTH)
    Image.fromarray(np.array([[0, 7]], np.uint8)).save(tmp_path / "a.png")
    disparity = read_grey(tmp_path / "a.png")
    flow = flow_of_disparity(disparity)
    assert np.isnan(flow[:, 0, 0]).all() and flow[:, 0, 1].tolist() == [-7, 0]


# -- folders ----------------------------------------------------------------------------------------------------------


def middlebury(root: Path) -> None:
    for name in ("frame10.png", "frame11.png"):
        image(root / "other-data" / "RubberWhale" / name)
    (root / "other-gt-flow" / "RubberWhale").mkdir(parents=True)
    write_flo(root / "other-gt-flow" / "RubberWhale" / "flow10.flo", FLOW)


def mpi_sintel(root: Path) -> None:
    for number in (1, 2, 3):
        image(root / "training" / "clean" / "alley_1" / f"frame_{number:04d}.png", value=10 * number)
    for number in (1, 2):
        (root / "training" / "flow" / "alley_1").mkdir(parents=True, exist_ok=True)
        write_flo(root / "training" / "flow" / "alley_1" / f"frame_{number:04d}.flo", FLOW)
        image(root / "training" / "occlusions" / "alley_1" / f"frame_{number:04d}.png", value=255)
    dpt(DEPTH, root / "training" / "depth" / "alley_1" / "frame_0002.dpt")


def kitti_2015(root: Path) -> None:
    for name in ("image_2/000000_10.png", "image_2/000000_11.png", "image_3/000000_10.png"):
        image(root / "training" / name)
    kitti_png(FLOW, np.ones((ROWS, COLUMNS)), root / "training" / "flow_occ" / "000000_10.png")
    kitti_png(FLOW, np.zeros((ROWS, COLUMNS)), root / "training" / "flow_noc" / "000000_10.png")
    png16((DEPTH * 256).astype(np.uint16), root / "training" / "disp_occ_0" / "000000_10.png")


def kitti_2012(root: Path) -> None:
    for name in ("colored_0/000000_10.png", "colored_0/000000_11.png", "colored_1/000000_10.png"):
        image(root / "training" / name)
    kitti_png(FLOW, np.ones((ROWS, COLUMNS)), root / "training" / "flow_occ" / "000000_10.png")
    png16((DEPTH * 256).astype(np.uint16), root / "training" / "disp_occ" / "000000_10.png")


def kitti_selection(root: Path) -> None:
    folder = root / "depth_selection" / "val_selection_cropped"
    name = "2011_09_26_drive_0002_sync_{}_0000000005_image_02.png"
    image(folder / "image" / name.format("image"))
    png16((DEPTH * 256).astype(np.uint16), folder / "groundtruth_depth" / name.format("groundtruth_depth"))


def nyu(root: Path) -> None:
    image(root / "test" / "bathroom" / "rgb_00045.jpg")
    png16((DEPTH * 1000).astype(np.uint16), root / "test" / "bathroom" / "sync_depth_00045.png")
    image(root / "images" / "bookstore_1.jpg")
    png16((DEPTH * 1000).astype(np.uint16), root / "annotations" / "bookstore_1.png")


def chairs(root: Path) -> None:
    for number in (1, 2):
        for frame in (1, 2):
            image(root / "data" / f"0000{number}_img{frame}.ppm")
        write_flo(root / "data" / f"0000{number}_flow.flo", FLOW)


def stereo(root: Path) -> None:
    for name in ("Adirondack/im0.png", "Adirondack/im1.png", "Aloe/view1.png", "Aloe/view5.png"):
        image(root / name)
    pfm(DEPTH, root / "Adirondack" / "disp0.pfm")
    Image.fromarray(DEPTH.astype(np.uint8)).save(root / "Aloe" / "disp1.png")


FOLDERS: dict[str, tuple[Any, int, set[str]]] = {
    "middlebury": (middlebury, 1, {"flow_labels"}),
    "sintel": (mpi_sintel, 2, {"flow_labels", "depth_labels", "occluded"}),
    "kitti": (kitti_2015, 2, {"flow_labels"}),
    "kitti 2012": (kitti_2012, 2, {"flow_labels"}),
    "kitti depth": (kitti_selection, 1, {"depth_labels"}),
    "nyu": (nyu, 2, {"depth_labels"}),
    "chairs": (chairs, 2, {"flow_labels"}),
    "stereo": (stereo, 2, {"flow_labels"}),
}


@pytest.mark.parametrize("kind", sorted(FOLDERS))
def test_a_folder_of_a_known_layout_is_found_and_read(kind: str, tmp_path: Path) -> None:
    write, count, labels = FOLDERS[kind]
    write(tmp_path)
    examples = find_examples(tmp_path)
    assert len(examples) == count and len({example.name for example in examples}) == count
    data = MotionDataset(examples, size=(28, 42))
    found: set[str] = set()
    for item in data:  # type: ignore[attr-defined]
        found |= set(item)
        assert item["pixel_values"].shape == (3, 28, 42)
        assert ("next_pixel_values" in item) == ("flow_labels" in item)
        for name in set(item) & {"flow_labels", "depth_labels", "occluded"}:
            assert item[name].shape[-2:] == (ROWS, COLUMNS)
    assert labels == found - {"pixel_values", "next_pixel_values"}
    if kind in ("middlebury", "sintel", "chairs"):
        assert np.array_equal(data[0]["flow_labels"].numpy(), FLOW)


def test_every_layout_is_tried() -> None:
    assert len(LAYOUTS) == len({layout.__name__ for layout in LAYOUTS}) == 8


def test_sintels_frames_follow_each_other(tmp_path: Path) -> None:
    mpi_sintel(tmp_path)
    second = list(sintel(tmp_path))[1]
    assert second.frame.name == "frame_0002.png" and second.next_frame is not None
    assert second.next_frame.name == "frame_0003.png" and second.depth is not None
    data = MotionDataset([second], mean=(0, 0, 0), std=(1, 1, 1))
    assert data[0]["pixel_values"].mean() == pytest.approx(20 / 255)
    assert data[0]["next_pixel_values"].mean() == pytest.approx(30 / 255)
    assert data[0]["occluded"].all()


def test_kittis_flow_of_points_that_stay_in_sight(tmp_path: Path) -> None:
    kitti_2015(tmp_path)
    assert np.isfinite(next(kitti_flow(tmp_path)).flow()).all()  # type: ignore[misc]
    assert np.isnan(next(kitti_flow(tmp_path, occluded=False)).flow()).all()  # type: ignore[misc]


@pytest.mark.parametrize(("rows", "shrunk"), [(1110, 1), (555, 2), (370, 3), (ROWS, 1)])
def test_disparity_is_in_pixels_of_the_size_that_it_has(rows: int, shrunk: int, tmp_path: Path) -> None:
    stereo(tmp_path)
    Image.fromarray(np.full((rows, 2), 60, np.uint8)).save(tmp_path / "Aloe" / "disp1.png")
    aloe = next(example for example in middlebury_stereo(tmp_path) if "Aloe" in example.name)
    assert aloe.flow is not None and (aloe.flow()[0] == -60 / shrunk).all()


def test_other_files_beside_sintels_frames_are_passed_over(tmp_path: Path) -> None:
    mpi_sintel(tmp_path)
    image(tmp_path / "training" / "clean" / "alley_1" / "frame_0001 (copy).png")
    assert len(find_examples(tmp_path)) == 2


@pytest.mark.parametrize("kind", sorted(FOLDERS))
def test_what_a_system_puts_beside_files_is_no_example(kind: str, tmp_path: Path) -> None:
    FOLDERS[kind][0](tmp_path)
    names = [example.name for example in find_examples(tmp_path)]
    for file in [file for file in tmp_path.rglob("*") if file.is_file()]:
        for copied in (file.with_name("._" + file.name), tmp_path / "__MACOSX" / file.relative_to(tmp_path)):
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(b"\0\5\x16\7")
    assert [example.name for example in find_examples(tmp_path)] == names


def test_sintels_final_pass_is_read_where_it_is_alone(tmp_path: Path) -> None:
    mpi_sintel(tmp_path)
    final = tmp_path / "training" / "final"
    (tmp_path / "training" / "clean").rename(final)
    assert {example.frame.parent.parent for example in find_examples(tmp_path)} == {final}


WRONG_FRAMES: dict[str, Any] = {
    "16 bits": Image.fromarray(np.full((ROWS, COLUMNS), 1000, np.uint16)),
    "numbers up to one": np.ones((ROWS, COLUMNS, 3), np.float32),
    "channels first": torch.ones(3, ROWS, COLUMNS, dtype=torch.uint8),
    "grey array": np.ones((ROWS, COLUMNS), np.uint8),
}


@pytest.mark.parametrize("case", sorted(WRONG_FRAMES))
def test_frames_that_would_look_otherwise_are_refused(case: str, tmp_path: Path) -> None:
    frame = WRONG_FRAMES[case]
    with pytest.raises(ValueError, match=r"A frame (must be|has the image mode I;16)"):
        TorchvisionPairs([(frame, frame, FLOW)])[0]


def test_a_frame_that_is_refused_is_named(tmp_path: Path) -> None:
    WRONG_FRAMES["16 bits"].save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"The frame .*deep\.png has the image mode I;16"):
        MotionDataset([Example("deep", tmp_path / "deep.png")])[0]


def test_pictures_with_huge_headers_are_refused_by_name(tmp_path: Path) -> None:
    size = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 16, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + size + struct.pack(">I", zlib.crc32(size))
    (tmp_path / "huge.png").write_bytes(header + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", 0x35AF061E))
    reads: list[Any] = [
        read_kitti_flow,
        lambda file: read_png16(file, 256),
        read_grey,
        lambda file: MotionDataset([Example("huge", file)])[0],
        lambda file: MotionDataset([Example("huge", tmp_path / "a.png", occluded=file)])[0],
    ]
    image(tmp_path / "a.png")
    for read in reads:
        with pytest.raises(ValueError, match=r"huge\.png is too large"):
            read(tmp_path / "huge.png")


WRONG_NUMBERS: list[tuple[str, Any]] = [
    *(("size", size) for size in (28, (28,), (0, 28), (28.0, 28.0), "28", (True, True))),
    *(("mean", mean) for mean in (0.5, (0.5,), (0.5,) * 4, (0.5, 0.5, np.nan), "123")),
    *(("std", std) for std in (0.5, (0.5,) * 4, (0.5, 0.5, 0.0), (0.5, 0.5, -0.5))),
]


@pytest.mark.parametrize(("name", "values"), WRONG_NUMBERS)
def test_frames_are_not_resized_or_normalised_by_other_than_numbers(name: str, values: Any) -> None:
    for make in (MotionDataset, TorchvisionPairs):
        with pytest.raises(ValueError, match=f"{name} must be"):
            make([], **{name: values})


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    example = Example("a", tmp_path / "a.png")
    expected = MotionDataset([example], size=(28, 42), std=[0.5, 0.5, 0.5])[0]["pixel_values"]
    for size, std in (((np.int64(28), np.int64(42)), np.full(3, 0.5)), ([28, 42], torch.full((3,), 0.5))):
        found = MotionDataset([example], size=size, std=std)[0]["pixel_values"]  # type: ignore[arg-type]
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_colours_are_no_disparity(tmp_path: Path) -> None:
    coloured = Image.new("P", (2, 1), 1)
    coloured.putpalette([0, 0, 0, 200, 10, 10])
    coloured.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has a palette of colours"):
        read_grey(tmp_path / "a.png")
    coloured.putpalette([0, 0, 0, 7, 7, 7])
    coloured.save(tmp_path / "a.png")
    assert read_grey(tmp_path / "a.png").tolist() == [[7.0, 7.0]]


def test_examples_are_asked_for_one_by_one(tmp_path: Path) -> None:
    chairs(tmp_path)
    data = pickle.loads(pickle.dumps(MotionDataset(find_examples(tmp_path))))  # as workers get it
    assert torch.equal(data[-1]["flow_labels"], data[np.int64(1)]["flow_labels"])
    with pytest.raises(IndexError):
        data[2]
    with pytest.raises(TypeError, match="integer"):
        data[:2]


def test_unknown_folders_and_missing_frames_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="other-gt-flow"):
        find_examples(tmp_path)
    chairs(tmp_path)
    (tmp_path / "data" / "00001_img2.ppm").unlink()
    with pytest.raises(FileNotFoundError, match="00001_img2"):
        find_examples(tmp_path)
    assert next(flying_chairs(tmp_path)).name == "chairs 00001"


def test_torchvisions_sets_are_taken(tmp_path: Path) -> None:
    from torchvision.datasets import KittiFlow

    kitti_2015(tmp_path / "KittiFlow")
    data = TorchvisionPairs(KittiFlow(str(tmp_path)), size=(14, 28))
    item = data[0]
    assert len(data) == 1 and item["pixel_values"].shape == item["next_pixel_values"].shape == (3, 14, 28)
    assert np.abs(item["flow_labels"].numpy() - FLOW).max() <= 0.5 / 64 + 1e-6
    unknown = [(Image.new("RGB", (9, 6)), Image.new("RGB", (9, 6)), FLOW, np.zeros((ROWS, COLUMNS), bool))]
    assert TorchvisionPairs(unknown)[0]["flow_labels"].isnan().all()
    with pytest.raises(ValueError, match="split='train'"):
        TorchvisionPairs([(Image.new("RGB", (9, 6)), Image.new("RGB", (9, 6)), None)])[0]


# -- pictures ---------------------------------------------------------------------------------------------------------


def hue(picture: np.ndarray[Any, Any]) -> float:
    return float(np.asarray(Image.fromarray(picture.reshape(1, 1, 3)).convert("HSV"))[0, 0, 0]) / 256


def test_flow_pictures_show_direction_by_hue_and_length_by_saturation() -> None:
    flow = np.zeros((2, 1, 5), np.float32)
    flow[:, 0, 0], flow[:, 0, 1], flow[:, 0, 2], flow[:, 0, 4] = (4, 0), (-4, 0), (2, 0), np.nan
    picture = flow_picture(flow, max_flow=4.0)
    assert picture.shape == (1, 5, 3) and picture.dtype == np.uint8
    assert abs(hue(picture[0, 0]) - hue(picture[0, 1])) > 0.2  # opposite directions
    assert abs(hue(picture[0, 0]) - hue(picture[0, 2])) < 0.02  # half of the length, the same direction
    assert picture[0, 2].min() > picture[0, 0].min()
    assert picture[0, 3].tolist() == [255] * 3 and picture[0, 4].tolist() == [0] * 3  # none, unknown


def test_flow_pictures_of_one_scale_agree() -> None:
    """The same flow has the same colour whatever else a picture shows, and longer flow that of the longest."""
    alone = flow_picture(np.full((2, 1, 1), 1.0), max_flow=8.0)
    beside = flow_picture(np.array([[[1.0, 50.0]], [[1.0, 0.0]]]), max_flow=8.0)
    assert np.array_equal(alone[0, 0], beside[0, 0])
    assert np.array_equal(beside[0, 1], flow_picture(np.array([[[8.0]], [[0.0]]]), max_flow=8.0)[0, 0])
    assert np.array_equal(flow_picture(torch.zeros(2, 3, 3)), np.full((3, 3, 3), 255))


def test_legend_error_and_depth() -> None:
    legend = flow_legend(33)
    assert legend.shape == (33, 33, 3) and legend[0, 0].tolist() == [255] * 3
    assert np.array_equal(legend[16, 32], flow_picture(np.array([[[1.0]], [[0.0]]]), max_flow=1.0)[0, 0])
    true = np.zeros((2, 1, 3), np.float32)
    true[:, 0, 2] = np.nan
    error = error_picture(np.array([[[0.0, 9.0, 9.0]], [[0.0] * 3]]), true, max_error=3.0).astype(int)
    assert error[0, 1].sum() > error[0, 0].sum() and error[0, 2].sum() == 0
    depth = depth_picture(np.array([[1.0, 10.0, 0.0]]), near=1.0, far=10.0).astype(int)
    assert depth[0, 0].sum() > depth[0, 1].sum() and depth[0, 2].sum() == 0


def test_pictures_refuse_what_would_show_something_else() -> None:
    flow, depth = torch.ones(2, 3, 3, dtype=torch.bfloat16), torch.ones(3, 3)
    assert flow_picture(flow).shape == (3, 3, 3) and error_picture(flow, flow, max_error=0).max() < 10
    assert depth_picture(depth, near=1, far=1).shape == (3, 3, 3)
    for scale in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="max_flow"):
            flow_picture(flow, max_flow=scale)
        with pytest.raises(ValueError, match="max_error"):
            error_picture(flow, flow, max_error=scale)
    for near, far in ((2.0, 1.0), (0.0, 1.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match=r"near=.* and far="):
            depth_picture(depth, near, far)
    with pytest.raises(ValueError, match="true flow"):
        error_picture(flow, flow[:, :1], max_error=1.0)


# -- the package stays light ------------------------------------------------------------------------------------------


def test_the_package_imports_neither_metrics_nor_pictures() -> None:
    code = (
        "import sys, peft_promptmoe.motion as motion\n"
        "loaded = {'evaluate', 'matplotlib', 'peft_promptmoe.motion.metrics'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "sys.modules['evaluate'] = None\n"
        "try:\n"
        "    motion.EndPointError\n"
        "except ModuleNotFoundError as error:\n"
        "    assert 'peft-promptmoe[motion]' in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
