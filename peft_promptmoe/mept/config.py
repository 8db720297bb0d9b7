# SPDX-License-Identifier: Apache-2.0
"""Configuration of MEPT."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

from ..config import MAX_SLOTS_PER_LAYER, VirtualTokensConfig, check_bool, check_choice, check_int, check_number
from ..field_types import Spread
from ..registration import ensure_peft_type

Routing = Literal["auto", "sample", "token"]
Positions = Literal["auto", "prefix", "unrotated"]
Start = Literal["auto", "sample_vocab", "random"]
StartScale = Literal["unit", "inputs"]


@dataclass
class MEPTConfig(VirtualTokensConfig):
    """Configuration of MEPT: in every layer a router chooses among prompt experts (arXiv 2509.00996).

    A prompt expert is a set of P trained rows of width D. The chosen rows enter the attention of the frozen layer as
    extra keys and values.

    Letters: `P` slots, `E` routed experts, `K` active experts, `S` shared experts, `D` width. A layer trains
    (E + S) * P * D prompt values and E * D router values. With one routed expert there is no router.

    Args:
        num_virtual_tokens: slots per expert, P.
        num_experts: routed experts per layer, E. 1 means static deep prompts without a router.
        top_k: experts that the router activates for a sample or token, K.
        num_shared_experts: experts that are always active, S (paper, method figure; the official code allows 0 or 1).
        routing: who chooses experts. "sample" (paper): the router reads the mean of the layer's input over the real
            tokens. The rows of the chosen experts, weighted by their gates, and of the shared experts are summed into
            P rows per sample. "token" (ours): every token weighs the slots of its own chosen experts inside attention,
            so no token uses information from later ones. "auto": "token" if the prompted attention is causal, unless
            the model is known to give one answer per sample (sequence classification); otherwise "sample".
            `get_peft_model` replaces "auto" in this object by the choice, as PEFT does for target modules, and the
            choice is saved. On a causal model "sample" needs to know which tokens are the query: pass labels or use
            `given_query`.
        router_norm: whether the router reads its input through an RMS norm without gain (official code: yes).
        router_centering: whether a running mean is subtracted from the router's input. Layer inputs share one
            direction, which can make sample routing send everything to one expert. With centering the load is even and
            experts follow the task in mixed data. It has cost accuracy on a single task and on few texts of several
            tasks, so it is off by default.
        renormalize_top_k: whether the gates of the chosen experts sum to one (official code: no). Refused for top_k=1
            with several experts: the router would get no gradient.
        router_noise: standard deviation of multiplicative Gaussian noise on router logits in training. The official
            code multiplies by its `sigma` twice: pass the square of it.
        router_dropout: probability of dropping a router logit in training (official code: 0.2 if noise is off).
        balance_loss_weight: weight of the load-balance loss of every router in training (not in the paper).
        prompt_positions: position of the prompt keys for rotary embeddings and T5 biases. "prefix": right before the
            text (official code). "unrotated": at the first token's position. "auto": "prefix", except for models whose
            rotary angles cannot be reached or depend on the text's length (longrope, dynamic).
        decoder_sees_prompts: whether the decoder of an encoder-decoder model attends to the prompts of the last
            encoder block (official code: yes). The encoder's output then has `num_virtual_tokens` more positions. This
            needs routing="sample" and a decoder that takes encoder outputs of any length. Speech decoders do not: they
            compute times from the number of frames, or build a mask from it. "auto": True if the model allows it.
        prompt_scale: factor from the trained tensor to the prompt rows. With Adam it multiplies their learning rate:
            the default 25 turns an ordinary 1e-3 into the 2.5e-2 that prompt rows need.
        prompt_init: initial prompt rows. "sample_vocab": the layer's own inputs for random vocabulary tokens; the base
            model runs once on P tokens per expert. Text models cope with such rows from the first step. Random rows
            can make a causal language model useless at first: they draw attention away from its first token.
            "random": a normal distribution (official code: meant to be Xavier). "auto": "sample_vocab" in the layers
            that a text of P tokens reaches, if the weights are in memory. Other layers get "random", with one warning
            that says why; models that do not read text get "random" without a warning. With sample routing the rows of
            shared experts are added to those of routed experts. They then start at a tenth of the random spread, for
            every `prompt_init` (official code, in effect: at zero), so that experts differ from the start.
        start_scale: size of rows that start as layer inputs. "unit": all rows of a layer are divided by one number, so
            that the median row has a root mean square of 1. The norm in front of attention removes this factor again,
            so rows of all layers move alike at one learning rate, and added shared experts weigh a tenth of routed
            ones. Without such a norm rows keep their size. "inputs": rows keep the size of the layer's inputs, which
            in deep layers can be a hundred times as large as in the first and then hardly move in training.
        init_std: standard deviation of randomly initialised rows. "match": that of the layer's input if a norm
            produces it (post-norm models), otherwise 1, because the block's own norm removes any scale.
        prompt_weights: how much the rows of each of several static prompts count in attention (the logarithm is added
            to their scores). Filled in by `add_weighted_adapter`. Unset: each counts once.
        target_modules, exclude_modules: attention layers to prompt and to leave out, as in PEFT: names or a regular
            expression. Unset: chosen by the model's architecture.
        layers_to_transform: numbers of the blocks to prompt, counted from 0: a list or one number. Unset: all blocks.
        layers_pattern: name of the module list in which `layers_to_transform` counts.
        modules_to_save: other modules to train and save with the adapter, usually a head. Unset: the head of a text
            model follows from `task_type`, and the head of an image model is found. `[]`: none.
        trainable_token_indices: tokens whose embeddings are trained and saved, as in PEFT. For text models only.
        init_weights: False for large random values (for tests).
        check_base_weights: whether to warn when the adapter is loaded onto a base model with other weights.
        base_record: description of the base model the adapter was made for. Filled in automatically.
        task_type: as in PEFT ("SEQ_CLS", "CAUSAL_LM", ...). It makes PEFT train and save the head of a text model.
            Leave it unset for image models.
        inference_mode, base_model_name_or_path, revision, peft_type, auto_mapping, peft_version: as in every PEFT
            config. PEFT fills them in.
    """

    num_experts: int = field(
        default=4, metadata={"help": "Routed experts per layer, E. 1: static prompts, no router."}
    )
    top_k: int = field(default=1, metadata={"help": "Experts that the router activates for a sample or token, K."})
    num_shared_experts: int = field(default=1, metadata={"help": "Experts that are always active, S."})
    routing: Routing = field(
        default="auto", metadata={"help": "Experts per 'sample' or 'token'. 'auto': chosen by the model."}
    )
    router_norm: bool = field(default=True, metadata={"help": "Whether the router's input passes an RMS norm."})
    router_centering: bool = field(
        default=False, metadata={"help": "Whether a running mean is subtracted from the router's input."}
    )
    renormalize_top_k: bool = field(default=False, metadata={"help": "Whether the chosen experts' gates sum to one."})
    router_noise: float = field(default=0.0, metadata={"help": "Std of the noise on router logits in training."})
    router_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of router logits."})
    balance_loss_weight: float = field(default=0.0, metadata={"help": "Weight of the load-balance loss."})
    prompt_positions: Positions = field(  # type: ignore[misc]
        default="auto", metadata={"help": "Position of prompt keys: 'prefix', 'unrotated' or 'auto'."}
    )
    decoder_sees_prompts: Literal["auto", True, False] = field(
        default="auto", metadata={"help": "Whether the decoder attends to the last encoder block's prompts."}
    )
    prompt_scale: float = field(default=25.0, metadata={"help": "Prompt rows = prompt_scale * the trained tensor."})
    prompt_init: Start = field(
        default="auto", metadata={"help": "Initial prompt rows: 'sample_vocab', 'random' or 'auto'."}
    )
    start_scale: StartScale = field(
        default="unit", metadata={"help": "Size of rows initialised from layer inputs: 'unit' or 'inputs'."}
    )
    init_std: Spread = field(default="match", metadata={"help": "Std of random initial rows, or 'match'."})
    prompt_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each prompt. Filled in by add_weighted_adapter."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ensure_peft_type("MEPT")
        check_int("num_experts", self.num_experts, 1)
        check_int("top_k", self.top_k, 1, self.num_experts)
        check_int("num_shared_experts", self.num_shared_experts, 0)
        slots = (self.num_experts + self.num_shared_experts) * self.num_virtual_tokens
        if slots > MAX_SLOTS_PER_LAYER:
            raise ValueError(
                f"(num_experts + num_shared_experts) * num_virtual_tokens is {slots} slots per layer; at most "
                f"{MAX_SLOTS_PER_LAYER} are allowed. Lower one of the three."
            )
        check_choice("routing", self.routing, Routing)
        check_choice("prompt_positions", self.prompt_positions, Positions)
        check_choice("prompt_init", self.prompt_init, Start)
        check_choice("start_scale", self.start_scale, StartScale)
        for name in ("router_norm", "router_centering", "renormalize_top_k"):
            check_bool(name, getattr(self, name))
        if self.decoder_sees_prompts != "auto":
            check_bool("decoder_sees_prompts", self.decoder_sees_prompts)
        check_number("router_noise", self.router_noise, 0.0)
        check_number("router_dropout", self.router_dropout, 0.0, 1.0)
        check_number("balance_loss_weight", self.balance_loss_weight, 0.0)
        check_number("prompt_scale", self.prompt_scale, 0.0, open_low=True)
        if isinstance(self.init_std, str):
            check_choice("init_std", self.init_std, ("match",))
        else:
            check_number("init_std", self.init_std, 0.0)
        self._check_prompt_weights()
        self._check_dead_settings()

    def _check_prompt_weights(self) -> None:
        if self.prompt_weights is None:
            return
        if not isinstance(self.prompt_weights, list):
            raise TypeError(f"prompt_weights must be a list of numbers, got {self.prompt_weights!r:.200}.")
        for weight in self.prompt_weights:
            check_number("prompt_weights", weight, 0.0, open_low=True)
        if self.num_experts > 1 or self.routing != "token" or len(self.prompt_weights) != 1 + self.num_shared_experts:
            raise ValueError(
                "prompt_weights holds one number for each static prompt: it needs num_experts=1, routing='token' and "
                f"{1 + self.num_shared_experts} numbers. Leave it unset; add_weighted_adapter fills it in."
            )

    def _check_dead_settings(self) -> None:
        if self.num_experts == 1:
            return
        if self.renormalize_top_k and self.top_k == 1:
            raise ValueError(
                "renormalize_top_k=True with top_k=1 makes every gate 1, so the router gets no gradient. Set "
                "renormalize_top_k=False or top_k of at least 2."
            )
        if self.routing == "sample" and self.top_k == 1 and self.num_shared_experts == 0:
            warnings.warn(
                "routing='sample' with top_k=1 and num_shared_experts=0 gives the router almost no gradient in "
                "pre-norm models: the gate only scales the prompt rows, and the block's norm removes the scale. Set "
                "num_shared_experts=1 or top_k=2.",
                stacklevel=3,
            )
