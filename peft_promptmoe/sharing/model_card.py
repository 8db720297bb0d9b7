# SPDX-License-Identifier: Apache-2.0
"""The section of a model card that says what an adapter is and how to load it.

Without `import peft_promptmoe` PEFT does not know the tuner type, and loading fails with a bare `KeyError: 'MEPT'`.
Neither PEFT nor transformers reads entry points, so only the card can tell users about the import.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..version import __version__
from .base_model import BaseModelCard
from .card_usage import usage

MARKER = "<!-- peft_promptmoe: how to load this adapter -->"
END = "<!-- peft_promptmoe: end -->"
TAG = "peft_promptmoe"
REPOSITORY = "https://github.com/peft-promptmoe/peft_promptmoe"

AUTO_CLASSES = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}

SECTION = """{marker}

## How to load this adapter

This is a PEFT adapter of type {method} for {base}. It was saved by peft_promptmoe {version}. Install peft_promptmoe:

```
pip install "peft-promptmoe @ git+{repository}"
```

Import it before you load the adapter. Without the import PEFT raises `KeyError: '{method}'`.

```python
import peft_promptmoe  # registers {method} with PEFT
{load}
```
{note}{usage}
Settings: {settings}.

{end}
"""

LOAD = """from peft import {auto_class}

adapter = "."  # this folder, or the id of this repository on the Hub
{preparation}model = {auto_class}.from_pretrained(adapter{arguments})"""

# timm models have no from_pretrained, so PEFT's auto classes cannot create the base model.
LOAD_TIMM = """import timm
from peft import PeftModel

adapter = "."  # this folder, or the id of this repository on the Hub
base = timm.create_model({weights!r}, pretrained={trained}{arguments})
{preparation}model = PeftModel.from_pretrained(base, adapter{config})"""

UNTRAINED = """
The base model had random weights when this adapter was made. The adapter works with exactly these weights only: load
them into `base` before the last line.
"""


@dataclass(frozen=True)
class CardValues:
    """The values that the section shows.

    Attributes:
        method: name of the tuner type.
        task_type: PEFT's task type, or None.
        base_model: name or path of the base model.
        base: description of the base model.
        preparation: code that makes `config`. Empty if the adapter's folder is enough to load it.
        settings: numbers, switches and choices of the config, by field.
    """

    method: str
    task_type: str | None
    base_model: str | None
    base: BaseModelCard
    preparation: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_card(values: CardValues, folder: str | os.PathLike[str]) -> None:
    """Add the section to the top of the model card in `folder`, and the tags to its header.

    An existing section is not changed, so that a user's edits survive saving again.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")
    if MARKER not in card.content:
        card.text = "\n" + _section(values) + "\n" + card.text.lstrip("\n")
    _label(card.data, values)
    card.save(path)


def write_card_of_run(values: CardValues, checkpoint: str | os.PathLike[str]) -> None:
    """Add the section to the card of a training run when one of its checkpoints is saved.

    TRL writes this card before the run's folder holds an adapter, and may push both together.
    """
    folder = Path(checkpoint)
    card = folder.parent / "README.md"
    if re.fullmatch(r"checkpoint-\d+", folder.name) and card.is_file():
        write_card(values, card.parent)


def carry_section(written: Path, card: Any) -> None:
    """Copy the section and its labels from an existing card to the card that will overwrite it.

    Args:
        written: path of the existing card.
        card: huggingface_hub's card that replaces it. Changed in place.
    """
    if MARKER in card.content or not written.is_file() or MARKER not in written.read_text(encoding="utf-8"):
        return
    old = ModelCard.load(written)
    found = re.search(f"{re.escape(MARKER)}.*?{re.escape(END)}\n?", old.content, re.DOTALL)
    if found is None:
        return
    card.text = "\n" + found[0] + "\n" + card.text.lstrip("\n")
    card.data.tags = sorted(_public(card.data.tags) | _public(old.data.tags))
    card.data.library_name = old.data.library_name
    for name in ("pipeline_tag", "base_model"):
        if not getattr(card.data, name, None) and getattr(old.data, name, None):
            setattr(card.data, name, getattr(old.data, name))


def _label(data: Any, values: CardValues) -> None:
    """Set tags, pipeline and base model in a card's header. A local path is left out: it is private and no Hub id."""
    data.tags = sorted({*_public(data.tags), TAG, values.method.lower()})
    data.library_name = "peft"
    if not data.pipeline_tag:
        data.pipeline_tag = _pipeline(values)
    given = [data.base_model] if isinstance(data.base_model, str) else list(data.base_model or ())
    public = [name for name in given if _is_on_hub(name)]
    if not public and values.base.timm_weights is not None:
        public = [f"timm/{values.base.timm_weights}"]
    if not public and _is_on_hub(values.base_model):
        public = [str(values.base_model)]
    data.base_model = public[0] if len(public) == 1 else public or None


def _pipeline(values: CardValues) -> str | None:
    if values.task_type is None:
        return "image-classification" if values.base.classifies_images else None
    return PIPELINES.get(str(values.task_type))


def _section(values: CardValues) -> str:
    settings = ", ".join(f"`{name}={value!r}`" for name, value in values.settings.items())
    base = values.base
    untrained = base.timm_weights is not None and not base.trained
    return SECTION.format(
        marker=MARKER,
        end=END,
        method=values.method,
        repository=REPOSITORY,
        version=__version__,
        base=_name_of_base(values),
        load=_load(values),
        note=UNTRAINED if untrained else "",
        usage=usage(values.task_type, base),
        settings=settings or "the defaults",
    )


def _name_of_base(values: CardValues) -> str:
    if values.base.timm_weights is not None:
        return f"timm's `{values.base.timm_weights}`"
    if _is_on_hub(values.base_model):
        return f"`{values.base_model}`"
    return "a base model from a local folder (`base_model_name_or_path` in `adapter_config.json`)"


def _load(values: CardValues) -> str:
    base, preparation = values.base, values.preparation
    if base.timm_weights is not None:
        arguments = f", num_classes={base.num_labels}"
        arguments += f", img_size={base.image_size}" if base.resized else ""
        return LOAD_TIMM.format(
            weights=base.timm_weights,
            trained=base.trained,
            arguments=arguments,
            preparation=preparation,
            config=", config=config" if preparation else "",
        )
    auto_class = AUTO_CLASSES.get(str(values.task_type or ""), "AutoPeftModel")
    arguments = ", config=config" if preparation else ""
    if base.own_class:
        arguments += ', import_allowlist=["peft_promptmoe"]'
    if base.class_names:
        arguments += f", id2label={dict(enumerate(base.class_names))}"
    elif base.num_labels != 2:
        arguments += f", num_labels={base.num_labels}"
    # The head of the base checkpoint may have another size. The adapter has its own head.
    if base.num_labels != 2:
        arguments += ", ignore_mismatched_sizes=True"
    return LOAD.format(auto_class=auto_class, arguments=arguments, preparation=preparation)


def _public(tags: list[str] | None) -> set[str]:
    """The tags without PEFT's tag of the base model if that tag is a local path."""
    prefix = "base_model:adapter:"
    return {tag for tag in tags or () if not tag.startswith(prefix) or _is_on_hub(tag.removeprefix(prefix))}


def _is_on_hub(name: str | None) -> bool:
    """Whether a name can be a Hub repository. The Hub refuses cards that name a path."""
    return (
        bool(name) and re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", str(name)) is not None and not os.path.exists(str(name))
    )
