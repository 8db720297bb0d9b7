# SPDX-License-Identifier: Apache-2.0
r"""Dense prediction by several frozen backbones: how far away what a photo shows is, with pMoE and `patch_maps`.

    python examples/advanced/disparity.py    # DINOv2-S and the experts of small_experts.py, some minutes on a CPU
    python examples/advanced/disparity.py --experts facebook/dino-vits16

The photo is the left view of scikit-image's stereo pair of a motorcycle, which comes with its true disparity, measured
by structured light: pixels that a point moves by from one view to the other, the more the nearer. Windows of the
photo's left two thirds are trained on, the rest is the test. So little data teaches no depth in general; what it shows
is that the patch maps of backbones of different size and grid meet on one grid, and that prompts train through them.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from peft import get_peft_model
from skimage.data import stereo_motorcycle
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel

import assets
import small_experts
from peft_promptmoe import PMoEConfig, patch_maps

WINDOW, PATCH = 196, 14  # pixels
GRID = WINDOW // PATCH
SPLIT = 2 / 3  # of the photo's width


class DepthHead(nn.Module):
    """Disparity of every patch, from the patches' features in all backbones.

    Args:
        channels: of the maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, 1, kernel_size=3, padding=1))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, H, W) of (B, channels, H, W)."""
        return self.net(maps)[:, 0]


class Scene:
    """The photo (3, rows, columns), normalised for `model`, and its disparity (rows, columns), mean 0 and spread 1."""

    def __init__(self, model: str) -> None:
        left, _, disparity = stereo_motorcycle()
        processor = AutoImageProcessor.from_pretrained(model)
        mean, std = (torch.tensor(each)[:, None, None] for each in (processor.image_mean, processor.image_std))
        self.photo = (torch.from_numpy(left).permute(2, 0, 1) / 255 - mean) / std
        known = np.isfinite(disparity) & (disparity > 0)  # not known where one view sees nothing
        self.mean, self.spread = float(disparity[known].mean()), float(disparity[known].std())
        self.known = torch.from_numpy(known)
        self.target = torch.from_numpy(np.where(known, (disparity - self.mean) / self.spread, 0.0)).float()
        self.border = round(SPLIT * left.shape[1])

    def windows(self, corners: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (B, 3, WINDOW, WINDOW); mean disparity of each patch and the share of it that is known, (B, H, W)."""
        cut = [(slice(top, top + WINDOW), slice(left, left + WINDOW)) for top, left in corners]
        known = torch.stack([self.known[rows, columns] for rows, columns in cut]).float()
        target = torch.stack([self.target[rows, columns] for rows, columns in cut])
        share = nn.functional.avg_pool2d(known[:, None], PATCH)[:, 0]
        mean = nn.functional.avg_pool2d((target * known)[:, None], PATCH)[:, 0] / share.clamp(min=1e-6)
        return torch.stack([self.photo[:, rows, columns] for rows, columns in cut]), mean, share

    def corner(self, rng: random.Random) -> tuple[int, int]:
        """Of a random window to train on."""
        return rng.randrange(self.photo.shape[1] - WINDOW + 1), rng.randrange(self.border - WINDOW + 1)

    def test_corners(self) -> list[tuple[int, int]]:
        """Of windows side by side that no training window touches."""
        rows, columns = self.photo.shape[1:]
        return [
            (top, left)
            for top in range(0, rows - WINDOW + 1, WINDOW)
            for left in range(self.border, columns - WINDOW + 1, WINDOW)
        ]


def error(found: Tensor, target: Tensor, share: Tensor) -> Tensor:
    """Mean absolute error over what is known, in spreads."""
    return ((found - target).abs() * share).sum() / share.sum()


def train(model: nn.Module, head: nn.Module, scene: Scene, trained: list[nn.Parameter], steps: int, lr: float) -> None:
    rng = random.Random(0)
    optimizer = torch.optim.AdamW([{"params": trained, "lr": lr}, {"params": head.parameters(), "lr": 1e-3}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    head.train()
    for _ in tqdm(range(steps), mininterval=2.0):
        pixels, target, share = scene.windows([scene.corner(rng) for _ in range(4)])
        loss = error(head(patch_maps(model, pixels)), target, share)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def test(model: nn.Module, head: nn.Module, scene: Scene) -> tuple[float, Tensor, Tensor, Tensor]:
    """Error in pixels of disparity, and the photo's windows, what was found and what is true."""
    model.eval()
    head.eval()
    pixels, target, share = scene.windows(scene.test_corners())
    found = head(patch_maps(model, pixels))
    return float(error(found, target, share)) * scene.spread, pixels, found, target.where(share > 0, torch.nan)


def main(args: argparse.Namespace) -> None:
    name = args.model or assets.dinov2_small()
    names = [small_experts.digits_expert(), small_experts.photos_expert()] if args.experts is None else args.experts
    scene = Scene(name)
    for label, chosen in {"base model alone": [], "with its experts": names}.items():
        torch.manual_seed(0)
        model = get_peft_model(AutoModel.from_pretrained(name), PMoEConfig(experts=chosen))
        with torch.no_grad():
            channels = patch_maps(model, scene.windows([(0, 0)])[0]).shape[1]
        head = DepthHead(channels)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        train(model, head, scene, trained, args.steps, args.lr)
        found = test(model, head, scene)
        print(f"{label}: {channels} channels, off by {found[0]:.2f} pixels of disparity")
    print(f"the mean of what was trained on: off by {float(guess(scene)) * scene.spread:.2f}")
    draw(*found[1:], args.output)
    print(f"picture: {args.output}")


def guess(scene: Scene) -> Tensor:
    """Error of whoever knows nothing but the mean disparity of windows to train on."""
    rng = random.Random(0)
    _, seen, weight = scene.windows([scene.corner(rng) for _ in range(64)])
    _, target, share = scene.windows(scene.test_corners())
    return error((seen * weight).sum() / weight.sum(), target, share)


def draw(pixels: Tensor, found: Tensor, target: Tensor, file: Path) -> None:
    """Photo, what was found and what is true, one window in a column."""
    figure = Figure(figsize=(1.6 * len(pixels), 4.8), layout="constrained")
    panels = figure.subplots(3, len(pixels), squeeze=False)
    low, high = pixels.amin(), pixels.amax()
    for column in range(len(pixels)):
        panels[0, column].imshow(((pixels[column] - low) / (high - low)).permute(1, 2, 0))
        for row, values in ((1, found), (2, target)):
            panels[row, column].imshow(values[column], vmin=-2, vmax=2)
    for panel, label in zip(panels[:, 0], ("photo", "found", "true"), strict=True):
        panel.set_ylabel(label)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of an encoder with patches of 14 pixels (default: DINOv2-S)")
    parser.add_argument("--experts", nargs="+", help="Hub ids or folders (default: two small ones, trained by us)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--output", type=Path, default=Path("outputs/disparity.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
