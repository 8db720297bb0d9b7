# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers: sentences are encoded, trained on and loaded with adapters, beside LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from small import SIZES, WORDS, adapters, fill, scaled, tokenizer

CLIENT = "sentence-transformers"
TEXTS = [" ".join(WORDS[i : i + length]) for i, length in enumerate((3, 12, 7, 1))]
KINDS = list(adapters("FEATURE_EXTRACTION"))


def make(folder: Path) -> SentenceTransformer:
    """Over a folder with a bare BERT; it adds mean pooling itself."""
    if not folder.exists():
        torch.manual_seed(0)
        scaled(transformers.BertModel(transformers.BertConfig(**SIZES))).save_pretrained(folder)
        tokenizer(pairs=True).save_pretrained(folder)
    return SentenceTransformer(str(folder), device="cpu")


def by_hand(model: Any) -> torch.Tensor:
    """Mean of the last hidden states over a sentence's own tokens, one sentence at a time."""
    found = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = model(**tokenizer(pairs=True)(text, return_tensors="pt")).last_hidden_state
        found.append(hidden[0].mean(0))
    return torch.stack(found)


@pytest.mark.parametrize("kind", KINDS)
def test_sentences_are_encoded_and_learned(kind: str, tmp_path: Path) -> None:
    """`add_adapter` works; `encode` of a padded batch equals the mean over each sentence alone, to 1e-5; training
    reduces the loss; `save` and loading give the same embeddings.
    """
    model = make(tmp_path / "base")
    base = by_hand(model[0].auto_model.eval())
    model.add_adapter(adapters("FEATURE_EXTRACTION")[kind])
    fill(model)
    encoded = model.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(encoded, by_hand(model[0].auto_model.eval()), rtol=1e-5, atol=1e-5)
    assert (encoded - base).abs().max() > 1e-2
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained and all("lora" in name or "mept" in name for name in trained)
    anchors = [" ".join(WORDS[3 * i : 3 * i + 4]) for i in range(16)]
    pairs = datasets.Dataset.from_dict({"anchor": anchors, "positive": [f"{text} w55 w54" for text in anchors]})
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"),
        max_steps=20,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(model, args, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]  # of the same sixteen pairs
    model.save(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(
        again.encode(TEXTS, convert_to_tensor=True), model.encode(TEXTS, convert_to_tensor=True), rtol=1e-6, atol=1e-6
    )
