# SPDX-License-Identifier: Apache-2.0
"""Configuration of ProMotion."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ..config import PromptConfig, check_bool, check_choice, check_int, check_number
from ..registration import ensure_peft_type

MAX_VALUES = 4_194_304  # of one tensor, 16 MiB
MAX_UNIT_DIM = 4_096
MAX_PROTOTYPES = 16_384
MAX_ROUNDS = 1_000
MAX_UNITS = 1_000
MAX_UPDATES = 1_000_000_000
MIN_TEMPERATURE = 1e-6  # by far less a cosine is divided to infinity
DenoiserKind = Literal["both", "attention", "tokens"]
Proposal = Literal["bank", "pool"]
DENOISE_WEIGHT, BANK_MOMENTUM, UNIT_SCALE = 1.0, 0.99, 0.25


@dataclass
class ProMotionConfig(PromptConfig):
    """Configuration of ProMotion (experimental): denoised prototypes behind frozen blocks, for optical flow and depth.

    This is our reading of ProMotion (arXiv 2406.04999) as an adapter. The paper trains a whole network, and only its
    abstract is public: no equation, setting or line of code. Every default is ours or comes from related work that is
    named. Do not expect the paper's figures.

    A unit is one trained module of this adapter. It stands behind a frozen block and changes the patches that leave
    it.

    Letters: `D` width, `d` unit width, `N` patches of an image, `K` prototypes, `M` denoising steps. A unit trains
    2D + 2Dd + d + D + d^2 + M * (6d^2 + 3d + 1) values and stores K * d more that are not trained by gradients. Leave
    `task_type` unset: PEFT's task wrappers are for text models.

    Args:
        bottleneck_dim: width d to which a unit compresses patches (ours).
        denoiser: what a denoising step does. "attention": attention among an image's patches, with one matrix for
            queries, keys and values. "tokens": a small network on each patch. "both": one after the other, as in CRATE
            (arXiv 2306.01129).
        num_heads: heads of the denoiser's attention. Must divide `bottleneck_dim` (ours: one head denoised best).
        denoise_steps: denoising steps M of a unit. 0: no denoiser. Units in several blocks also add up steps.
        noise_std: standard deviation of the noise that the denoiser learns to remove, relative to each patch's root
            mean square (ours: at 0.1 it learns nothing).
        center: whether the mean over an image's patches is subtracted before directions are compared (ours). Without
            it all patches share one direction, and the prototypes become equal.
        noisy_features: whether in training the unit's own features get noise, too, for the denoiser to remove (ours).
            Otherwise only the copies that the denoising loss reads get it.
        num_prototypes: prototypes K of a unit, at most a quarter of the number of patches.
        proposal: initial prototypes of a forward pass. "bank": prototypes learned by moving averages and saved (after
            ProtoSeg, arXiv 2203.15102). "pool": the means over a sqrt(K) x sqrt(K) grid of the image's own patches.
        estimation_rounds: how often patches are assigned to prototypes and the prototypes are computed anew.
        sinkhorn_rounds: Sinkhorn iterations in each assignment.
        sinkhorn_eps: temperature of the assignment.
        balance: 1: prototypes get equal mass in every image. 0: softmax over prototypes (ours).
        margin: margin of the margin loss: how far a patch's own prototype must win (ours).
        margin_temperature: temperature of the margin loss (ours).
        denoise_share: share of a batch's images that the denoiser learns from: the first ones, at least one (ours).
        read_temperature: temperature at which patches read the prototypes (ours).
        read_top: number of nearest prototypes that a patch reads. Unset: all (ours).
        feedback: whether patches read the prototypes at all (ours).
        unit_scale: factor of what a unit adds to its block's output. Unset: 0.25 (ours), with which a learning rate of
            1e-3 trains units in all blocks; with 1 those in twelve blocks diverged at this rate. Adapters that were
            saved before this setting existed keep 1.
        denoise_weight: weight of the denoising loss. Unset: 1, or none without a denoiser (ours).
        margin_weight, compact_weight: weights of the margin loss and of the compactness loss (both losses from
            ProtoSeg, with ten times its weights).
        bank_momentum: share of the old bank that a training step keeps. Unset: 0.99 (ours; at ProtoSeg's 0.999 the
            bank hardly moves within some hundred steps). 1: the bank stays as it was initialised.
        reseed_after: a prototype that got no patch for this many training steps moves to the patch farthest from all
            prototypes. 0: never (ours).
        layers_to_transform: numbers of the blocks that get a unit, counted from 0. Unset: all blocks, up to the last
            one that the heads or the decoder of a `FlowModel`, `DepthModel` or `MotionModel` read, or whose feature
            map a backbone of transformers returns; with `target_modules` all blocks that it names. In Swin blocks are
            counted over all stages, in the order in which they run, not within their stage.
        layers_pattern: name of the module list in which `layers_to_transform` counts. In Swin "layers" counts stages.
        backbone_eval: whether the frozen base model stays in evaluation mode while the adapter trains.
        target_modules, exclude_modules: attention layers whose blocks get units or are left out, as in PEFT: names or
            a regular expression. Unset: chosen by the model's architecture.
        modules_to_save: other modules to train and save with the adapter, usually a head. Unset: the head of an image
            model is found. `[]`: none.
        trainable_token_indices: tokens whose embeddings are trained and saved, as in PEFT. For text models only.
        init_weights: False for large random values (for tests).
        check_base_weights: whether to warn when the adapter is loaded onto a base model with other weights.
        base_record: description of the base model the adapter was made for. Filled in automatically.
        task_type: leave it unset. PEFT's task wrappers are for text models.
        inference_mode, base_model_name_or_path, revision, peft_type, auto_mapping, peft_version: as in every PEFT
            config. PEFT fills them in.
    """

    bottleneck_dim: int = field(default=32, metadata={"help": "Width d to which a unit compresses patches."})
    denoiser: DenoiserKind = field(
        default="both", metadata={"help": "Kind of denoising step: 'both', 'attention' or 'tokens'."}
    )
    num_heads: int = field(default=1, metadata={"help": "Heads of the denoiser's attention."})
    denoise_steps: int = field(default=1, metadata={"help": "Denoising steps M of a unit. 0: no denoiser."})
    noise_std: float = field(default=1.0, metadata={"help": "Std of the noise to remove, relative to a patch's RMS."})
    center: bool = field(default=True, metadata={"help": "Whether the mean over patches is subtracted."})
    noisy_features: bool = field(
        default=False, metadata={"help": "Whether the unit's own features get noise in training."}
    )
    num_prototypes: int = field(default=16, metadata={"help": "Prototypes K of a unit."})
    proposal: Proposal = field(
        default="bank", metadata={"help": "Initial prototypes: 'bank' (learned) or 'pool' (from the image)."}
    )
    estimation_rounds: int = field(default=3, metadata={"help": "Rounds of assignment and estimation."})
    sinkhorn_rounds: int = field(default=3, metadata={"help": "Sinkhorn iterations per assignment."})
    sinkhorn_eps: float = field(default=0.05, metadata={"help": "Temperature of the assignment."})
    balance: float = field(default=1.0, metadata={"help": "1: equal masses. 0: softmax over prototypes."})
    margin: float = field(default=0.2, metadata={"help": "Margin of the margin loss."})
    margin_temperature: float = field(default=0.1, metadata={"help": "Temperature of the margin loss."})
    denoise_share: float = field(default=0.25, metadata={"help": "Share of a batch that the denoiser learns from."})
    read_temperature: float = field(default=0.1, metadata={"help": "Temperature at which patches read prototypes."})
    read_top: int | None = field(default=None, metadata={"help": "Nearest prototypes that a patch reads. Unset: all."})
    feedback: bool = field(default=True, metadata={"help": "Whether patches read the prototypes."})
    unit_scale: float | None = field(
        default=None, metadata={"help": "Factor of what a unit adds to its block's output. Unset: 0.25."}
    )
    denoise_weight: float | None = field(default=None, metadata={"help": "Weight of the denoising loss. Unset: 1."})
    margin_weight: float = field(default=0.1, metadata={"help": "Weight of the margin loss."})
    compact_weight: float = field(default=0.01, metadata={"help": "Weight of the compactness loss."})
    bank_momentum: float | None = field(
        default=None, metadata={"help": "Share of the bank kept in a step. Unset: 0.99."}
    )
    reseed_after: int = field(default=0, metadata={"help": "Steps until an unused prototype moves. 0: never."})
    backbone_eval: bool = field(  # type: ignore[misc]
        default=True, metadata={"help": "Whether the frozen base model stays in evaluation mode in training."}
    )

    def __post_init__(self) -> None:
        is_saved = self.peft_version is not None  # PEFT fills it in
        super().__post_init__()
        self.peft_type = ensure_peft_type("PROMOTION")
        if self.unit_scale is None:
            self.unit_scale = 1.0 if is_saved else UNIT_SCALE
        self._check_sizes()
        self._check_numbers()
        self._check_dead_settings()
        if self.denoise_weight is None and self.denoise_steps:
            self.denoise_weight = DENOISE_WEIGHT
        if self.bank_momentum is None and self.proposal == "bank":
            self.bank_momentum = BANK_MOMENTUM

    def _check_sizes(self) -> None:
        check_int("bottleneck_dim", self.bottleneck_dim, 1, MAX_UNIT_DIM)
        check_choice("denoiser", self.denoiser, DenoiserKind)
        check_int("num_heads", self.num_heads, 1, MAX_UNIT_DIM)
        check_int("denoise_steps", self.denoise_steps, 0, MAX_ROUNDS)
        check_int("num_prototypes", self.num_prototypes, 1, MAX_PROTOTYPES)
        check_choice("proposal", self.proposal, Proposal)
        check_int("estimation_rounds", self.estimation_rounds, 1, MAX_ROUNDS)
        check_int("sinkhorn_rounds", self.sinkhorn_rounds, 1, MAX_ROUNDS)
        check_int("reseed_after", self.reseed_after, 0, MAX_UPDATES)
        if self.read_top is not None:
            check_int("read_top", self.read_top, 1, self.num_prototypes)
        if self.bottleneck_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide bottleneck_dim={self.bottleneck_dim}. Choose a number of "
                "heads that divides it."
            )
        if self.num_prototypes * self.bottleneck_dim > MAX_VALUES:
            raise ValueError(
                f"num_prototypes={self.num_prototypes} with bottleneck_dim={self.bottleneck_dim} make more than "
                f"{MAX_VALUES} values. Choose fewer prototypes or a smaller width."
            )
        if self.denoise_steps * 2 * self.bottleneck_dim**2 > MAX_VALUES:
            raise ValueError(
                f"denoise_steps={self.denoise_steps} with bottleneck_dim={self.bottleneck_dim} make tensors of more "
                f"than {MAX_VALUES} values. Choose fewer steps or a smaller width."
            )
        if self.proposal == "pool" and math.isqrt(self.num_prototypes) ** 2 != self.num_prototypes:
            raise ValueError(
                f"proposal='pool' needs a square number of prototypes, got num_prototypes={self.num_prototypes}. "
                "Choose 4, 9, 16, 25 or another square."
            )

    def _check_numbers(self) -> None:
        for name in ("center", "noisy_features", "feedback", "backbone_eval"):
            check_bool(name, getattr(self, name))
        check_number("noise_std", self.noise_std, 0.0, open_low=True)
        check_number("unit_scale", self.unit_scale, 0.0, open_low=True)
        for name in ("sinkhorn_eps", "margin_temperature", "read_temperature"):
            check_number(name, getattr(self, name), MIN_TEMPERATURE)
        check_number("balance", self.balance, 0.0)
        check_number("denoise_share", self.denoise_share, 0.0, open_low=True)
        for name in ("balance", "denoise_share"):
            if getattr(self, name) > 1.0:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)}.")
        for name in ("margin", "margin_weight", "compact_weight"):
            check_number(name, getattr(self, name), 0.0)
        if self.denoise_weight is not None:
            check_number("denoise_weight", self.denoise_weight, 0.0)
        if self.bank_momentum is not None:
            check_number("bank_momentum", self.bank_momentum, 0.0)
            if self.bank_momentum > 1.0:
                raise ValueError(f"bank_momentum must be at most 1, got {self.bank_momentum}.")

    def _check_dead_settings(self) -> None:
        if not self.denoise_steps and self.denoise_weight:
            raise ValueError(
                f"denoise_weight={self.denoise_weight} has no effect with denoise_steps=0: there is no "
                "denoiser. Leave denoise_weight unset (None), or set denoise_steps."
            )
        if not self.denoise_steps and self.noisy_features:
            raise ValueError(
                "noisy_features=True needs a denoiser that removes the noise. Set denoise_steps to 1 or more."
            )
        if not self.feedback and not self.margin_weight and not self.compact_weight:
            raise ValueError(
                "feedback=False with margin_weight=0 and compact_weight=0 makes prototypes without any effect. Set "
                "one of the weights, or feedback=True."
            )
        if not self.feedback and self.read_top is not None:
            raise ValueError(
                "read_top has no effect with feedback=False: patches read no prototypes. Leave read_top unset."
            )
        if self.proposal == "pool" and self.bank_momentum is not None:
            raise ValueError(
                "bank_momentum has no effect with proposal='pool': there is no bank. Leave bank_momentum unset (None)."
            )
        if self.reseed_after and (self.proposal == "pool" or self.bank_momentum == 1.0):
            raise ValueError(
                f"reseed_after={self.reseed_after} needs a bank that learns. Use proposal='bank' with a bank_momentum "
                "below 1, or reseed_after=0."
            )

    @property
    def has_attention(self) -> bool:
        """Whether a denoising step has attention among patches."""
        return self.denoiser != "tokens"

    @property
    def has_token_map(self) -> bool:
        """Whether a denoising step has a network on each patch."""
        return self.denoiser != "attention"
