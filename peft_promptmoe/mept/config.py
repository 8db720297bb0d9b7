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

    Letters: `P` slots, `E` routed experts, `K` active experts, `S` shared experts, `D` width. A layer trains
    (E + S) * P * D prompt values and E * D router values; the router is left out when there is one expert.

    Args:
        num_virtual_tokens: slots per expert, P.
        num_experts: routed experts per layer, E. One expert means no router: static deep prompts.
        top_k: experts that are active for a sample or token, K.
        num_shared_experts: experts that are always active, S (paper, method figure; the official code has one or
            none).
        routing: "sample" is the paper's: the router reads the mean of the layer's input over the real tokens, and the
            rows of the chosen experts, weighted by their gates, and of the shared experts are summed into P
            rows per sample. "token" is ours: every token weighs the slots of its own chosen experts inside attention,
            so it never looks ahead. "auto" takes "token" where the prompted attention is causal, unless the model is
            known to give one answer for a row (sequence classification), and "sample" elsewhere; the choice replaces
            it in this object, as PEFT's of target modules does, and is saved with the adapter. On a causal model
            "sample" needs to know the query: labels tell it, or `given_query`.
        router_norm: whether the router reads its input through an RMS norm without gain (official code: yes).
        router_centering: whether a running mean is subtracted from the router's input. Layer inputs share one
            direction, by which sample routing can send everything to one expert; with centering the load is even and
            experts follow the task in mixed data. On a single task it has cost accuracy, so it is off by default.
        renormalize_top_k: whether the gates of the chosen experts sum to one (official code: no). Impossible with
            top_k=1 and several experts, where it would leave the router without gradient.
        router_noise: standard deviation of multiplicative Gaussian noise on router logits in training (the official
            code's `sigma`, which it multiplies in twice: pass its square).
        router_dropout: probability of dropping a router logit in training (official code: 0.2 where noise is off).
        balance_loss_weight: weight of the load-balance term of every router; off in evaluation (not in the paper).
        prompt_positions: where prompt keys stand for rotary embeddings and T5 biases: "prefix" right before the text
            (official code), "unrotated" at the first token's position. "auto" is "prefix" but for models whose rotary
            angles are out of reach or follow from the text's length (longrope, dynamic).
        decoder_sees_prompts: whether the decoder of an encoder-decoder attends to the prompts of the last encoder
            block (official code: yes). The encoder's output is longer by `num_virtual_tokens` then, so it needs
            routing="sample" and a decoder that takes encoder outputs of any length: not one of speech, which reads
            times off the number of frames, or makes its mask from it. "auto" is True where that is so.
        prompt_scale: rows are this times the trained tensor, which under Adam multiplies their learning rate. Rows
            want about 2.5e-2, which the default makes of an ordinary 1e-3.
        prompt_init: "sample_vocab" starts experts as the layer's own inputs on a row of random vocabulary tokens, for
            which the base model runs once over P tokens each. Text models cope with such rows from the first step,
            where random ones can throw a causal language model off entirely: they take attention away from its first
            token. "random" draws from a normal distribution (official code, intended: Xavier). "auto" is
            "sample_vocab" in the layers that a text of P tokens reaches, if the weights are in memory, and "random" in
            others, with one warning that says why; models that read no text start at random. Shared experts whose
            rows are added to those of routed ones (sample routing) start at a tenth of the random spread in either way
            (official code, in effect: at zero), so that experts differ at once.
        start_scale: size of rows that start as layer inputs. "unit" divides all rows of a layer by one number, so that
            the root mean square of the middle one is 1, where the norm in front of attention removes that number
            again: rows of all layers then move alike at one learning rate, and shared experts that are added weigh a
            tenth of routed ones. "inputs" leaves them as the model makes them, up to a hundred times as large in deep
            layers as in the first. Where no norm removes the number, rows are left as they are.
        init_std: spread of randomly initialised rows; "match" takes the spread of the layer's input where a norm makes
            it (post-norm models) and 1 elsewhere, where the block's norm removes any scale.
        prompt_weights: how much the rows of each of several static prompts count in attention (the log of it is added
            to their scores); filled in by `add_weighted_adapter`. Unset, each counts once.
        target_modules, exclude_modules: attention layers to prompt and to leave out, as in PEFT: names or a regular
            expression. Unset, they follow from the architecture.
        layers_to_transform, layers_pattern: numbers of the blocks to prompt, from 0 on, a list or one, and the name of
            the module list that they count in; unset, all blocks.
        modules_to_save: modules to train and save besides, usually a head. Heads of text models follow from
            `task_type`, those of images are found; `[]` leaves them out.
        trainable_token_indices: tokens whose embeddings train and are saved, as in PEFT; for models that read text.
        init_weights: False for large random values (tests).
        check_base_weights: whether to warn when the adapter is loaded onto other base weights.
        base_record: what the base model was when the adapter was made; filled in by then.
        task_type: as in PEFT ("SEQ_CLS", "CAUSAL_LM", ...); it trains and saves the head of a text model. Leave it
            unset for images.
        inference_mode, base_model_name_or_path, revision, peft_type, auto_mapping, peft_version: as in every PEFT
            config; PEFT fills them in.
    """

    num_experts: int = field(default=4, metadata={"help": "Routed experts per layer, E; 1 for static prompts."})
    top_k: int = field(default=1, metadata={"help": "Experts that are active for a sample or token, K."})
    num_shared_experts: int = field(default=1, metadata={"help": "Experts that are always active, S."})
    routing: Routing = field(default="auto", metadata={"help": "'sample', 'token', or 'auto' by the model."})
    router_norm: bool = field(default=True, metadata={"help": "Whether the router reads RMS-normed inputs."})
    router_centering: bool = field(
        default=False, metadata={"help": "Whether a running mean is subtracted from the router's input."}
    )
    renormalize_top_k: bool = field(default=False, metadata={"help": "Whether the chosen experts' gates sum to one."})
    router_noise: float = field(default=0.0, metadata={"help": "Multiplicative noise on router logits in training."})
    router_dropout: float = field(default=0.0, metadata={"help": "Dropout of router logits in training."})
    balance_loss_weight: float = field(default=0.0, metadata={"help": "Weight of the load-balance term."})
    prompt_positions: Positions = field(  # type: ignore[misc]
        default="auto", metadata={"help": "Positions of prompt keys: 'prefix', 'unrotated', or 'auto' by the model."}
    )
    decoder_sees_prompts: Literal["auto", True, False] = field(
        default="auto", metadata={"help": "Whether a decoder attends to the last encoder block's prompts, or 'auto'."}
    )
    prompt_scale: float = field(default=25.0, metadata={"help": "Rows are this times the trained tensor."})
    prompt_init: Start = field(
        default="auto", metadata={"help": "Start of the rows: 'sample_vocab', 'random', or 'auto' by the model."}
    )
    start_scale: StartScale = field(
        default="inputs", metadata={"help": "Size of rows that start as layer inputs: 'unit' or 'inputs'."}
    )
    init_std: Spread = field(default="match", metadata={"help": "Spread of the initial rows, or 'match'."})
    prompt_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each prompt that add_weighted_adapter has put together."}
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
                "prompt_weights is of static prompts, one for each: it needs num_experts=1, routing='token' and "
                f"{1 + self.num_shared_experts} numbers. Leave it to add_weighted_adapter."
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
                "routing='sample' with top_k=1 and no shared expert starves the router in pre-norm models: the gate "
                "only scales the rows, and the block's norm removes the scale. Set num_shared_experts=1 or top_k=2.",
                stacklevel=3,
            )
