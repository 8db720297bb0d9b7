# SPDX-License-Identifier: Apache-2.0
"""Registration of out-of-tree tuner types with PEFT.

PEFT finds methods by members of the `PeftType` enum. Its `register_peft_method` does everything except adding the
member. This module adds the member and then calls `register_peft_method`; nothing else in PEFT has to change.
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
    """Return the `PeftType` member called `name`. If PEFT does not have it, add it to the enum first.

    The new member behaves like PEFT's own: lookup by attribute, item and value, iteration, `in`, hashing, pickling and
    JSON work. `type.__setattr__` is needed because the enum's metaclass refuses assignment of members.

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

    Registering the same classes again (second import, reload) does no harm.

    Args:
        config_cls: the method's config class.
        tuner_cls: the method's tuner class; its `prefix` must be `name.lower() + "_"`.
        name: upper-case name of the method.

    Raises:
        RuntimeError: the name or the prefix is already used by PEFT or by another package. PEFT itself notices a used
            name late and a used prefix never. With a shared prefix the weights of two methods could not be told apart.
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
    """Make PEFT use the classes of a reloaded module. They are new objects with the old names."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[member] = tuner_cls


def keep_cards() -> None:
    """Wrap all writers of model cards, so that the section about the adapter is kept.

    There are three writers: PEFT when it saves (an empty template), the Trainer when it pushes (its own text, then
    PEFT's), and code that saves a card of huggingface_hub over an existing one (`push_to_hub` of models, TRL's
    trainers). None of them calls code of this package. The wrappers do nothing for adapters of other methods.
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
        write_card(config.card_values(), output_dir)  # first, so that PEFT does not start from its template
        update(self, output_dir)
        write_card(config.card_values(), output_dir)  # again, because PEFT rewrites the header

    @functools.wraps(save)
    def save_and_keep(self: RepoCard, filepath: Path | str) -> None:
        carry_section(Path(filepath), self)
        save(self, filepath)

    update_and_keep.keeps_cards = True  # type: ignore[attr-defined]
    PeftModel.create_or_update_model_card = update_and_keep  # type: ignore[method-assign]
    RepoCard.save = save_and_keep  # type: ignore[method-assign]


def undo_failed_loads() -> None:
    """Wrap the loaders of PEFT and transformers, so that a failed load leaves the model unchanged.

    Both add an adapter first and read its file afterwards. If the file cannot be read or a head does not fit, they
    call no code of this package. The wrappers do nothing for adapters of other methods, or for adapters that were in
    the model before.
    """
    if getattr(PeftModel.load_adapter, "undoes", False):
        return
    from_pretrained = PeftModel.__dict__["from_pretrained"].__func__
    PeftModel.from_pretrained = classmethod(_undoing(from_pretrained))  # type: ignore[assignment,method-assign]
    PeftModel.load_adapter = _undoing(PeftModel.load_adapter)  # type: ignore[method-assign]
    mixin: Any = PeftAdapterMixin
    mixin.load_adapter = _undoing(mixin.load_adapter, looks=True)


def explain_auto_models() -> None:
    """Wrap PEFT's `AutoPeftModel`, so that it says what to do if it cannot create an adapter's base model.

    It reads class and name of the base model from the adapter, and fails with an error about one of them. The wrapper
    does nothing for adapters of other methods, or if there is no error.
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
            fix = f"Create that model and call PeftModel.from_pretrained(model, {str(path)!r:.200})."
            raise ValueError(f"{said} {fix}") from error

    make_or_explain.explains = True  # type: ignore[attr-defined]
    auto.from_pretrained = classmethod(make_or_explain)


def _cannot_make(config: PeftConfig) -> str | None:
    """Why `AutoPeftModel` cannot create the base model of an adapter of this package. None if there is no reason."""
    if not isinstance(config, PromptConfig):
        return None
    library, name = (
        str((config.auto_mapping or {}).get("parent_library", "")).split(".")[0],
        config.base_model_name_or_path,
    )
    if library == "timm":
        how = f"timm.create_model({name!r:.200}, pretrained=True)" if name else "timm.create_model"
        return f"AutoPeftModel makes models of transformers, but the adapter's base model is one of timm ({how})."
    if library not in ("", "transformers", "peft_promptmoe"):
        return f"AutoPeftModel makes models of transformers, but the adapter's base model is one of {library}."
    if not name:
        return "The adapter's config does not name its base model, so AutoPeftModel cannot load it."
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
