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
    """Configuration of pMoE: several frozen vision backbones whose prompts talk to each other.

    This is our reading of a paper (arXiv 2602.22938) whose equations are not public to us; where it is open, there is
    an option. The base model is the first expert, and every expert and block has prompts of its own. In front of a
    block a dispatcher reads the prompts of all experts at that depth, what the block before has made of its prompts,
    and the expert's own patches, and writes the prompts that enter the block.

    Letters: `K` experts, the base model among them; expert k has `L_k` blocks of width `D_k`; `P` prompts, `C`
    classes. An adapter trains, the base model's own head aside, the sum over experts and blocks of P * D_k, with
    dispatcher "token" as much again and P more per block, C * D_k for each further expert, and D_j * D_k for each
    ordered pair of experts of different widths.

    Leave `task_type` unset: PEFT's task wrappers are for text.

    Args:
        experts: the further experts, plain vision transformers: Hub ids ("facebook/dino-vitb16", or with "@revision"),
            "timm/..." ids, local folders, or modules that are loaded already. A module that is handed over is frozen
            and hooked in place, stays in evaluation mode, and serves one model at a time. An adapter stores names and
            never weights; see `download_experts`.
        dispatcher: what writes the prompts of a block. "token": convex combinations of all tokens it reads (default).
            "expert": the carried prompts and a mixture of all experts' prompts, weighed once per image. "attention":
            own and carried prompts, and what they attend to. "mean": the carried prompts and the mean over experts.
            "none": carried and own prompts; the experts then only meet in the head. The paper compares several and
            names none that we could read.
        dispatcher_dim: hidden width of dispatcher "expert" and rank of dispatcher "attention".
        fusion: how the prediction comes about. "concat": the base model's classifier and a trained linear map of each
            further expert's feature, added: a linear head on all features. "logits": their mean, which differs from
            "concat" by a factor only. "mean": the classifier reads the mean of the features, which must be of one
            width. The paper's way is not known to us.
        carry_prompts: whether prompts accumulate from block to block (paper); otherwise every block starts anew, as in
            VPT-Deep.
        backbone_eval: whether the base model stays in evaluation mode while the adapter trains; further experts always
            are.
        image_mean: normalisation of the pixels that come in, by channel. Unset, it is the base model's own if its
            processor or timm's data config is at hand. Each expert gets the pixels normalised its own way.
        image_std: as `image_mean`.
        download_experts: whether experts that a stored config names may be downloaded. Never taken from a file: an
            adapter of a stranger cannot ask for it.
        expert_records: what the experts were when the adapter was made (name, architecture, weights' hash, pixels).
            Filled in when the model is made and checked when the adapter is loaded.
        num_virtual_tokens: prompts per expert and block, P.
        target_modules, exclude_modules: attention layers to prompt and to leave out, as in PEFT: names or a regular
            expression. Unset, they follow from the architecture.
        layers_to_transform, layers_pattern: numbers of the blocks to prompt, from 0 on, a list or one, and the name of
            the module list that they count in; unset, all blocks.
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

    experts: Experts = field(default_factory=list, metadata={"help": "Further experts: names, folders or modules."})
    dispatcher: Dispatcher = field(default="token", metadata={"help": "What writes the prompts of a block."})
    dispatcher_dim: int = field(default=16, metadata={"help": "Hidden width of 'expert', rank of 'attention'."})
    fusion: Fusion = field(default="concat", metadata={"help": "How the experts' features become a prediction."})
    carry_prompts: bool = field(default=True, metadata={"help": "Whether prompts accumulate from block to block."})
    backbone_eval: bool = field(  # type: ignore[misc]
        default=True, metadata={"help": "Whether the base model stays in evaluation mode."}
    )
    image_mean: list[float] | None = field(default=None, metadata={"help": "Mean of the pixels that come in."})
    image_std: list[float] | None = field(default=None, metadata={"help": "Spread of the pixels that come in."})
    download_experts: bool = field(default=False, metadata={"help": "Whether named experts may be downloaded."})
    expert_records: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "What the experts were when the adapter was made."}
    )

    def __post_init__(self) -> None:
        # Files name the method, calls do not.
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
            raise ValueError("dispatcher='expert' weighs experts, and there is one. Use another dispatcher.")
        if self.expert_records is not None and not isinstance(self.expert_records, list):
            raise TypeError(f"expert_records must be a list, got {self.expert_records!r}.")
        self._check_pixels()
        if self.stored:
            self.download_experts = False

    def check_experts(self) -> None:
        """Check the list of experts, which a user may set on a loaded config."""
        if not isinstance(self.experts, (list, tuple)):
            raise TypeError(f"experts must be a list of names or modules, got {self.experts!r}.")
        self.experts = list(self.experts)
        check_int("the number of experts", len(self.experts), 0, MAX_EXPERTS)
        for expert in self.experts:
            if not isinstance(expert, (str, nn.Module)) or expert == "":
                raise TypeError(f"experts must be names or modules, got {expert!r}.")

    def _check_pixels(self) -> None:
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("image_mean and image_std belong together; set both or neither.")
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
            raise ValueError("image_mean and image_std must have as many channels as each other.")

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """As PEFT's; whatever comes this way was stored, and its experts load by the rule for stored configs."""
        config = super().from_peft_type(**kwargs)
        if isinstance(config, PMoEConfig):
            config.stored, config.download_experts = True, False
        return config

    def card_preparation(self) -> str:
        """Lines that ask for the experts; without them experts load from this machine only."""
        if not self.experts:
            return ""
        lines = [f"config = peft_promptmoe.{type(self).__name__}.from_pretrained(adapter)"]
        # A record's name may be a stranger's, and must not end the comment.
        names = ", ".join(map(repr, self._names()))
        if any(isinstance(expert, nn.Module) for expert in self.experts):
            lines.append(f"config.experts = [...]  # modules to hand over, in this order: {names}")
        else:
            lines.append(f"config.download_experts = True  # its experts: {names}")
        return "\n".join(lines) + "\n"

    def _names(self) -> list[str]:
        """Names of the experts; of modules as recorded, for the adapter may come from one that had names."""
        records = self.expert_records if len(self.expert_records or ()) == len(self.experts) else None
        names = [expert if isinstance(expert, str) else type(expert).__name__ for expert in self.experts]
        recorded = [record["name"] for record in records] if records is not None else names
        return [
            name if isinstance(expert, str) else known
            for expert, name, known in zip(self.experts, names, recorded, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The config as a dict, experts by name; leave to download is given by call and never stored."""
        held = self.experts
        self.experts = self._names()
        try:
            return super().to_dict() | {"download_experts": False}
        finally:
            self.experts = held
