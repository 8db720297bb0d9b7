# SPDX-License-Identifier: Apache-2.0
"""The part of a model card that tells a stranger how to load the adapter.

Without `import peft_promptmoe` PEFT does not know the tuner type and every way of loading ends in a bare
`KeyError: 'MEPT'`. Neither PEFT nor transformers reads entry points, so the card has to say it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

MARKER = "<!-- peft_promptmoe: how to load this adapter -->"

AUTO_CLASSES = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}

SECTION = """{marker}

## How to load this adapter

This is a {method} adapter. Install peft_promptmoe and import it once before
loading; without the import PEFT ends in `KeyError: '{method}'`.

```
pip install peft-promptmoe
```

```python
import peft_promptmoe  # registers {method} with PEFT
{load}
```
"""

LOAD = """from peft import {auto_class}

adapter = "."  # this folder, or the id of this repository on the Hub
{preparation}model = {auto_class}.from_pretrained(adapter{arguments})"""

# timm's classes have no from_pretrained, so PEFT's auto classes cannot make the base model.
LOAD_TIMM = """import timm
from peft import PeftModel

adapter = "."  # this folder, or the id of this repository on the Hub
base = timm.create_model({weights!r}, pretrained=True{arguments})
{preparation}model = PeftModel.from_pretrained(base, adapter{config})"""


@dataclass(frozen=True)
class BaseModelCard:
    """What the snippet has to say of the base model.

    Attributes:
        num_labels: outputs of its head.
        timm_weights: name and tag of timm's weights; None for models of transformers.
        image_size: rows and columns of pixels, where they are not the usual ones of timm's weights; else None.
        own_class: whether it is a class of this package, which PEFT imports only where it is told to.
    """

    num_labels: int = 2
    timm_weights: str | None = None
    image_size: tuple[int, int] | None = None
    own_class: bool = False


@dataclass(frozen=True)
class CardValues:
    """What the section on loading says.

    Attributes:
        method: name of the tuner type.
        task_type: PEFT's, or None.
        base_model: name or path of the base model.
        base: what the snippet says of it.
        preparation: lines that make `config`, where loading needs more than the adapter's folder; else empty.
    """

    method: str
    task_type: str | None
    base_model: str | None
    base: BaseModelCard
    preparation: str = ""


def base_model_card(model: Any) -> BaseModelCard:
    """Read off a model what its snippet has to say."""
    if type(model).__module__.split(".")[0] == __package__.split(".")[0]:
        return BaseModelCard(own_class=True)
    timm = getattr(model, "pretrained_cfg", None)
    if not timm or hasattr(model, "config"):
        return BaseModelCard(getattr(getattr(model, "config", None), "num_labels", 2))
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    usual = tuple(timm.get("input_size", ()))[1:]
    return BaseModelCard(
        num_labels=getattr(model, "num_classes", 0),
        timm_weights=".".join(part for part in (timm.get("architecture"), timm.get("tag")) if part),
        image_size=(own[0], own[1]) if own is not None and tuple(own) != usual else None,
    )


def write_card(values: CardValues, folder: str | os.PathLike[str]) -> None:
    """Put the section on loading into the model card in `folder`, above what the card already says.

    A card that has the section is left as it is, so user edits survive saving again.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard(_header(values.base_model))
    if MARKER in card.content:
        return
    section = SECTION.format(marker=MARKER, method=values.method, load=_load(values))
    card.text = "\n" + section + "\n" + card.text.lstrip("\n")
    card.save(path)


def _load(values: CardValues) -> str:
    base, preparation = values.base, values.preparation
    if base.timm_weights is not None:
        arguments = f", num_classes={base.num_labels}"
        arguments += f", img_size={base.image_size}" if base.image_size is not None else ""
        return LOAD_TIMM.format(
            weights=base.timm_weights,
            arguments=arguments,
            preparation=preparation,
            config=", config=config" if preparation else "",
        )
    auto_class = AUTO_CLASSES.get(str(values.task_type or ""), "AutoPeftModel")
    # The head of the base checkpoint may be of another size; the adapter brings its own.
    arguments = f", num_labels={base.num_labels}, ignore_mismatched_sizes=True" if base.num_labels != 2 else ""
    if base.own_class:
        arguments = ', import_allowlist=["peft_promptmoe"]'
    if preparation:
        arguments = f", config=config{arguments}"
    return LOAD.format(auto_class=auto_class, arguments=arguments, preparation=preparation)


def _header(base: str | None) -> str:
    data = ModelCardData(library_name="peft", tags=["peft_promptmoe"], base_model=base if _on_hub(base) else None)
    return f"---\n{data.to_yaml()}\n---\n"


def _on_hub(name: str | None) -> bool:
    """A local path is no base model id; the Hub refuses cards that name one."""
    return bool(name) and not os.path.exists(str(name))
