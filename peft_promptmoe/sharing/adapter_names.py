# SPDX-License-Identifier: Apache-2.0
"""Refuses adapter names that would make the names of weights ambiguous."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..adapter_state import PROMPT_CHILD

# Parts of the name of every saved tensor, in any model.
ALWAYS = {"base_model", "model", "shared", "weight", "bias"}


def check_adapter_name(name: str, prefix: str) -> None:
    """Raise ValueError if an adapter name would make weights ambiguous in a file."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"An adapter name must be a non-empty string, got {name!r}.")
    if "." in name or "/" in name or "\\" in name:
        raise ValueError(f"The adapter name {name!r} must not contain '.', '/' or '\\'. Use '_' or '-' instead.")
    if prefix in name or name in prefix or name == PROMPT_CHILD:
        raise ValueError(
            f"The adapter name {name!r} overlaps the parameter prefix {prefix!r} or the module name {PROMPT_CHILD!r}, "
            "which mark prompts in adapter files. Choose another name."
        )


def check_apart(name: str, model: nn.Module) -> None:
    """Raise ValueError if an adapter name is also the name of a module in the model.

    When PEFT saves one adapter, it leaves out every tensor whose name has another adapter's name between dots. With an
    adapter called "1", layer 1 would be missing from the files of all other adapters.
    """
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    within = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, wrappers))
    paths = [path for path, _ in model.named_modules() if not path.startswith(within)]
    if name in ALWAYS.union(*(path.split(".") for path in paths)):
        raise ValueError(
            f"The adapter name {name!r} is also the name of a module of the model. PEFT would leave this module's "
            "tensors out when it saves another adapter. Choose another name."
        )
