# SPDX-License-Identifier: Apache-2.0
"""Hooks on the base model itself: what a forward tells its layers, the balance loss, checks of loaded tensors."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapter_state import PROMPT_CHILD, SharedLayer
from ..config import PromptConfig
from ..models.call_arguments import attention_mask
from ..models.inspection import accepts_keyword_arguments, divides_its_loss, parameter_names, unwrapped_forward
from ..models.patches import Patches
from ..models.query import query_of, refuse_packed_rows, warn_of_no_query
from ..models.sites import Site
from ..routing.balance_loss import add_balance_loss
from ..routing.prompt_call import PromptCall
from ..sharing.load_checks import check_read, check_strangers, check_tensors
from ..sharing.rollback import Unread, note_made, running_load
from .grid_book import GridBook
from .prompt_layer import PROMPT_CALL, PromptLayer

TIMM_INNER = "timm_model"


class ModelHooks(nn.Module):
    """Child of the base model that hooks its forward and its `load_state_dict`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._last_balance: tuple[Tensor, ...] = ()
        self._names = parameter_names(model)
        self._passes_on = accepts_keyword_arguments(model)
        self._divides = divides_its_loss(unwrapped_forward(model))
        self._looked = False
        self._handles: list[Any] = []
        self._layers: list[PromptLayer] = []
        self._unread: dict[str, Unread] = {}
        self._model = (model,)  # a tuple, so that it is no child
        self._grid_books: list[GridBook] = []
        self._held: list[nn.Module] = []  # in evaluation mode for an adapter's backbone_eval

    def attach(self, model: nn.Module) -> None:
        model.add_module(PROMPT_CHILD, self)
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
            model.register_load_state_dict_pre_hook(self._before_load),
        ]

    def detach(self, model: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        for book in self._grid_books:
            book.detach()
        self._release()
        delattr(model, PROMPT_CHILD)

    def grid_book(self, patches: Patches) -> GridBook:
        """The book of the grids that come through a patch embedding, one per embedding."""
        for book in self._grid_books:
            if book.patches.embedding is patches.embedding:
                return book
        book = GridBook(patches)
        book.attach()
        self._grid_books.append(book)
        return book

    def shared_layer(self, cls: type[SharedLayer], method: str, site: Site) -> SharedLayer:
        """What all layers of a method share, made when the first of them asks."""
        if not hasattr(self, "shared"):  # not before it is needed: T5 has a part of that name, which PEFT may look for
            self.shared = nn.ModuleDict()
        if method not in self.shared:
            self.shared[method] = cls(site.attention, site.width)
        return self.shared[method]  # type: ignore[return-value]

    def disown(self, method: str, layers: list[PromptLayer]) -> None:
        """Forget layers of a method, and drop what they shared when none is left."""
        self._layers = [layer for layer in self._layers if layer not in layers]
        left = [layer for layer in prompt_layers(self._model[0]) if layer not in layers]
        if method in getattr(self, "shared", ()) and not any(layer.method == method for layer in left):
            self.shared[method].close()  # type: ignore[operator]
            del self.shared[method]
        for book in list(self._grid_books):
            book.readers = [reader for reader in book.readers if reader not in layers]
            if not book.readers:
                book.detach()
                self._grid_books.remove(book)
        self.hold()

    def train(self, mode: bool = True) -> ModelHooks:
        """As the last child of the base model this hears of training mode last, and can keep the frozen part out."""
        super().train(mode)
        self._held = []  # whatever is above this has just set the mode of all
        self.hold()
        return self

    def hold(self) -> None:
        """Keep the frozen part in evaluation mode while the model trains and a working adapter asks for it."""
        working = [layer.prompt_config[name] for layer in self._layers for name in layer.working_adapters()]
        if not (self._model[0].training and any(config.backbone_eval for config in working)):
            self._release()
        elif not self._held:
            self._held = set_frozen_eval(self._model[0])

    def _release(self) -> None:
        for module in self._held:
            module.training = self._model[0].training
        self._held = []

    def watch(self, model: nn.Module, unread: Unread) -> None:
        """Note the prompt layers of the model and the adapter that came; called after each injection."""
        self._layers = prompt_layers(model)
        self._unread[unread.adapter] = unread
        note_made(unread)
        self.hold()

    @property
    def last_balance_loss(self) -> float | None:
        """Mean over the routers of their weighted balance terms in the last forward that had any."""
        values = [float(value) for value in self._last_balance]
        return sum(values) / len(values) if values else None

    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._unread and not torch.compiler.is_compiling():
            for adapter in self._unread:
                check_read(model, adapter)
            self._unread = {}
        if model.training and not torch.compiler.is_compiling():
            self.hold()  # another adapter may have been switched to since
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel copies a model together with its hooks, which belong to the original, so the copies "
                "would have the original's prompts. Use one process per device: torchrun or accelerate launch."
            )
        bound = dict(zip(self._names, args, strict=False)) | kwargs
        if any(layer.site.causal and any(map(layer.pools_rows, layer.working_adapters())) for layer in self._layers):
            refuse_packed_rows(bound)
        # timm's models hand nothing on to their layers, and would refuse what they do not know.
        asking = [layer for layer in self._layers if any(map(layer.needs_call, layer.working_adapters()))]
        asking = [layer for layer in asking if not layer.site.is_timm]
        if not asking or not self._passes_on:
            return None
        call = PromptCall()
        if any(layer.reads_query(name) for layer in asking for name in layer.working_adapters()):
            call.query = query_of(model, bound)
            self._look_at(call.query, bound, model)
        return args, {**kwargs, PROMPT_CALL: call}

    def _look_at(self, query: Tensor | None, bound: dict[str, Any], model: nn.Module) -> None:
        """Look once, in the first step of training, whether routers have anything to read."""
        if query is None or not model.training or self._looked or torch.compiler.is_compiling() or query.is_meta:
            return
        self._looked = True
        mask = attention_mask(bound)
        warn_of_no_query(query & mask.bool() if mask is not None and mask.ndim == 2 else query)

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = kwargs.get(PROMPT_CALL)
        if not isinstance(call, PromptCall) or not call.balance:
            return None
        self._last_balance = tuple(call.balance.values())
        if not torch.is_grad_enabled():
            return None
        if isinstance(output, tuple):
            has_loss = kwargs.get("labels") is not None
            return (add_balance_loss(output[0], call, self._share(kwargs)), *output[1:]) if has_loss else None
        loss = output.get("loss") if hasattr(output, "get") else None
        if loss is not None:
            output["loss"] = add_balance_loss(loss, call, self._share(kwargs))
        return output

    def _share(self, kwargs: dict[str, Any]) -> Tensor | float:
        """Share of this forward in its optimiser step, where the caller says how many labels the step has.

        The Trainer then leaves it to the model to divide by them and does not divide by the accumulation steps. Models
        that do not do so either have the balance loss's gradient grow with the task loss's.
        """
        total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
        if total is None or labels is None or not self._divides:
            return 1.0
        return (labels != -100).sum() / total

    def _before_load(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        self._unread = {}
        for name in [name for name in state_dict if name.startswith(f"{prefix}{TIMM_INNER}.{PROMPT_CHILD}.")]:
            # transformers' wrapper of timm models takes every name without its own in it for the inner model's.
            state_dict[name.replace(f"{TIMM_INNER}.", "", 1)] = state_dict.pop(name)
        check_tensors(model, state_dict, prefix)
        load = running_load()
        if load is not None and isinstance(getattr(model, "peft_config", {}).get(load.adapter), PromptConfig):
            check_strangers(model, state_dict, prefix, load.adapter)


def prompt_layers(model: nn.Module) -> list[PromptLayer]:
    """Prompt layers of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, PromptLayer)]


def last_balance_loss(model: nn.Module) -> float | None:
    """Mean of the routers' weighted balance terms in the last forward that had any; None without a balance loss."""
    for module in model.modules():
        if isinstance(module, ModelHooks):
            return module.last_balance_loss
    return None


def set_frozen_eval(module: nn.Module) -> list[nn.Module]:
    """Put what is frozen below a training module into evaluation mode: its dropout and stochastic depth are off.

    Modules that checkpoint stay in training mode, in which alone transformers checkpoints; their parts do not.

    Returns:
        The modules whose mode has changed.
    """
    changed = []
    for child in module.children():
        parameters = list(child.parameters())
        trained = bool(parameters) and all(parameter.requires_grad for parameter in parameters)
        if trained or isinstance(child, BaseTunerLayer):
            continue
        if child.training and not hasattr(child, "gradient_checkpointing"):
            child.training = False
            changed.append(child)
        changed += set_frozen_eval(child)
    return changed
