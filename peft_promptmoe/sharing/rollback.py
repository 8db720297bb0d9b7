# SPDX-License-Identifier: Apache-2.0
"""Restores a model when loading an adapter into it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..adapter_state import AdapterState
from .load_checks import refuse_strangers, saved_embeddings

# Attributes that PEFT and transformers' own loader set on a model besides the adapter.
MARKS = ("peft_config", "_hf_peft_config_loaded", "_weight_conversions")


class Unread:
    """An adapter that was added to a model but not yet loaded from its file.

    PEFT adds an adapter before it reads the file. If the file is refused, the model must be restored.

    Args:
        tuner: the tuner that adds the adapter.
        adapter: name of the adapter.
        replaced: config of another method's adapter of the same name, which this one replaced in PEFT's register.
    """

    def __init__(self, tuner: Any, adapter: str, replaced: Any = None) -> None:
        self.tuner, self.adapter, self._replaced = tuner, adapter, replaced
        modules = list(tuner.model.modules())
        self._before = {id(module) for module in modules}
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in tuner.model.parameters()]
        switched = (module for module in modules if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)))
        self._active = [(module, module._active_adapter) for module in switched]
        self._marks = {name: vars(tuner.model)[name] for name in MARKS if name in vars(tuner.model)}
        # A loader may replace tensors. The old ones are held for this load only, to free their memory afterwards.
        self._held = [_Held(module, name) for module in modules for name in _names(module)] if is_loading() else []

    def settle(self) -> None:
        """Check what transformers' own loader changed besides the adapter, and freeze again what must not train.

        Raises:
            ValueError: it replaced tensors other than embeddings.
        """
        allowed = saved_embeddings(self.tuner.model)
        paths = {id(module): path for path, module in self.tuner.model.named_modules()}
        replaced = [f"{paths[id(held.module)]}.{held.name}" for held in self._held if held.is_replaced]
        refuse_strangers([name for name in replaced if not name.startswith(allowed)])
        self._held = []
        for module in self.tuner.model.modules():
            if isinstance(module, AdapterState):
                module.freeze_kept(self.adapter)

    def take_back(self) -> None:
        """Remove the adapter from the model, and restore everything else."""
        model = self.tuner.model
        for held in self._held:
            held.put_back()
        for module in list(model.modules()):
            if id(module) in self._before:
                self._drop(module)
        self.tuner.take_out([layer for layer in self.tuner.layers() if id(layer) not in self._before])
        while new := [item for item in model.named_modules() if self._is_new_wrapper(item[1])]:
            path, wrapper = new[0]
            model.set_submodule(path, wrapper.original_module)
        for module, active in self._active:
            if module._active_adapter != active:
                module._active_adapter = active
        for parameter, required in self._requires_grad:
            parameter.requires_grad_(required)
        self.tuner.peft_config.pop(self.adapter, None)
        if self._replaced is not None:
            self.tuner.peft_config[self.adapter] = self._replaced
        for name in MARKS:
            vars(model).pop(name, None)
        vars(model).update(self._marks)

    def _is_new_wrapper(self, module: nn.Module) -> bool:
        return isinstance(module, AuxiliaryTrainingWrapper) and id(module) not in self._before

    def _drop(self, module: nn.Module) -> None:
        """Delete the adapter from a module. PEFT's `delete_adapter` would also change the active adapter."""
        if isinstance(module, AdapterState):
            for name in module.adapter_layer_names + module.other_param_names:
                if self.adapter in (held := getattr(module, name)):
                    del held[self.adapter]
        elif isinstance(module, AuxiliaryTrainingWrapper) and self._replaced is None:
            copies = getattr(module, "modules_to_save", {})
            if self.adapter in copies:
                del copies[self.adapter]
            module._adapters.discard(self.adapter)


class _Held:
    """A tensor of the base model, with its module and name."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.tensor = self._now()

    def _now(self) -> Tensor | None:
        return self.module._parameters.get(self.name, self.module._buffers.get(self.name))

    @property
    def is_replaced(self) -> bool:
        return self._now() is not self.tensor

    def put_back(self) -> None:
        if self.is_replaced:
            place = self.module._parameters if self.name in self.module._parameters else self.module._buffers
            place[self.name] = self.tensor  # type: ignore[assignment]


def _names(module: nn.Module) -> list[str]:
    return [*module._parameters, *module._buffers]


@dataclass
class Load:
    """A load of an adapter from a file, while it runs.

    Attributes:
        adapter: name that the adapter gets.
        made: adapters that this load added to a model.
        remarks: sentences to add to an error, such as which base model the adapter was made for.
    """

    adapter: str
    made: list[Unread] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


_running: ContextVar[Load | None] = ContextVar("running", default=None)


def running_load() -> Load | None:
    """The load from a file that is running, or None."""
    return _running.get()


def is_loading() -> bool:
    return _running.get() is not None


def note_made(unread: Unread) -> None:
    """Note an adapter that was added to a model, so that it can be removed if the running load fails."""
    if (load := _running.get()) is not None:
        load.made.append(unread)


@contextmanager
def all_or_nothing(adapter: str, looks: bool) -> Iterator[None]:
    """Context manager: if the block fails, remove the adapters that it added.

    Args:
        adapter: name of the adapter that the block loads.
        looks: whether to check at the end which other tensors were loaded. Needed for transformers' own loader, which
            cannot be checked before.

    Raises:
        ValueError: a tensor of a saved module is missing (PEFT raises a bare KeyError), or the file held tensors that
            belong to no adapter.
    """
    load = Load(adapter)
    token = _running.set(load)
    try:
        yield
        for unread in load.made if looks else ():
            unread.settle()
    except BaseException as error:
        for unread in load.made:
            unread.take_back()
        if load.made and isinstance(error, KeyError):
            raise ValueError(
                f"The adapter file lacks {error.args[0]!r}, a tensor of a module that is saved with the adapter. Load "
                "it onto the model that it was made for, or save it again."
            ) from error
        more = [said for said in load.remarks if said not in str(error)]
        if more and type(error) in (ValueError, RuntimeError):
            raise type(error)(" ".join([str(error), *more])) from error
        raise
    finally:
        _running.reset(token)
