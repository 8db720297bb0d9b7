# SPDX-License-Identifier: Apache-2.0
"""A model becomes what it was when an adapter cannot be loaded into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft.utils import ModulesToSaveWrapper

from ..adapter_state import PROMPT_CHILD, AdapterState


class Unread:
    """An adapter that is put into a model and of which nothing is known to have been loaded or used.

    PEFT makes an adapter before it reads the file; when the file is refused, the model has to become what it was.

    Args:
        tuner: that is about to put it in.
        adapter: its name.

    Attributes:
        for_inference: whether the config says so, as it does when PEFT is about to read a file.
    """

    def __init__(self, tuner: Any, adapter: str) -> None:
        model = tuner.model
        self.tuner, self.adapter = tuner, adapter
        self.for_inference = bool(tuner.peft_config[adapter].inference_mode)
        self._is_first = getattr(model, PROMPT_CHILD, None) is None
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        holders = (module for module in model.modules() if isinstance(module, (AdapterState, ModulesToSaveWrapper)))
        self._active = [(module, module._active_adapter) for module in holders]
        self._marks = {name: vars(model)[name] for name in TRANSFORMERS_MARKS if name in vars(model)}

    def take_back(self) -> None:
        """Take the adapter out of the model again."""
        model = self.tuner.model
        if not self._is_first:
            self._drop()
        elif getattr(model, PROMPT_CHILD, None) is not None:
            wrapped = [item for item in model.named_modules() if isinstance(item[1], ModulesToSaveWrapper)]
            self.tuner.unload()
            for path, wrapper in wrapped:
                if PROMPT_CHILD not in path.split("."):
                    model.set_submodule(path, wrapper.original_module)
        for parameter, required in self._requires_grad:
            parameter.requires_grad_(required)
        for name in TRANSFORMERS_MARKS:
            vars(model).pop(name, None)
        vars(model).update(self._marks)

    def _drop(self) -> None:
        """As PEFT's `delete_adapter`, which would choose another active adapter than the one that was."""
        for module in self.tuner.model.modules():
            if isinstance(module, AdapterState):
                for name in module.adapter_layer_names + module.other_param_names:
                    if self.adapter in (held := getattr(module, name)):
                        del held[self.adapter]
            elif isinstance(module, ModulesToSaveWrapper) and self.adapter in module.modules_to_save:
                del module.modules_to_save[self.adapter]
                module._adapters.discard(self.adapter)
        for module, active in self._active:
            module._active_adapter = active
        self.tuner.peft_config.pop(self.adapter, None)


# What transformers' own loader writes on a model besides the adapter.
TRANSFORMERS_MARKS = ("_hf_peft_config_loaded", "_weight_conversions")


# Adapters that the running load has made.
_made: ContextVar[list[Unread] | None] = ContextVar("made", default=None)


def note_made(unread: Unread) -> None:
    """Note an adapter that was put into a model, in case this is part of a load that fails."""
    if (made := _made.get()) is not None:
        made.append(unread)


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """Take the adapters that were made within the block out again if it fails.

    Raises:
        ValueError: a tensor of a saved module is missing, for which PEFT has a bare KeyError.
    """
    made: list[Unread] = []
    token = _made.set(made)
    try:
        yield
    except BaseException as error:
        for unread in made:
            unread.take_back()
        if made and isinstance(error, KeyError):
            raise ValueError(
                f"The adapter file lacks {error.args[0]!r}, which its config says is saved with it."
            ) from error
        raise
    finally:
        _made.reset(token)
