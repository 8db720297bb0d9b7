# SPDX-License-Identifier: Apache-2.0
"""The part of a model card that tells a stranger how to load the adapter.

Without `import peft_promptmoe` PEFT does not know the tuner type and every way of loading ends in a bare
`KeyError: 'MEPT'`. Neither PEFT nor transformers reads entry points, so the card has to say it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from .config import PromptConfig

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


def write_card(config: PromptConfig, folder: str | os.PathLike[str]) -> None:
    """Put the section on loading into the model card in `folder`, above what the card already says.

    A card that has the section is left as it is, so user edits survive saving again.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard(_header(config))
    if MARKER in card.content:
        return
    method = str(getattr(config.peft_type, "value", config.peft_type))
    section = SECTION.format(marker=MARKER, method=method, load=_load(config))
    card.text = "\n" + section + "\n" + card.text.lstrip("\n")
    card.save(path)


def _load(config: PromptConfig) -> str:
    labels, weights = getattr(config, "card_num_labels", 2), getattr(config, "card_timm_weights", None)
    if weights is not None:
        size = getattr(config, "card_image_size", None)
        arguments = f", num_classes={labels}" + (f", img_size={size}" if size is not None else "")
        return LOAD_TIMM.format(
            weights=weights,
            arguments=arguments,
            preparation=config.card_preparation(),
            config=", config=config" if config.card_preparation() else "",
        )
    auto_class = AUTO_CLASSES.get(str(config.task_type or ""), "AutoPeftModel")
    # The head of the base checkpoint may be of another size; the adapter brings its own.
    arguments = f", num_labels={labels}, ignore_mismatched_sizes=True" if labels != 2 else ""
    if config.card_preparation():
        arguments = f", config=config{arguments}"
    return LOAD.format(auto_class=auto_class, arguments=arguments, preparation=config.card_preparation())


def _header(config: PromptConfig) -> str:
    base = config.base_model_name_or_path
    data = ModelCardData(library_name="peft", tags=["peft_promptmoe"], base_model=base if _on_hub(base) else None)
    return f"---\n{data.to_yaml()}\n---\n"


def _on_hub(name: str | None) -> bool:
    """A local path is no base model id; the Hub refuses cards that name one."""
    return bool(name) and not os.path.exists(str(name))
