# SPDX-License-Identifier: Apache-2.0
"""Base classes of the method configs: shared fields, value checks, saving and the model card."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_args

from peft import PeftConfig

from .field_types import Layers, TokenIds
from .sharing.base_model import BaseModelCard
from .sharing.base_record import check_record
from .sharing.model_card import CardValues, write_card, write_card_of_run

# Far above any useful setting, and low enough that a config from a stranger cannot ask for the machine's memory.
MAX_SLOTS_PER_LAYER = 16_384
MAX_LAYERS = 10_000
MAX_INTEGER = 2**63  # from here on torch multiplies no tensor by one


@dataclass
class PromptConfig(PeftConfig):
    """Base of the method configs.

    Args:
        target_modules: attention layers that get prompts, as in PEFT: a list of name endings or a regular expression.
            Unset: chosen by the model's architecture.
        exclude_modules: attention layers to leave out, in the same form.
        layers_to_transform: numbers of the blocks to prompt, counted from 0: a list or one number. Unset: all blocks.
        layers_pattern: name of the module list that holds the blocks. Set it if the first number in a module's path is
            not the number of the block.
        modules_to_save: other modules to train and save with the adapter, usually a head.
        trainable_token_indices: vocabulary tokens whose embeddings are trained and saved, as in PEFT: a list of token
            ids, or a dict from names of embedding layers to such lists. Tied output embeddings change with them.
        init_weights: True for the method's initialisation, False for large random values (for tests).
        check_base_weights: whether to store a cheap hash of the base model's weights with the adapter. A warning is
            then given when the adapter is loaded onto a model of the same shape with other weights.
        base_record: description of the base model (type, width, depth, classes, hash). Filled in by `get_peft_model`
            and checked when the adapter is loaded.
    """

    # Position of the prompt keys for rotary embeddings and T5 biases. A method that offers a choice makes it a field.
    prompt_positions: ClassVar[str] = "unrotated"
    # Whether the frozen base model stays in evaluation mode in training. A field in methods that offer the choice.
    backbone_eval: ClassVar[bool] = False
    # What the model card says about the base model. The tuner sets it; it is not saved with the config.
    card_base: ClassVar[BaseModelCard] = BaseModelCard()

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Attention layers that get prompts. Unset: chosen by architecture."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Attention layers to leave out."})
    layers_to_transform: Layers = field(
        default=None, metadata={"help": "Numbers of the blocks to prompt, from 0. Unset: all blocks."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list in which layers_to_transform counts."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and save with the adapter, usually a head."}
    )
    trainable_token_indices: TokenIds = field(
        default=None, metadata={"help": "Token ids whose embeddings are trained and saved too."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True: the method's initialisation. False: large random values (tests)."}
    )

    check_base_weights: bool = field(
        default=True, metadata={"help": "Whether to warn if the base model has other weights at loading."}
    )
    base_record: dict[str, Any] | None = field(
        default=None, metadata={"help": "Description of the base model. Filled in automatically."}
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse unknown fields, and suggest the field that was probably meant.

        Raises:
            TypeError: the config has no such field. The message starts like Python's own: PEFT looks for these words
                when it loads a config file with unknown fields, and then leaves such fields out.
        """
        known = inspect.signature(cls.__init__).parameters
        if odd := [name for name in kwargs if name not in known]:
            said = f"{cls.__name__}.__init__() got an unexpected keyword argument {odd[0]!r}"
            raise TypeError(f"{said}. {_meant(cls, odd[0], list(known)[1:])}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        # PEFT takes TaskType.SEQ_CLS and "SEQ_CLS" for the same, but str() gives different texts for them.
        self.task_type = getattr(self.task_type, "value", self.task_type)
        check_bool("inference_mode", self.inference_mode)
        check_bool("init_weights", self.init_weights)
        check_bool("check_base_weights", self.check_base_weights)
        check_record(self.base_record)
        check_names("modules_to_save", self.modules_to_save)
        check_patterns("modules_to_save", self.modules_to_save)
        check_token_ids("trainable_token_indices", self.trainable_token_indices)
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            check_names(name, value, alone=True)
            if isinstance(value, str) or name == "layers_pattern":
                check_patterns(name, value)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        layers = self.layers_to_transform
        if layers is not None:
            several = layers if isinstance(layers, (list, tuple, set, range)) else [layers]
            check_int("the number of layers_to_transform", len(several), 0, MAX_LAYERS)
            for layer in several:
                check_int("layers_to_transform", layer, 0)
        if self.layers_pattern and layers is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect: layers_to_transform is unset. Set "
                "layers_to_transform, or leave layers_pattern out."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a dict. Sets become sorted lists, so that every process writes the same bytes.

        PEFT's task wrappers add the names of heads to `modules_to_save` at every load. Each name is written once.
        """
        fields = {
            name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()
        }
        if isinstance(fields.get("modules_to_save"), list):
            fields["modules_to_save"] = list(dict.fromkeys(fields["modules_to_save"]))
        return fields

    def card_preparation(self) -> str:
        """Lines of the model card's snippet that make `config`. Empty if the adapter's folder is enough to load it."""
        return ""

    def card_values(self) -> CardValues:
        """What the model card needs to say how this adapter is loaded."""
        return CardValues(
            method=str(getattr(self.peft_type, "value", self.peft_type)),
            task_type=self.task_type,
            base_model=self.base_model_name_or_path,
            base=self.card_base,
            preparation=self.card_preparation(),
            settings=self.card_settings(),
        )

    def card_settings(self) -> dict[str, Any]:
        """The method's numbers, switches and choices. Names and patterns are left out: they may hold any text."""
        inherited = {each.name for each in fields(PromptConfig)}
        named = [each.name for each in fields(self) if each.name not in inherited]
        return {name: value for name in named if isinstance(value := getattr(self, name), (int, float, str))}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json`, and add to the model card the code that loads the adapter."""
        super().save_pretrained(str(save_directory), **kwargs)
        write_card(self.card_values(), save_directory)
        write_card_of_run(self.card_values(), save_directory)


@dataclass
class VirtualTokensConfig(PromptConfig):
    """Base of the configs of methods that add prompts.

    Args:
        num_virtual_tokens: number of prompt slots per layer, P. A slot is the place of one prompt token.
    """

    num_virtual_tokens: int = field(default=10, metadata={"help": "Number of prompt tokens (slots) per layer, P."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("num_virtual_tokens", self.num_virtual_tokens, 1, MAX_SLOTS_PER_LAYER)


def _meant(cls: type, name: str, known: list[str]) -> str:
    """The end of the message about an unknown field: which field to use instead."""
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return f"Did you mean {close[0]!r}?"
    others = [each.__name__ for each in _configs(PromptConfig) if name in {own.name for own in fields(each)}]
    if others:
        return f"It is a field of {' and '.join(others)}."
    return f"help({cls.__name__}) names its fields."


def _configs(cls: type) -> list[Any]:
    """The method configs derived from a class."""
    below: list[type] = cls.__subclasses__()
    return [each for child in below for each in _configs(child)] or [cls]


def check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise TypeError if `value` is not an int (or is a bool), ValueError if it is not in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {limits}, got {value}.")


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise TypeError if `value` is no number (or a bool), ValueError if it is not finite or not in [low, high)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if isinstance(value, int) and abs(value) >= MAX_INTEGER:
        raise ValueError(f"{name} must be an integer that fits a tensor (below 2**63), or a float.")
    if not math.isfinite(value) or value < low or (open_low and value == low) or value >= high:
        above = f"greater than {low}" if open_low else f"at least {low}"
        below = "finite" if high == math.inf else f"below {high}"
        raise ValueError(f"{name} must be {above} and {below}, got {value}.")


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError if `value` is not a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise TypeError if `value` is not a string, ValueError if it is not in `choices` (a `Literal` or a tuple)."""
    choices = choices if isinstance(choices, tuple) else get_args(choices)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_names(name: str, value: Any, *, alone: bool = False) -> None:
    """Raise TypeError if `value` is not None or a list, tuple or set of strings. `alone` also allows one string."""
    if value is None or (alone and isinstance(value, str)):
        return
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name} must be a list of names, got {value!r}.")


def check_patterns(name: str, value: Any) -> None:
    """Raise ValueError if a string in `value` (None, one string or several) is not a valid regular expression."""
    for pattern in [value] if isinstance(value, str) else value or ():
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{name} holds {pattern!r:.200}, which is not a regular expression: {error}.") from error


def check_token_ids(name: str, value: Any) -> None:
    """Raise TypeError if `value` is not None, a list of integers or a dict of such lists, ValueError for bad ids."""
    lists = list(value.values()) if isinstance(value, dict) else [] if value is None else [value]
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} must have names of embedding layers as keys, got {value!r:.200}.")
    for ids in lists:
        if not isinstance(ids, list) or any(isinstance(each, bool) or not isinstance(each, int) for each in ids):
            raise TypeError(
                f"{name} must be a list of token ids, or a dict from names to such lists, got {ids!r:.200}."
            )
        if not ids or len(set(ids)) < len(ids) or not 0 <= min(ids) <= max(ids) < MAX_INTEGER:
            raise ValueError(f"{name} must list token ids of at least 0, each of them once, got {ids!r:.200}.")
