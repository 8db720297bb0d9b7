# SPDX-License-Identifier: Apache-2.0
"""The lines of a model card that run the loaded model on an input and show the shape of the output."""

from __future__ import annotations

from .base_model import BaseModelCard

TEXT = """
```python
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(model.get_base_model().name_or_path)
batch = tokenizer({text}, return_tensors="pt")
{then}
```
"""
IMAGE = """
```python
import torch

images = torch.rand(1, {channels}, {rows}, {columns})  # pixels, normalised as the base model expects
{then}
```
"""
CLASS = "scores = model(**batch).logits  # ({batch}, {labels})"
NAMED = "\nprint(model.get_base_model().config.id2label[int(scores[0].argmax())])"
GENERATED = "print(tokenizer.decode(model.generate(**batch, max_new_tokens=20)[0], skip_special_tokens=True))"


def usage(task_type: str | None, base: BaseModelCard) -> str:
    """Code block for the card, to run after the one that loads. Empty if the model's input is not known."""
    one = '"A text like those of the training data."'
    if task_type == "SEQ_CLS":
        then = CLASS.format(batch=1, labels=base.num_labels) + (NAMED if base.class_names else "")
        return TEXT.format(text=one, then=then)
    if task_type == "TOKEN_CLS":
        return TEXT.format(text=one, then=CLASS.format(batch="1, tokens", labels=base.num_labels))
    if task_type == "QUESTION_ANS":
        then = "output = model(**batch)  # start_logits and end_logits, (1, tokens) each"
        return TEXT.format(text='"A question?", "A text that contains the answer."', then=then)
    if task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return TEXT.format(text=one, then=GENERATED)
    if task_type == "FEATURE_EXTRACTION":
        return TEXT.format(text=one, then="states = model(**batch).last_hidden_state  # (1, tokens, width)")
    if base.classifies_images and base.image_size is not None:
        call = "model(images)" if base.timm_weights is not None else "model(pixel_values=images).logits"
        named = NAMED if base.class_names and base.timm_weights is None else ""
        then = f"scores = {call}  # (1, {base.num_labels}){named}"
        rows, columns = base.image_size
        return IMAGE.format(channels=base.channels, rows=rows, columns=columns, then=then)
    return ""
