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
DENOISE_WEIGHT, BANK_MOMENTUM = 1.0, 0.99


@dataclass
class ProMotionConfig(PromptConfig):
    """Configuration of ProMotion (experimental): denoised prototypes behind frozen blocks, for flow and depth.

    This is our reading of ProMotion (arXiv 2406.04999) as an adapter. The paper trains a whole network, and of it only
    the abstract is public: no equation, setting or line of code. So every default here is ours, or from related work
    that is named, and no figure of the paper is to be expected.

    Letters: `D` width, `d` unit width, `N` patches of an image, `K` prototypes, `M` denoising steps. A unit trains
    2D + 2Dd + d + D + d^2 + M * (6d^2 + 3d + 1) values and keeps K * d more. Leave `task_type` unset: PEFT's task
    wrappers are for text.

    Args:
        bottleneck_dim: width d that patches are compressed to (ours).
        denoiser: what a denoising step does: "attention" among an image's patches, with one matrix for queries, keys
            and values; "tokens", a small network on each; "both" (alternation of CRATE, arXiv 2306.01129).
        num_heads: heads of the denoiser's attention; it divides `bottleneck_dim` (ours: one head denoised best).
        denoise_steps: steps M. Several units one behind the other are several steps as well. 0 for no denoiser.
        noise_std: standard deviation of the noise that the denoiser learns to take away, as a share of each patch's
            root mean square (ours: at 0.1 nothing is learned).
        center: whether an image's mean over its patches is taken off before directions are compared (ours). Without
            it all patches share one direction, and the prototypes fall together.
        noisy_features: whether in training the features themselves pass on with noise (ours).
        num_prototypes: prototypes K of a unit, at most a quarter of the patches.
        proposal: where prototypes start: in a "bank" that is learned by moving averages and saved (our choice after
            ProtoSeg, arXiv 2203.15102), or at the means of a sqrt(K) x sqrt(K) grid of the image's own patches,
            "pool".
        estimation_rounds: how often patches are assigned to the prototypes and these are estimated anew.
        sinkhorn_rounds: rounds of the Sinkhorn iteration in each assignment.
        sinkhorn_eps: temperature of the assignment.
        balance: 1 for prototypes of equal mass in every image, 0 for a softmax over prototypes (ours).
        margin: by how much a patch's own prototype must win in the margin loss (ours).
        margin_temperature: temperature of the margin loss (ours).
        denoise_share: share of a batch's images, the first ones, that the denoiser learns from; at least one (ours).
        read_temperature: temperature at which patches read the prototypes (ours).
        read_top: how many prototypes a patch reads, the nearest ones; unset, all of them (ours).
        feedback: whether patches read the prototypes at all (ours).
        denoise_weight: weight of the denoising loss; unset, 1, and 0 without a denoiser (ours).
        margin_weight, compact_weight: weights of the margin loss and of the compactness loss (the pair is ProtoSeg's,
            at ten times its weights).
        bank_momentum: how much of the bank stays in a training step; unset, 0.99 (ours; ProtoSeg has 0.999, which
            hardly moves within some hundred steps). 1 keeps the bank where it started.
        reseed_after: after how many training steps without a patch a prototype moves to the patch that is farthest
            from all; 0 for never (ours).
        layers_to_transform: numbers of the blocks that a unit stands behind. Unset, the blocks that the heads or the
            decoder of a `FlowModel`, `DepthModel` or `MotionModel` read, or whose maps a backbone of transformers puts
            out; in other models every third block up to the last; and with `target_modules` all that they name.
        backbone_eval: whether the frozen model stays in evaluation mode while the adapter trains.
        target_modules, exclude_modules: attention layers to prompt and to leave out, as in PEFT: names or a regular
            expression. Unset, they follow from the architecture.
        layers_pattern: name of the module list that `layers_to_transform` counts in.
        modules_to_save: modules to train and save besides, usually a head. Image heads are found without it; `[]`
            leaves them out.
        trainable_token_indices: tokens whose embeddings train and are saved, as in PEFT; for models that read text.
        init_weights: False for large random values (tests).
        check_base_weights: whether to warn when the adapter is loaded onto other base weights.
        base_record: what the base model was when the adapter was made; filled in by then.
        task_type: leave it unset: PEFT's task wrappers are for text.
        inference_mode, base_model_name_or_path, revision, peft_type, auto_mapping, peft_version: as in every PEFT
            config; PEFT fills them in.
    """

    bottleneck_dim: int = field(default=32, metadata={"help": "Width d that patches are compressed to."})
    denoiser: DenoiserKind = field(default="both", metadata={"help": "'both', 'attention' or 'tokens'."})
    num_heads: int = field(default=1, metadata={"help": "Heads of the denoiser's attention."})
    denoise_steps: int = field(default=1, metadata={"help": "Denoising steps M; 0 for no denoiser."})
    noise_std: float = field(default=1.0, metadata={"help": "Noise of the denoiser's lessons, a share of the rms."})
    center: bool = field(default=True, metadata={"help": "Whether an image's mean direction is taken off."})
    noisy_features: bool = field(default=False, metadata={"help": "Whether features carry noise in training."})
    num_prototypes: int = field(default=16, metadata={"help": "Prototypes K of a unit."})
    proposal: Proposal = field(default="bank", metadata={"help": "Where prototypes start: 'bank' or 'pool'."})
    estimation_rounds: int = field(default=3, metadata={"help": "Rounds of assignment and estimation."})
    sinkhorn_rounds: int = field(default=3, metadata={"help": "Rounds of the Sinkhorn iteration."})
    sinkhorn_eps: float = field(default=0.05, metadata={"help": "Temperature of the assignment."})
    balance: float = field(default=1.0, metadata={"help": "1 for equal masses, 0 for a softmax over prototypes."})
    margin: float = field(default=0.2, metadata={"help": "Margin of the margin loss."})
    margin_temperature: float = field(default=0.1, metadata={"help": "Temperature of the margin loss."})
    denoise_share: float = field(default=0.25, metadata={"help": "Share of the images the denoiser learns from."})
    read_temperature: float = field(default=0.1, metadata={"help": "Temperature of reading prototypes."})
    read_top: int | None = field(default=None, metadata={"help": "Prototypes a patch reads; unset, all."})
    feedback: bool = field(default=True, metadata={"help": "Whether patches read the prototypes."})
    denoise_weight: float | None = field(default=None, metadata={"help": "Weight of the denoising loss."})
    margin_weight: float = field(default=0.1, metadata={"help": "Weight of the margin loss."})
    compact_weight: float = field(default=0.01, metadata={"help": "Weight of the compactness loss."})
    bank_momentum: float | None = field(default=None, metadata={"help": "How much of the bank stays in a step."})
    reseed_after: int = field(default=0, metadata={"help": "Steps after which an idle prototype moves; 0, never."})
    backbone_eval: bool = field(  # type: ignore[misc]
        default=True, metadata={"help": "Whether the frozen model stays in evaluation mode."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ensure_peft_type("PROMOTION")
        self._check_sizes()
        self._check_numbers()
        self._check_dead_settings()
        if self.denoise_weight is None:
            self.denoise_weight = DENOISE_WEIGHT if self.denoise_steps else 0.0
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
                f"num_heads={self.num_heads} must divide bottleneck_dim={self.bottleneck_dim}: each head gets an "
                "equal part of it."
            )
        if self.num_prototypes * self.bottleneck_dim > MAX_VALUES:
            raise ValueError(
                f"num_prototypes={self.num_prototypes} of bottleneck_dim={self.bottleneck_dim} are more than the "
                f"{MAX_VALUES} values that a unit's prototypes may have. Choose fewer or smaller ones."
            )
        if self.denoise_steps * 2 * self.bottleneck_dim**2 > MAX_VALUES:
            raise ValueError(
                f"denoise_steps={self.denoise_steps} at bottleneck_dim={self.bottleneck_dim} make tensors of more "
                f"than {MAX_VALUES} values. Choose fewer steps or a smaller width."
            )
        if self.proposal == "pool" and math.isqrt(self.num_prototypes) ** 2 != self.num_prototypes:
            raise ValueError(
                f"proposal='pool' takes the means of a square grid of patches, and num_prototypes="
                f"{self.num_prototypes} is no square. Choose 4, 9, 16, 25 or the like."
            )

    def _check_numbers(self) -> None:
        for name in ("center", "noisy_features", "feedback", "backbone_eval"):
            check_bool(name, getattr(self, name))
        check_number("noise_std", self.noise_std, 0.0, open_low=True)
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
                f"denoise_weight={self.denoise_weight} weighs the lessons of a denoiser, and denoise_steps=0 leaves "
                "it out. Leave denoise_weight unset."
            )
        if not self.denoise_steps and self.noisy_features:
            raise ValueError("noisy_features=True needs a denoiser to take the noise away; set denoise_steps.")
        if not self.feedback and not self.margin_weight and not self.compact_weight:
            raise ValueError(
                "feedback=False with margin_weight=0 and compact_weight=0 makes prototypes that nothing reads. Set "
                "one of the weights, or feedback=True."
            )
        if not self.feedback and self.read_top is not None:
            raise ValueError("read_top says how many prototypes a patch reads, and feedback=False lets it read none.")
        if self.proposal == "pool" and self.bank_momentum is not None:
            raise ValueError("bank_momentum moves a bank, and proposal='pool' has none. Leave bank_momentum unset.")
        if self.reseed_after and (self.proposal == "pool" or self.bank_momentum == 1.0):
            raise ValueError(
                "reseed_after moves prototypes of a bank that learns. Use proposal='bank' and a bank_momentum below "
                "1, or reseed_after=0."
            )

    @property
    def has_attention(self) -> bool:
        """Whether denoising steps attend among patches."""
        return self.denoiser != "tokens"

    @property
    def has_token_map(self) -> bool:
        """Whether denoising steps have a network on each patch."""
        return self.denoiser != "attention"
