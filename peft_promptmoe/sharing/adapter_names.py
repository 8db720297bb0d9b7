# SPDX-License-Identifier: Apache-2.0
"""Adapter names that are refused, because they would make the names of weights ambiguous."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..adapter_state import PROMPT_CHILD

# Parts of the names of all saved tensors, whatever the model.
ALWAYS = {"base_model", "model", "shared", "weight", "bias"}


def check_adapter_name(name: str, prefix: str) -> None:
    """Refuse adapter names under which weights could not be told apart in a file."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"An adapter's name must be a non-empty string, got {name!r}.")
    if "." in name or "/" in name or "\\" in name:
        raise ValueError(f"The adapter name {name!r} must not contain '.', '/' or '\\'; use '_' or '-' instead.")
    if prefix in name or name in prefix or name == PROMPT_CHILD:
        raise ValueError(
            f"The adapter name {name!r} overlaps the parameter prefix {prefix!r} or the module name {PROMPT_CHILD!r}, "
            "by which prompts are found in files. Choose another name."
        )


def check_apart(name: str, model: nn.Module) -> None:
    """Refuse adapter names that are part of a module's path.

    When PEFT saves another adapter it leaves out every tensor in whose name this one's stands between dots, so that
    layer 1 would be missing from all files for an adapter called "1".
    """
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    within = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, wrappers))
    paths = [path for path, _ in model.named_modules() if not path.startswith(within)]
    if name in ALWAYS.union(*(path.split(".") for path in paths)):
        raise ValueError(
            f"The adapter name {name!r} is also the name of a part of the model, and PEFT would take that part's "
            "tensors for this adapter's when it saves another one. Choose another name."
        )
