# SPDX-License-Identifier: Apache-2.0
"""Configuration of pMoE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from ..config import VirtualTokensConfig, check_bool, check_choice, check_int, check_number
from ..field_types import Experts
from ..registration import ensure_peft_type

Dispatcher = Literal["token", "expert", "attention", "mean", "none"]
Fusion = Literal["concat", "mean", "logits"]
MAX_EXPERTS = 64
MAX_RANK = 4096


@dataclass
class PMoEConfig(VirtualTokensConfig):
    """Configuration of pMoE: several frozen vision backbones (experts) exchange information through their prompts.

    This is our reading of a paper (arXiv 2602.22938) whose equations we could not read. Where the paper leaves a
    choice open, there is an option. The base model is the first expert. Every expert has its own prompts in every
    block. In front of a block a dispatcher writes the prompts that enter it. It reads the prompts of all experts at
    that depth, the previous block's outputs at the prompt positions, and the expert's own patches.

    Letters: `K` experts including the base model; expert k has `L_k` blocks of width `D_k`; `P` prompts, `C` classes.
    An adapter trains, without the base model's own head, the sum over experts and blocks of P * D_k. Dispatcher
    "token" adds the same number again and P more per block. Each further expert adds C * D_k. Each ordered pair of
    experts of different widths adds D_j * D_k.

    Leave `task_type` unset: PEFT's task wrappers are for text models.

    Args:
        experts: the further experts, plain vision transformers: Hub ids ("facebook/dino-vitb16", also with
            "@revision"), "timm/..." ids, local folders, or loaded modules. A module that is passed in is frozen and
            hooked in place, stays in evaluation mode, and serves one model at a time. An adapter stores names of
            experts and never their weights; see `download_experts`.
        num_virtual_tokens: prompts per expert and block, P.
        dispatcher: how the prompts of a block are computed. "token": convex combinations of all tokens it reads.
            "expert": the carried prompts plus a mixture of all experts' prompts, with one weight per expert and image.
            "attention": own and carried prompts plus what they attend to. "mean": the carried prompts plus the mean
            over experts. "none": carried and own prompts only; experts meet in the head alone. The paper compares
            several and names none that we could read.
        dispatcher_dim: hidden width of dispatcher "expert", and rank of dispatcher "attention".
        fusion: how the experts' features become a prediction. "concat": the base model's classifier plus a trained
            linear map of each further expert's feature, which equals one linear head on all features. "logits": their
            mean, which differs from "concat" by a constant factor only. "mean": the classifier reads the mean of the
            features, which must all have one width. We do not know the paper's choice.
        carry_prompts: whether prompts accumulate from block to block (paper). Otherwise every block starts from its
            own prompts, as in VPT-Deep.
        backbone_eval: whether the base model stays in evaluation mode while the adapter trains. Further experts always
            do.
        image_mean: mean that was subtracted from the incoming pixels, one number per channel. Unset: the base model's
            own, if its processor or timm's data config is available. Each expert gets pixels normalised its own way.
        image_std: standard deviation that the incoming pixels were divided by, as for `image_mean`.
        download_experts: whether experts named by a saved config may be downloaded. Never read from a file, so that an
            untrusted adapter cannot start a download.
        expert_records: description of each expert (name, architecture, hash of the weights, pixels). Filled in by
            `get_peft_model` and checked when the adapter is loaded.
        target_modules, exclude_modules: attention layers to prompt and to leave out, as in PEFT: names or a regular
            expression. Unset: chosen by the model's architecture.
        layers_to_transform: numbers of the blocks to prompt, counted from 0: a list or one number. Unset: all blocks.
        layers_pattern: name of the module list in which `layers_to_transform` counts.
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

    experts: Experts = field(
        default_factory=list, metadata={"help": "Further backbones: Hub or timm ids, folders or modules."}
    )
    dispatcher: Dispatcher = field(default="token", metadata={"help": "How the prompts of a block are computed."})
    dispatcher_dim: int = field(
        default=16, metadata={"help": "Hidden width of dispatcher 'expert', rank of 'attention'."}
    )
    fusion: Fusion = field(default="concat", metadata={"help": "How the experts' features become a prediction."})
    carry_prompts: bool = field(default=True, metadata={"help": "Whether prompts accumulate from block to block."})
    backbone_eval: bool = field(  # type: ignore[misc]
        default=True, metadata={"help": "Whether the frozen base model stays in evaluation mode in training."}
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of the incoming pixels' normalisation."}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "Std of the incoming pixels' normalisation."}
    )
    download_experts: bool = field(
        default=False, metadata={"help": "Whether experts of a saved config may be downloaded."}
    )
    expert_records: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "Description of each expert. Filled in automatically."}
    )

    def __post_init__(self) -> None:
        # A saved config names its peft_type; a call does not.
        self.stored = self.peft_type is not None
        super().__post_init__()
        self.peft_type = ensure_peft_type("PMOE")
        self.check_experts()
        check_choice("dispatcher", self.dispatcher, Dispatcher)
        check_int("dispatcher_dim", self.dispatcher_dim, 1, MAX_RANK)
        check_choice("fusion", self.fusion, Fusion)
        for name in ("carry_prompts", "backbone_eval", "download_experts"):
            check_bool(name, getattr(self, name))
        if self.dispatcher == "expert" and not self.experts:
            raise ValueError(
                "dispatcher='expert' needs at least two experts. Add one to experts, or use another dispatcher."
            )
        if self.expert_records is not None and not isinstance(self.expert_records, list):
            raise TypeError(f"expert_records must be a list, got {self.expert_records!r}.")
        self._check_pixels()
        if self.stored:
            self.download_experts = False

    def check_experts(self) -> None:
        """Check `experts`. Called again at `get_peft_model`, because a user may set it on a loaded config."""
        if not isinstance(self.experts, (list, tuple)):
            raise TypeError(f"experts must be a list of names or modules, got {self.experts!r}.")
        self.experts = list(self.experts)
        check_int("the number of experts", len(self.experts), 0, MAX_EXPERTS)
        for expert in self.experts:
            if not isinstance(expert, (str, nn.Module)) or expert == "":
                raise TypeError(f"experts must be names or modules, got {expert!r}.")

    def _check_pixels(self) -> None:
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("image_mean and image_std belong together: set both, or neither.")
        if self.image_mean is None or self.image_std is None:
            return
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or len(values) not in (1, 3):
                raise TypeError(f"{name} must be a list of one or three numbers, got {values!r}.")
            for value in values:
                check_number(name, value, 0.0 if name == "image_std" else -1e6, 1e6, open_low=name == "image_std")
            setattr(self, name, [float(value) for value in values])
        if len(self.image_mean) != len(self.image_std):
            raise ValueError("image_mean and image_std must have the same number of channels.")

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """As in PEFT. A config made here comes from a file, so its experts are not downloaded unless the user asks."""
        config = super().from_peft_type(**kwargs)
        if isinstance(config, PMoEConfig):
            config.stored, config.download_experts = True, False
        return config

    def card_preparation(self) -> str:
        """Lines that allow downloading the experts. Without them experts load from the local cache only."""
        if not self.experts:
            return ""
        lines = [f"config = peft_promptmoe.{type(self).__name__}.from_pretrained(adapter)"]
        # A name from a file is untrusted: repr keeps it from ending the comment.
        names = ", ".join(map(repr, self._names()))
        if any(isinstance(expert, nn.Module) for expert in self.experts):
            lines.append(f"config.experts = [...]  # modules to hand over, in this order: {names}")
        else:
            lines.append(f"config.download_experts = True  # its experts: {names}")
        return "\n".join(lines) + "\n"

    def _names(self) -> list[str]:
        """Names of the experts. A module gets its recorded name, if there is one, instead of its class name."""
        records = self.expert_records if len(self.expert_records or ()) == len(self.experts) else None
        names = [expert if isinstance(expert, str) else type(expert).__name__ for expert in self.experts]
        recorded = [record["name"] for record in records] if records is not None else names
        return [
            name if isinstance(expert, str) else known
            for expert, name, known in zip(self.experts, names, recorded, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a dict, with experts by name. `download_experts` is always written as False."""
        held = self.experts
        self.experts = self._names()
        try:
            return super().to_dict() | {"download_experts": False}
        finally:
            self.experts = held
