# SPDX-License-Identifier: Apache-2.0
"""Registration of out-of-tree tuner types with PEFT.

PEFT looks its methods up by members of the `PeftType` enum and offers `register_peft_method` for everything but the
member itself. This module adds the member and then calls the stock function, so that nothing else in PEFT needs to
know where a method comes from.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard
from peft import PeftConfig, PeftModel, PeftType
from peft.auto import _BaseAutoPeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from transformers.integrations.peft import PeftAdapterMixin

from .config import PromptConfig
from .sharing.model_card import carry_section, write_card
from .sharing.rollback import all_or_nothing


def ensure_peft_type(name: str) -> PeftType:
    """Return the `PeftType` member called `name`, adding it to the enum when PEFT does not have it.

    The member is a real one: lookup by attribute, item and value, iteration, `in`, hashing, pickling and JSON behave
    as for PEFT's own. `type.__setattr__` is needed because the enum's metaclass refuses assignment of members.

    Args:
        name: upper-case name of the method, for example `"MEPT"`.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


def register_tuner(config_cls: type[PeftConfig], tuner_cls: type[BaseTuner], name: str) -> None:
    """Register a tuner type under `name` and the parameter prefix of its tuner class.

    Registering the same classes twice (a second import, a reload) does nothing.

    Args:
        config_cls: the method's config class.
        tuner_cls: the method's tuner class; its `prefix` must be `name.lower() + "_"`.
        name: upper-case name of the method.

    Raises:
        RuntimeError: the name or the prefix is held by PEFT itself or by another package. PEFT notices a taken name
            late and a taken prefix never, and a shared prefix would mix the weights of two methods in one file.
    """
    keep_cards()
    undo_failed_loads()
    explain_auto_models()
    member = ensure_peft_type(name)
    holder = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if holder is not None:
        if (holder.__module__, holder.__qualname__) == (config_cls.__module__, config_cls.__qualname__):
            _rebind(member, config_cls, tuner_cls)
            return
        raise RuntimeError(
            f"PEFT already maps the method name {name!r} to {holder.__module__}.{holder.__qualname__}, so "
            f"{config_cls.__module__} cannot register its own. Uninstall one of the two packages, or upgrade "
            f"peft_promptmoe if PEFT now ships {name} itself."
        )
    for other, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        if prefix == tuner_cls.prefix:
            raise RuntimeError(
                f"The parameter prefix {prefix!r} of {name} is already used by the PEFT method {other}. Uninstall the "
                "package that registered it; two methods with one prefix cannot tell their weights apart."
            )
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=tuner_cls)


def _rebind(member: PeftType, config_cls: type[PeftConfig], tuner_cls: type[BaseTuner]) -> None:
    """Point PEFT at the classes of a reloaded module, which are new objects with the old names."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[member] = tuner_cls


def keep_cards() -> None:
    """Let what a card says of an adapter survive everybody who writes cards.

    There are three: PEFT when it saves (from a template of blanks), the Trainer when it pushes (its own text over the
    card, then PEFT's), and whoever saves a card of huggingface_hub over the one that is there (`push_to_hub` of
    models, TRL's trainers). None of them asks anything of ours. The wrappers do nothing for adapters of other methods.
    """
    if getattr(PeftModel.create_or_update_model_card, "keeps_cards", False):
        return
    update, save = PeftModel.create_or_update_model_card, RepoCard.save

    @functools.wraps(update)
    def update_and_keep(self: PeftModel, output_dir: str) -> None:
        config = self.peft_config.get("default")
        if not isinstance(config, PromptConfig):
            update(self, output_dir)
            return
        os.makedirs(output_dir, exist_ok=True)
        write_card(config.card_values(), output_dir)  # before PEFT takes its template
        update(self, output_dir)
        write_card(config.card_values(), output_dir)  # PEFT sets the header anew

    @functools.wraps(save)
    def save_and_keep(self: RepoCard, filepath: Path | str) -> None:
        carry_section(Path(filepath), self)
        save(self, filepath)

    update_and_keep.keeps_cards = True  # type: ignore[attr-defined]
    PeftModel.create_or_update_model_card = update_and_keep  # type: ignore[method-assign]
    RepoCard.save = save_and_keep  # type: ignore[method-assign]


def undo_failed_loads() -> None:
    """Let a model be what it was when an adapter could not be loaded into it, whatever the reason.

    PEFT and transformers make an adapter first and read its file then; where the file cannot be read, or a head does
    not fit, nothing of ours is asked. Hence the wrapper around their loaders; it does nothing for adapters of other
    methods, and for those that were in the model before.
    """
    if getattr(PeftModel.load_adapter, "undoes", False):
        return
    from_pretrained = PeftModel.__dict__["from_pretrained"].__func__
    PeftModel.from_pretrained = classmethod(_undoing(from_pretrained))  # type: ignore[assignment,method-assign]
    PeftModel.load_adapter = _undoing(PeftModel.load_adapter)  # type: ignore[method-assign]
    mixin: Any = PeftAdapterMixin
    mixin.load_adapter = _undoing(mixin.load_adapter, looks=True)


def explain_auto_models() -> None:
    """Say what to do where PEFT's `AutoPeftModel` cannot make an adapter's base model.

    It reads the model's class and name off the adapter and ends in an error about either. The wrapper does nothing
    for adapters of other methods, or where there is no error.
    """
    auto: Any = _BaseAutoPeftModel
    if getattr(auto.from_pretrained, "explains", False):
        return
    make = auto.__dict__["from_pretrained"].__func__
    signature = inspect.signature(make)

    @functools.wraps(make)
    def make_or_explain(cls: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return make(cls, *args, **kwargs)
        except (AttributeError, OSError, ValueError) as error:
            given = signature.bind(cls, *args, **kwargs).arguments
            path, own = given["pretrained_model_name_or_path"], given.get("kwargs", {})
            said = _cannot_make(PeftConfig.from_pretrained(path, revision=given.get("revision"), **own))
            if said is None:
                raise
            fix = f"Make it yourself and call PeftModel.from_pretrained(model, {str(path)!r:.200})."
            raise ValueError(f"{said} {fix}") from error

    make_or_explain.explains = True  # type: ignore[attr-defined]
    auto.from_pretrained = classmethod(make_or_explain)


def _cannot_make(config: PeftConfig) -> str | None:
    """Why an adapter's base model cannot be made from what its config says; None if it is not one of ours, or can."""
    if not isinstance(config, PromptConfig):
        return None
    library, name = (
        str((config.auto_mapping or {}).get("parent_library", "")).split(".")[0],
        config.base_model_name_or_path,
    )
    if library == "timm":
        how = f"timm.create_model({name!r:.200}, pretrained=True)" if name else "timm.create_model"
        return f"AutoPeftModel makes models of transformers, and the adapter's base model is one of timm ({how})."
    if library not in ("", "transformers", "peft_promptmoe"):
        return f"AutoPeftModel makes models of transformers, and the adapter's base model is one of {library}."
    if not name:
        return "The adapter does not say what its base model is called, so AutoPeftModel cannot load that one."
    return None


def _undoing(load: Callable[..., Any], looks: bool = False) -> Callable[..., Any]:
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_or_undo(*args: Any, **kwargs: Any) -> Any:
        adapter = signature.bind(*args, **kwargs).arguments.get("adapter_name") or "default"
        with all_or_nothing(adapter, looks):
            return load(*args, **kwargs)

    load_or_undo.undoes = True  # type: ignore[attr-defined]
    return load_or_undo
