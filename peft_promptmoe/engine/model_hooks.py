# SPDX-License-Identifier: Apache-2.0
"""Hooks on the base model: shared state, training mode, start and end of a forward pass, checks of loaded tensors."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapter_state import PROMPT_CHILD, SharedLayer
from ..config import PromptConfig
from ..models.patches import Patches
from ..models.sites import Site
from ..routing.auxiliary_loss import own_losses
from ..routing.balance_loss import BALANCE
from ..routing.prompt_call import CallBook, PromptCall
from ..sharing.load_checks import check_read, check_strangers, check_tensors
from ..sharing.rollback import Unread, note_made, running_load
from . import continuous_batching
from .called_module import CalledModule, holders
from .checkpointed import CheckpointedModule, checkpointed_modules
from .grid_book import GridBook
from .image_size import image_size_checks
from .prompt_layer import PromptLayer

TIMM_INNER = "timm_model"


class ModelHooks(nn.Module):
    """Child module of the base model that hooks its forward passes and its `load_state_dict`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls = CallBook()
        self.last_losses: dict[tuple[str, str, str], Tensor] = {}  # of the last forward pass that had any
        self._handles: list[Any] = []
        self._inner: list[Any] = []  # handles of hooks on modules inside the model
        self._layers: list[PromptLayer] = []
        self._unread: dict[str, Unread] = {}
        self._model = (model,)  # a tuple, so that it is not registered as a submodule
        self._grid_books: list[GridBook] = []
        self._held: list[nn.Module] = []  # modules in evaluation mode because of backbone_eval

    def attach(self, model: nn.Module) -> None:
        model.add_module(PROMPT_CHILD, self)
        continuous_batching.guard(model, self)
        self._handles = [
            *CalledModule(self, model).attach(model),
            model.register_load_state_dict_pre_hook(self._before_load),
        ]

    def detach(self, model: nn.Module) -> None:
        for handle in (*self._handles, *self._inner):
            handle.remove()
        for book in self._grid_books:
            book.detach()
        self._release()
        continuous_batching.release(model)
        delattr(model, PROMPT_CHILD)

    @property
    def layers(self) -> list[PromptLayer]:
        """The current prompt layers of the model."""
        return self._layers

    def grid_book(self, patches: Patches) -> GridBook:
        """The record of the patch grids of a patch embedding. There is one per embedding."""
        for book in self._grid_books:
            if book.patches.embedding is patches.embedding:
                return book
        book = GridBook(patches)
        book.attach()
        self._grid_books.append(book)
        return book

    def shared_layer(self, cls: type[SharedLayer], method: str, site: Site) -> SharedLayer:
        """The state that all layers of a method share. Created at the first call."""
        if not hasattr(self, "shared"):  # only when needed: T5 has a module of this name, which PEFT may look for
            self.shared = nn.ModuleDict()
        if method not in self.shared:
            self.shared[method] = cls(site.attention, site.width)
        return self.shared[method]  # type: ignore[return-value]

    def disown(self, method: str, layers: list[PromptLayer]) -> None:
        """Forget layers of a method, and drop their shared state when no layer is left."""
        self._know([layer for layer in self._layers if layer not in layers])
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
        """Set the mode. This child of the base model runs last, so it can keep frozen modules in evaluation."""
        super().train(mode)
        if not mode:
            for layer in self._layers:
                layer.settle()
        self._held = []  # the model around this has just set the mode of all modules
        self.hold()
        return self

    def hold(self) -> None:
        """Keep frozen modules in evaluation mode while the model trains, if an active adapter has backbone_eval."""
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
        """Register the prompt layers of the model and a new adapter. Called after each injection."""
        self._know(prompt_layers(model))
        self._unread[unread.adapter] = unread
        note_made(unread)
        self.hold()

    def _know(self, layers: list[PromptLayer]) -> None:
        """Register the current prompt layers of the model, and hook the modules that contain them."""
        for handle in self._inner:
            handle.remove()
        self._layers, self._inner = layers, []
        model = self._model[0]
        for layer in layers:
            layer.calls = self.calls
            layer.meet(layers)
        self._inner += [check.attach() for check in image_size_checks(model, layers)]
        for module in holders(model, layers):
            if module is not model:
                self._inner += CalledModule(self, module).attach(module)
        for module, inside in checkpointed_modules(model, layers).items():
            self._inner.append(CheckpointedModule(inside).attach(module))

    @property
    def last_balance_loss(self) -> float | None:
        """Mean of the routers' weighted balance losses in the last forward pass that had any."""
        values = [float(value) for (_, _, name), value in self.last_losses.items() if name == BALANCE]
        return sum(values) / len(values) if values else None

    def begin(self) -> PromptCall:
        """Start a forward pass of the whole model or of a module inside it."""
        if not torch.compiler.is_compiling():
            if self._unread:
                for adapter in self._unread:
                    check_read(self._model[0], adapter)
                self._unread = {}
            if self._model[0].training:
                self.hold()  # the active adapter may have changed
        call = self.calls.begin()
        for layer in self._layers:
            for name in layer.adapters_of(call):
                # timm models pass no arguments on to their layers, and refuse unknown ones.
                call.asks |= layer.needs_call(name) and not layer.site.is_timm
                call.reads_query |= layer.reads_query(name)
                pools = layer.pools_rows(name) and layer.site.patches is None and not layer.site.is_timm
                call.pools_rows |= pools
                call.pools_causal |= pools and layer.site.causal
                call.leaves_word |= layer.leaves_word(name)
                call.adds_losses |= layer.adds_losses(name)
        if call.leaves_word:
            for method, layers in self._with_word().items():
                method.before_training(layers)
        return call

    def end(self, call: PromptCall, done: bool) -> None:
        """End a forward pass, also after an error."""
        self.calls.end(call)
        if not torch.compiler.is_compiling():
            for layer in self._layers:
                layer.notes.forget()
        if done and call.leaves_word:
            for method, layers in self._with_word().items():
                method.after_training(layers)

    def _with_word(self) -> dict[type[PromptLayer], list[PromptLayer]]:
        """The layers that store an update in the current mode, by method."""
        found: dict[type[PromptLayer], list[PromptLayer]] = {}
        for layer in self._layers:
            if any(map(layer.leaves_word, layer.working_adapters())):
                found.setdefault(type(layer), []).append(layer)
        return found

    def _before_load(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        self._unread = {}
        for name in [name for name in state_dict if name.startswith(f"{prefix}{TIMM_INNER}.{PROMPT_CHILD}.")]:
            # transformers' wrapper of timm models takes every name without its own prefix for the inner model's.
            state_dict[name.replace(f"{TIMM_INNER}.", "", 1)] = state_dict.pop(name)
        check_tensors(model, state_dict, prefix)
        load = running_load()
        if load is not None and isinstance(getattr(model, "peft_config", {}).get(load.adapter), PromptConfig):
            check_strangers(model, state_dict, prefix, load.adapter)


def prompt_layers(model: nn.Module) -> list[PromptLayer]:
    """The prompt layers of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, PromptLayer)]


def find_hooks(model: nn.Module) -> ModelHooks | None:
    """The hooks on a model, or on the base model inside it. None if there is no adapter of this package."""
    return next((module for module in model.modules() if isinstance(module, ModelHooks)), None)


def last_balance_loss(model: nn.Module) -> float | None:
    """Mean of the routers' weighted balance losses in the last forward pass that had any. None without one."""
    hooks = find_hooks(model)
    return hooks.last_balance_loss if hooks is not None else None


def last_aux_losses(model: nn.Module) -> dict[str, float]:
    """Return the auxiliary losses of the last forward pass that had any, by name, as means over layers.

    ProMotion: "denoise", "denoise_ratio" (divided by the noise's variance), "margin" and "compact", without weights.
    Routers: "balance", multiplied by `balance_loss_weight`.
    """
    hooks = find_hooks(model)
    found: dict[str, list[float]] = {}
    for (_, _, name), value in hooks.last_losses.items() if hooks is not None else ():
        found.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in found.items()}


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Return the weighted sum of the auxiliary losses of the last training forward pass, to add to your own loss.

    You do not need it if you train on the model's own `outputs.loss` or with TRL's `SFTTrainer`: their gradient
    already includes the auxiliary losses. Trainers that compute their own loss from logits or log-probabilities (DPO,
    KTO, GRPO) leave them out: add this in `compute_loss`. Auxiliary losses never count twice: with this sum they no
    longer contribute to the gradient of `outputs.loss`.

    Args:
        model: a model with an adapter of this package.

    Returns:
        A scalar, from the last forward pass in this thread. 0 in evaluation mode and in `torch.no_grad`. Its gradient
        reaches the layers with both kinds of gradient checkpointing.

    Raises:
        ValueError: the model has no such adapter, or its forward was compiled: use `outputs.loss` then.

    Example:

        ```py
        >>> class Trainer(DPOTrainer):
        ...     def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        ...         loss = super().compute_loss(model, inputs, **kwargs)
        ...         return loss + auxiliary_loss(model)  # GRPO: / self.current_gradient_accumulation_steps
        ```
    """
    hooks = find_hooks(model)
    if hooks is None:
        raise ValueError("The model has no adapter of peft_promptmoe, so there are no auxiliary losses.")
    total = own_losses(hooks.calls) if model.training else None
    return total if total is not None else torch.zeros((), device=next(model.parameters()).device)


def set_frozen_eval(module: nn.Module) -> list[nn.Module]:
    """Put frozen modules of a training model into evaluation mode, which turns off dropout and stochastic depth.

    Modules with gradient checkpointing stay in training mode, because transformers checkpoints in this mode only; the
    modules inside them do not. Linear layers also stay in training mode, see `set_eval`.

    Returns:
        The modules whose mode was changed.
    """
    changed = []
    for child in module.children():
        parameters = list(child.parameters())
        trained = bool(parameters) and all(parameter.requires_grad for parameter in parameters)
        if trained or isinstance(child, BaseTunerLayer | nn.Linear):
            continue
        if child.training and not hasattr(child, "gradient_checkpointing"):
            child.training = False
            changed.append(child)
        changed += set_frozen_eval(child)
    return changed
