# SPDX-License-Identifier: Apache-2.0
"""Checks of what is loaded into an adapter: it comes whole, of the right shapes, finite and alone, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .layer import CHILD
from .state import AdapterState

ALIGNMENT = 64  # bytes, torch's own for tensors on the CPU
FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}  # which are loaded as one another


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
        self._is_first = getattr(model, CHILD, None) is None
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        holders = (module for module in model.modules() if isinstance(module, (AdapterState, ModulesToSaveWrapper)))
        self._active = [(module, module._active_adapter) for module in holders]
        self._marks = {name: vars(model)[name] for name in TRANSFORMERS_MARKS if name in vars(model)}

    def take_back(self) -> None:
        """Take the adapter out of the model again."""
        model = self.tuner.model
        if not self._is_first:
            self._drop()
        elif getattr(model, CHILD, None) is not None:
            wrapped = [item for item in model.named_modules() if isinstance(item[1], ModulesToSaveWrapper)]
            self.tuner.unload()
            for path, wrapper in wrapped:
                if CHILD not in path.split("."):
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


def check_tensors(model: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Check the prompt tensors of a state dict before any of them is loaded.

    An adapter comes whole or not at all; PEFT alone would load what fits and pass over the rest.

    Raises:
        ValueError: tensors of an adapter are missing, superfluous, of another shape, or not finite.
    """
    expected: dict[str, dict[str, Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, AdapterState):
            for name, tensor in module.state_dict(prefix=f"{prefix}{path}.").items():
                adapter = name.rsplit(".", 2)[1]
                expected.setdefault(adapter, {})[name] = tensor
    known = {name: tensor for tensors in expected.values() for name, tensor in tensors.items()}
    given = {name for name in state_dict if name.startswith(prefix) and f"{CHILD}." in name}
    if unknown := sorted(given - known.keys()):
        raise ValueError(
            f"The adapter file holds {len(unknown)} prompt tensors that this model has no place for, for example "
            f"{unknown[0]!r}. It was trained on a model with other layers, or its adapter_config.json is not its own."
        )
    for adapter, tensors in expected.items():
        if given.isdisjoint(tensors):
            continue
        if missing := sorted(tensors.keys() - given):
            raise ValueError(_lacks(adapter, missing, len(tensors)))
        for name, tensor in tensors.items():
            _check_tensor(name, state_dict[name], tensor)
            state_dict[name] = aligned(state_dict[name])


def check_read(model: nn.Module, adapter: str) -> None:
    """Check what transformers' own loader has read: it passes over missing tensors and does not look at values.

    Raises:
        ValueError: some of the adapter's tensors were read and others not, or some are not finite.
    """
    tensors = {
        f"{path}.{name}": tensor
        for path, state in model.named_modules()
        if isinstance(state, AdapterState)
        # Not by state_dict(), at which FSDP would take back the weights that it has just gathered for this forward.
        for name, tensor in chain(state.named_parameters(), state.named_buffers())
        if name.rsplit(".", 2)[1] == adapter
    }
    read = {name for name, tensor in tensors.items() if getattr(tensor, "_is_hf_initialized", False)}
    if read and (missing := sorted(tensors.keys() - read)):
        raise ValueError(_lacks(adapter, missing, len(tensors)))
    for name in sorted(read):
        _check_tensor(name, tensors[name], tensors[name])
        tensors[name].data = aligned(tensors[name].data)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor where vector instructions want it; tensors in a file's own memory stand anywhere.

    Matrix products round differently there, and a loaded adapter should answer bit by bit what the saved one did.
    """
    return tensor if tensor.is_meta or tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _lacks(adapter: str, missing: list[str], total: int) -> str:
    return (
        f"The adapter file lacks {len(missing)} of the {total} prompt tensors of adapter {adapter!r}, for example "
        f"{missing[0]!r}. It was trained on a model with fewer layers, or it is damaged."
    )


def check_strangers(model: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Refuse tensors in an adapter file that are no adapter's: by them a file could overwrite the base model.

    Embeddings are let through; PEFT saves them with an adapter when the vocabulary has grown.

    Raises:
        ValueError: the file holds prompt tensors and others that belong to no adapter, head or embedding.
    """
    names = [name for name in state_dict if name.startswith(prefix)]
    base = {f"{prefix}{name}" for name in model.state_dict() if f"{CHILD}." not in name}
    if base.issubset(names):  # a checkpoint of the whole model, which a user loads knowingly
        return
    ours = [name for name in names if f"{CHILD}." in name]
    allowed = {id(embedding.weight) for embedding in _embeddings(model)}
    known = {f"{prefix}{name}" for name, tensor in model.named_parameters() if id(tensor) in allowed}
    strangers = sorted(n for n in names if n not in ours and n not in known and ".modules_to_save." not in n)
    if strangers:
        raise ValueError(
            f"The adapter file holds {len(strangers)} tensors that are neither prompts nor saved modules, for example "
            f"{strangers[0]!r}. An adapter must not bring weights of the base model; do not trust this file."
        )


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    for which in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found = getattr(model, which)()
        except (AttributeError, NotImplementedError):  # a model that has none
            continue
        if hasattr(found, "weight"):
            yield found


def _check_tensor(name: str, given: Any, expected: Tensor) -> None:
    if given.dtype != expected.dtype and not {given.dtype, expected.dtype} <= FLOATS:
        raise ValueError(f"{name!r} holds {given.dtype} in the adapter file and {expected.dtype} in the model.")
    if tuple(given.shape) != tuple(expected.shape):
        raise ValueError(
            f"{name!r} has shape {tuple(given.shape)} in the adapter file and {tuple(expected.shape)} in the model: "
            "the adapter was trained with other settings (num_virtual_tokens and the like) than its config says, or "
            "on a model of another width."
        )
    if not given.is_meta and not bool(torch.isfinite(given).all()):
        raise ValueError(f"{name!r} holds values that are not finite; the adapter file is damaged.")
