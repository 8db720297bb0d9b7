# SPDX-License-Identifier: Apache-2.0
"""Hooks on every module that a user may call: the whole base model, or its tower, body or encoder."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..models.call_arguments import attention_mask, given_cache
from ..models.inspection import accepts_keyword_arguments, divides_its_loss, parameter_names, unwrapped_forward
from ..models.packed_rows import refuse_packed_rows
from ..models.query import query_of, warn_of_no_query
from ..routing.auxiliary_loss import add_losses, add_losses_to_tokens
from ..routing.prompt_call import CallBook, PromptCall
from .prompt_layer import PROMPT_CALL, PromptLayer


class WholeModel(Protocol):
    """What a called module needs from the hooks on the whole model. Implemented by `ModelHooks`."""

    calls: CallBook
    last_losses: dict[tuple[str, str, str], Tensor]

    def begin(self) -> PromptCall:
        """Start a forward pass of any module."""

    def end(self, call: PromptCall, done: bool) -> None:
        """End a forward pass, also after an error."""


class CalledModule:
    """The hooks on one module of a base model that contains prompted attention layers.

    The outermost module that is called starts a `PromptCall`. Modules inside it add what their own arguments tell, and
    pass it on. Any of them may return a loss.

    Args:
        whole: the hooks on the whole model.
        module: the module.
    """

    def __init__(self, whole: WholeModel, module: nn.Module) -> None:
        self.whole = whole
        self.names = parameter_names(module)
        # Only modules that pass unknown arguments on to attention get the call as an extra argument.
        ours = isinstance(module, PreTrainedModel) or type(module).__module__.startswith("transformers.")
        self.hands_on = ours and accepts_keyword_arguments(module)
        self.divides = divides_its_loss(unwrapped_forward(module))
        self._looked = False

    def attach(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            # Also after an error, so that the next forward pass starts anew.
            module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel is not supported: it copies the model's hooks, and the copies would use the "
                "prompts of the original. Use one process per device: torchrun or accelerate launch."
            )
        call = self._call(kwargs) or self.whole.begin()
        call.within.append(self)
        bound = dict(zip(self.names, args, strict=False)) | kwargs
        if call.pools_rows:
            refuse_packed_rows(bound, call.pools_causal, outermost=len(call.within) == 1)
        call.cached |= given_cache(bound) is not None
        if call.reads_query and not call.knows_query:
            call.query = query_of(bound)
            self._look_at(call.query, bound, module)
        if not call.asks or not self.hands_on or PROMPT_CALL in kwargs:
            return None
        return args, {**kwargs, PROMPT_CALL: call}

    def _call(self, kwargs: dict[str, Any]) -> PromptCall | None:
        """The call of a forward pass that an outer module has started, or None."""
        call = kwargs.get(PROMPT_CALL)
        return call if isinstance(call, PromptCall) else self.whole.calls.call

    def _look_at(self, query: Tensor | None, bound: dict[str, Any], module: nn.Module) -> None:
        """Check once, in the first training step, that routers have something to read."""
        if query is None or not module.training or self._looked or torch.compiler.is_compiling():
            return
        if query.is_meta or isinstance(query, FakeTensor):  # these have no values
            return
        self._looked = True
        mask = attention_mask(bound)
        warn_of_no_query(query & mask.bool() if mask is not None and mask.ndim == 2 else query)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = self._call(kwargs)
        if call is None:
            return None
        if call.within and call.within[-1] is self:
            call.within.pop()
        if not call.within:
            self.whole.end(call, done=output is not None)
        if not call.losses or output is None:
            if call.adds_losses and output is not None and torch.compiler.is_compiling() and torch.is_grad_enabled():
                _refuse_lost_losses()
            return None
        self.whole.last_losses = call.losses
        if not torch.is_grad_enabled():
            return None
        return self._with_losses(output, call, dict(zip(self.names, args, strict=False)) | kwargs)

    def _with_losses(self, output: Any, call: PromptCall, bound: dict[str, Any]) -> Any:
        """The module's output with auxiliary losses in the gradient of its loss. None if it has no loss."""
        if isinstance(output, tuple):
            loss = output[0] if output else None  # the place of the loss in transformers' tuples
            if not isinstance(loss, Tensor) or loss.ndim > 0 or not loss.requires_grad:
                return None
            loss = add_losses(loss, self.whole.calls, call, self._share(bound))
            return type(output)(loss, *output[1:]) if hasattr(output, "_fields") else (loss, *output[1:])
        if not hasattr(output, "get"):
            return output
        terms = list(call.terms)
        if (loss := output.get("loss")) is not None:
            output["loss"] = add_losses(loss, self.whole.calls, call, self._share(bound))
        if is_of_supervised_trl(output):
            call.terms = terms
            labelled, log_probs = output["label_mask"], output["log_probs"]
            output["log_probs"] = add_losses_to_tokens(log_probs, labelled, self.whole.calls, call)
            call.terms = []
        return output

    def _share(self, bound: dict[str, Any]) -> Tensor | float:
        """Share of this forward pass in its optimiser step, if the caller gives the step's number of labels.

        The Trainer then lets the model divide by this number and does not divide by the accumulation steps. In models
        that do not divide either, the gradient of the auxiliary losses grows like that of the task loss.
        """
        total, labels = bound.get("num_items_in_batch"), bound.get("labels")
        if total is None or labels is None or not self.divides:
            return 1.0
        return (labels != -100).sum() / total


@torch._dynamo.disable(reason="auxiliary losses are lost where compiled code checkpoints blocks")
def _refuse_lost_losses() -> None:
    raise ValueError(
        "torch.compile together with gradient_checkpointing loses the adapter's auxiliary losses, and training "
        "would go on without them. Turn one of the two off, or set the weights of the auxiliary losses "
        "(balance_loss_weight, denoise_weight, margin_weight, compact_weight) to 0."
    )


def is_of_supervised_trl(output: Any) -> bool:
    """Whether TRL's SFTTrainer will compute its loss from the output's log-probabilities.

    Its outputs have a field that reward trainers do not request (is_top1), and none of those that preference trainers
    add (mean_logits). For preference trainers the sum over tokens does not give the weight of the loss.
    """
    given = {name for name in ("log_probs", "label_mask", "is_top1", "mean_logits") if output.get(name) is not None}
    return given == {"log_probs", "label_mask", "is_top1"} and output["log_probs"].requires_grad


def holders(model: nn.Module, layers: list[PromptLayer]) -> list[nn.Module]:
    """The modules of a model that contain whole blocks with prompts, and may be called separately."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[int, nn.Module] = {}
    for layer in layers:
        path = paths.get(id(layer.site.block), "")  # no path: a block of one of pMoE's further backbones
        while path:
            path = path.rpartition(".")[0]
            module = model.get_submodule(path)
            # Checkpointed stages run again in the backward pass, where no forward pass starts.
            if not isinstance(module, (nn.ModuleList, nn.ModuleDict, GradientCheckpointingLayer)):
                found[id(module)] = module
    return list(found.values())
