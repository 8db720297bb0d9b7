# SPDX-License-Identifier: Apache-2.0
"""Common base of the models for optical flow, for depth and for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..engine.model_hooks import set_frozen_eval
from ..models.levels import put_out
from .backbone import first_convolution, make_reader
from .checkpointing import Checkpointed
from .checks import check_backbone, check_depth, check_flow, check_frames, check_settings, check_tensors
from .decoder import DecoderOutput, DepthScale, check_grid, decoder_parts, decoder_reads, predicted_by
from .depth_head import DepthHead
from .flow_head import FlowHead
from .layers import pad, resize, resize_flow
from .losses import depth_loss, flow_loss, valid_depth, valid_flow
from .saving import Saved

# Defaults: rounds of refinement, and weights in the sum of losses.
REFINEMENTS = {"flow": 3, "depth": 2}


@dataclass
class MotionOutput(ModelOutput):
    """Output of the models for flow and depth.

    Attributes:
        loss: weighted sum of the losses; None without labels.
        flow: (B, 2, rows, columns) flow from frame 1 to frame 2, in pixels: x to the right, y down. The flow at a
            pixel of frame 1 points to its position in frame 2.
        depth: (B, rows, columns) depth of frame 1, in units of the labels.
    """

    loss: Tensor | None = None
    flow: Tensor | None = None
    depth: Tensor | None = None


class MotionBase(Saved, Checkpointed, nn.Module):
    """Base of [`FlowModel`], [`DepthModel`] and [`MotionModel`]. Their docstrings show how they are used.

    The model has no `config` attribute: PEFT would take it for a model of transformers. The backbone's config is at
    `backbone.config`.

    Args:
        backbone: an AutoBackbone, an AutoModel for images, or a vision transformer of timm. For depth also a DPT,
            Depth Anything or GLPN model; its own decoder is then used and trained.
        levels: numbers of the blocks whose feature maps the heads read, counted from 0: a list, or one list per task
            (`{"flow": [3, 4, 5], "depth": [5, 8, 11]}`). Unset: all `out_indices` of an AutoBackbone. In other models
            flow reads the blocks at 1/3, 5/12 and 1/2 of the depth, and depth those at 1/2, 3/4 and the last.
            Blocks after the last level are computed without use (except in timm), and an adapter in them gets no
            gradient. DDP then needs `find_unused_parameters` (the Trainer's default). It is better to load fewer
            blocks: `AutoBackbone.from_pretrained(id, num_hidden_layers=6, out_indices=[4, 5, 6])`, or
            `AutoModel.from_pretrained(id, num_hidden_layers=6)`.
        channels: channels of the features that flow matches, and of the map from which depth is computed.
        refinements: rounds of refinement. Unset: 3 for flow and 2 for depth.
        max_flow: longest flow that counts in the loss, in pixels of the labels.
        min_depth: smallest depth that is predicted and counts in the loss, in units of the labels.
        max_depth: largest depth that is predicted and counts in the loss, in units of the labels.
        task_weights: weight of each task's loss ("flow", "depth"). Unset: 1 each. The two losses differ in size by an
            order of magnitude: see `last_losses`.
        decoder_output: what the backbone's own decoder predicts: "inverse" depth up to a factor, or "depth". Unset: by
            the type of the backbone.
        freeze_backbone: whether the backbone is frozen and stays in evaluation mode. False trains the whole backbone.
            With an adapter, PEFT freezes it in any case.

    Attributes:
        last_losses: losses of the last forward pass with labels, by task, detached and without their weights.

    Raises:
        TypeError: the backbone is no model.
        ValueError: the backbone's maps cannot be read at these levels, or a setting is out of range.
    """

    tasks: ClassVar[tuple[str, ...]]
    main_input_name = "pixel_values"  # the Trainer asks for it

    def __init__(
        self,
        backbone: nn.Module,
        levels: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        channels: int = 64,
        refinements: int | None = None,
        max_flow: float = 400.0,
        min_depth: float = 1e-3,
        max_depth: float = 80.0,
        task_weights: Mapping[str, float] | None = None,
        decoder_output: DecoderOutput | None = None,
        freeze_backbone: bool = True,
    ) -> None:
        super().__init__()
        check_backbone(backbone)
        settings: dict[str, Any] = {
            "levels": levels,
            "channels": channels,
            "refinements": refinements,
            "max_flow": max_flow,
            "min_depth": min_depth,
            "max_depth": max_depth,
            "task_weights": task_weights,
            "decoder_output": decoder_output,
            "freeze_backbone": freeze_backbone,
        }
        asked, weights = check_settings(self.tasks, **settings)
        self._settings = {**settings, "levels": {task: read for task, read in asked.items() if read is not None}}
        self.max_flow, self.min_depth, self.max_depth = max_flow, min_depth, max_depth
        self.task_weights = weights
        self.freeze_backbone = freeze_backbone
        self.last_losses: dict[str, Tensor] = {}
        self.decoder = decoder_parts(backbone)
        self._check_decoder(backbone, asked, decoder_output)
        if self.decoder:
            del asked["depth"]
        self.reader, self.levels = make_reader(backbone, asked)
        self.backbone = backbone
        rounds = {task: REFINEMENTS[task] if refinements is None else refinements for task in self.tasks}
        if "flow" in self.tasks:
            self.flow_head = FlowHead(*self.reader.of(self.levels["flow"]), channels, rounds["flow"])
            self.flow_head.keep_settings(refinements=rounds["flow"], **self._read("flow"))
        span = {"min_depth": min_depth, "max_depth": max_depth}
        if self.decoder:
            output = decoder_output or predicted_by(backbone)
            self.depth_scale = DepthScale(output, **span)
            self.depth_scale.keep_settings(decoder_output=output, blocks=decoder_reads(backbone), **span)
        elif "depth" in self.tasks:
            widths, stride = self.reader.of(self.levels["depth"])
            self.depth_head = DepthHead(widths, stride, channels, rounds["depth"], **span)
            self.depth_head.keep_settings(refinements=rounds["depth"], **self._read("depth"), **span)
        if freeze_backbone:
            self._freeze()
        self.train(backbone.training)

    def _check_decoder(self, backbone: nn.Module, asked: dict[str, Any], output: str | None) -> None:
        name = type(backbone).__name__
        if self.decoder and "depth" not in self.tasks:
            raise ValueError(
                f"{name} has a depth decoder, which flow does not use. Pass its backbone (its child `backbone`, `dpt` "
                "or `glpn`), or use MotionModel for flow and depth."
            )
        if self.decoder and asked.get("depth") is not None:
            raise ValueError(
                f"{name} computes depth with its own decoder, which has fixed levels. Leave levels unset for depth."
            )
        if output is not None and not self.decoder:
            raise ValueError(f"decoder_output={output!r}, but {name} has no depth decoder of its own. Leave it unset.")

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make this model again from its backbone, as a file can hold them."""
        now = {"max_flow": self.max_flow, "task_weights": self.task_weights, "freeze_backbone": self.freeze_backbone}
        return {**self._settings, **now, "levels": self._settings["levels"] or None}

    @property
    def head_names(self) -> list[str]:
        """Paths of the heads and decoders that are trained. Pass them to PEFT as `modules_to_save`."""
        own = [name for name in ("flow_head", "depth_head", "depth_scale") if hasattr(self, name)]
        return own + [f"backbone.{part}" for part in self.decoder]

    @property
    def read_blocks(self) -> list[int]:
        """Numbers of the blocks that heads or the model's own decoder read, where they are known."""
        own = decoder_reads(self.backbone) if self.decoder else []
        return sorted({*own, *(block for task in self.levels for block in self._blocks(task))})

    def _blocks(self, task: str) -> list[int]:
        """Numbers of the blocks that a head of this package reads, in its order."""
        stages = put_out(self.backbone) if self.reader.kind == "feature_maps" else None
        return [level if stages is None else stages[level] for level in self.levels[task]]

    def _read(self, task: str) -> dict[str, Any]:
        """What a head of this package reads: the blocks, and whether their maps pass the backbone's last norm."""
        norms = getattr(getattr(self.backbone, "config", None), "apply_layernorm", False)
        return {"blocks": self._blocks(task), "normed": bool(norms) and self.reader.kind == "feature_maps"}

    def _freeze(self) -> None:
        heads = {id(p) for name in self.head_names for p in self.get_submodule(name).parameters()}
        for parameter in self.backbone.parameters():
            if id(parameter) not in heads:
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode and self.freeze_backbone:
            set_frozen_eval(self.backbone)
        return self

    def _run(
        self,
        pixel_values: Tensor,
        next_pixel_values: Tensor | None,
        flow_labels: Tensor | None = None,
        depth_labels: Tensor | None = None,
        flow_mask: Tensor | None = None,
        depth_mask: Tensor | None = None,
    ) -> MotionOutput:
        check_tensors(
            pixel_values=pixel_values,
            next_pixel_values=next_pixel_values,
            flow_labels=flow_labels,
            depth_labels=depth_labels,
            flow_mask=flow_mask,
            depth_mask=depth_mask,
        )
        check_frames(pixel_values, next_pixel_values, flow_labels)
        check_flow(flow_labels, flow_mask, len(pixel_values))
        check_depth(depth_labels, depth_mask, len(pixel_values))
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        two = next_pixel_values is not None
        pixels = pixel_values if next_pixel_values is None else torch.cat([pixel_values, next_pixel_values])
        maps, decoded = self._encode(pad(pixels, self.reader.patch))
        # The model is changed at the end only: other threads may run forward passes at the same time.
        losses: dict[str, Tensor] = {}
        # Without autocast: coordinates need more digits than half precision has.
        with torch.autocast(pixels.device.type, enabled=False):
            output = MotionOutput()
            if "flow" in self.tasks and two:
                output.flow = self._flow(maps, size, flow_labels, flow_mask, losses)
            if "depth" in self.tasks:
                decoded = None if decoded is None else decoded[: len(pixel_values)]
                output.depth = self._depth(maps, decoded, len(pixel_values), size, depth_labels, depth_mask, losses)
        if losses:
            output.loss = torch.stack([self.task_weights[task] * loss for task, loss in losses.items()]).sum()
        self.last_losses = {task: loss.detach() for task, loss in losses.items()}
        return output

    def _encode(self, pixels: Tensor) -> tuple[dict[int, Tensor], Tensor | None]:
        """Feature maps by level, and the prediction of the backbone's own decoder, if there is one."""
        pixels = pixels.to(first_convolution(self.backbone).weight.dtype)  # as many models of transformers do
        if not self.decoder:
            return self.reader.read(self.backbone, pixels), None
        check_grid(self.backbone, pixels, self.reader.patch)
        self.reader.check_size(self.backbone, pixels)
        output = self.backbone(pixel_values=pixels, **self.reader.arguments())
        return (self.reader.maps_of(output, pixels) if self.levels else {}), output.predicted_depth

    def _head_maps(self, maps: dict[int, Tensor], task: str) -> list[Tensor]:
        head: Any = self.flow_head if task == "flow" else self.depth_head
        dtype = next(head.parameters()).dtype
        return [maps[level].to(dtype) for level in self.levels[task]]

    def _flow(
        self,
        maps: dict[int, Tensor],
        size: Any,
        labels: Tensor | None,
        mask: Tensor | None,
        losses: dict[str, Tensor],
    ) -> Tensor:
        both = self._head_maps(maps, "flow")
        count = len(both[0]) // 2
        flows = self.flow_head([m[:count] for m in both], [m[count:] for m in both], all_rounds=labels is not None)
        wanted = size if labels is None else (labels.shape[-2], labels.shape[-1])
        flows = [resize_flow(flow[..., : size[0], : size[1]], wanted) for flow in flows]
        if labels is not None:
            labels = labels.float()
            losses["flow"] = flow_loss(flows, labels, valid_flow(labels, self.max_flow, mask))
        return flows[-1]

    def _depth(
        self,
        maps: dict[int, Tensor],
        decoded: Tensor | None,
        count: int,
        size: Any,
        labels: Tensor | None,
        mask: Tensor | None,
        losses: dict[str, Tensor],
    ) -> Tensor:
        wanted = size if labels is None else (labels.shape[-2], labels.shape[-1])
        labels = None if labels is None else labels.float()
        valid = None if labels is None else valid_depth(labels, self.min_depth, self.max_depth, mask)
        if decoded is None:
            read = [m[:count] for m in self._head_maps(maps, "depth")]
            depths = self.depth_head(read, all_rounds=labels is not None)
        else:
            padded = tuple(-(-length // patch) * patch for length, patch in zip(size, self.reader.patch, strict=True))
            if self.training and labels is not None and valid is not None:
                self._scale().start(decoded, labels, valid)
            depths = [self.depth_scale(decoded, padded)]
        depths = [resize(depth[:, None, : size[0], : size[1]], wanted)[:, 0] for depth in depths]
        if labels is not None and valid is not None:
            losses["depth"] = depth_loss(depths, labels, valid)
        return depths[-1]

    def _scale(self) -> DepthScale:
        """The depth scale in use: PEFT's copy for the active adapter, if there is one."""
        found: Any = self.depth_scale
        if not isinstance(found, DepthScale):
            active = found.active_adapters
            found = found.modules_to_save[active[0]] if active else found.original_module
        return found
