# SPDX-License-Identifier: Apache-2.0
"""README's quick start as it stands there, and which of its experts take texts that it has not seen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
UNSEEN = {
    "billing": [
        "Why is there a second payment on my account?",
        "Can I pay by bank transfer?",
        "The receipt shows another amount",
        "I want my money back",
        "Your price is not the one you advertised",
        "My subscription was renewed without asking",
        "Please send me last month's invoice",
        "The discount was not applied",
    ],
    "technical": [
        "The update froze my phone",
        "I cannot open the settings page",
        "The upload stops halfway",
        "My password reset link is broken",
        "No sound in video calls",
        "The website does not load",
        "The printer is not found",
        "Files disappear after saving",
    ],
}


def quick_start() -> list[str]:
    """The two scripts of README's quick start: the one that trains and the one that loads."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Quick start")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def measured_routing() -> dict[str, Any]:
    """Train in a folder of its own, load, and record the routing of `UNSEEN`."""
    import torch
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    from peft_promptmoe import record_routing

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", quick_start()[0]], cwd=folder, check=True, env=os.environ)
        model = AutoPeftModelForSequenceClassification.from_pretrained(f"{folder}/adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(model.get_base_model().name_or_path)
    labels = [name for name, texts in UNSEEN.items() for _ in texts]
    texts = [text for group in UNSEEN.values() for text in group]
    with torch.no_grad(), record_routing(model, labels=labels) as record:
        chosen = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(-1).tolist()
    right = sum(list(UNSEEN)[each] == label for each, label in zip(chosen, labels, strict=True))
    return {
        "classes": record.classes,
        "texts": len(texts),
        "right": right,
        "share": [[[round(one, 4) for one in layer] for layer in way] for way in record.pathways().tolist()],
    }
