# SPDX-License-Identifier: Apache-2.0
"""Restoring a model when an adapter cannot be loaded into it."""

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

# What PEFT and transformers' own loader write on a model besides the adapter.
MARKS = ("peft_config", "_hf_peft_config_loaded", "_weight_conversions")


class Unread:
    """An adapter that is put into a model and of which nothing is known to have been loaded or used.

    PEFT makes an adapter before it reads the file; when the file is refused, the model has to become what it was.

    Args:
        tuner: that is about to put it in.
        adapter: its name.
        replaced: config of another method's adapter of that name, which PEFT's register has lost to this one's.
    """

    def __init__(self, tuner: Any, adapter: str, replaced: Any = None) -> None:
        self.tuner, self.adapter, self._replaced = tuner, adapter, replaced
        modules = list(tuner.model.modules())
        self._before = {id(module) for module in modules}
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in tuner.model.parameters()]
        switched = (module for module in modules if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)))
        self._active = [(module, module._active_adapter) for module in switched]
        self._marks = {name: vars(tuner.model)[name] for name in MARKS if name in vars(tuner.model)}
        # A loader puts new tensors in the place of old ones. Held for one load, lest old ones stay in memory.
        self._held = [_Held(module, name) for module in modules for name in _names(module)] if is_loading() else []

    def settle(self) -> None:
        """Check what transformers' own loader has put into the model besides the adapter, and freeze what it thawed.

        Raises:
            ValueError: it was more than embeddings.
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
        """Take the adapter out of the model again."""
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
        """As PEFT's `delete_adapter`, which would choose another active adapter than the one that was."""
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
    """A tensor of the base model and its place."""

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
    """A running load of an adapter from a file.

    Attributes:
        adapter: the name it gets.
        made: adapters that were put into a model for it.
        remarks: what to add to an error, such as which base model the adapter was made for.
    """

    adapter: str
    made: list[Unread] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


_running: ContextVar[Load | None] = ContextVar("running", default=None)


def running_load() -> Load | None:
    """The load from a file that this call is part of; None while a user builds or fills a model by hand."""
    return _running.get()


def is_loading() -> bool:
    return _running.get() is not None


def note_made(unread: Unread) -> None:
    """Note an adapter that was put into a model, in case this is part of a load that fails."""
    if (load := _running.get()) is not None:
        load.made.append(unread)


@contextmanager
def all_or_nothing(adapter: str, looks: bool) -> Iterator[None]:
    """Take the adapters that were made within the block out again if it fails.

    Args:
        adapter: name of the adapter that the block loads.
        looks: whether to look at the end for what else has been loaded, where a loader asks nobody before.

    Raises:
        ValueError: a tensor of a saved module is missing, for which PEFT has a bare KeyError; or the file has brought
            tensors that are no adapter's.
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
                f"The adapter file lacks {error.args[0]!r}, which its config says is saved with it."
            ) from error
        more = [said for said in load.remarks if said not in str(error)]
        if more and type(error) in (ValueError, RuntimeError):
            raise type(error)(" ".join([str(error), *more])) from error
        raise
    finally:
        _running.reset(token)
