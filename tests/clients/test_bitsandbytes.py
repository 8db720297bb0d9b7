# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: prompts on a quantised model are those on the same model with its weights dequantised."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_process import hub_environment, run_python
from peft import PeftModel, prepare_model_for_kbit_training
from small import WORDS, adapted, adapters, fill, gradients, largest_difference, llama, saved, tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

CLIENT = "bitsandbytes"
ROOT = Path(__file__).parents[2]
CAUSAL = list(adapters("CAUSAL_LM"))


def quantised(folder: Path, bits: int) -> Any:
    if not folder.exists():
        llama().save_pretrained(folder)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings = {**four, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}
    config = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def batch() -> dict[str, torch.Tensor]:
    texts = [" ".join(WORDS[3 * i : 3 * i + length]) for i, length in enumerate((9, 5, 12))]
    inputs = dict(tokenizer()(texts, padding=True, padding_side="left", return_tensors="pt"))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-3] = -100
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}


def outcome(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    found = model(**batch())
    found.loss.backward()
    return found.logits.detach().float(), gradients(model)


@pytest.mark.parametrize("kind", CAUSAL)
def test_eight_bits_are_near_the_dequantised_model(kind: str, tmp_path: Path) -> None:
    """Weights in 8 bits (LLM.int8, which also rounds activations): logits are as near to those of the dequantised
    model as the base model's own. The saved adapter gives the same logits on another quantised copy.
    """
    base, plain = quantised(tmp_path / "base", 8), quantised(tmp_path / "base", 8).dequantize().float()
    assert any(type(module).__name__ == "Linear8bitLt" for module in base.modules())
    inputs = batch()
    with torch.no_grad():
        scatter = distance(base.eval()(**inputs).logits, plain.eval()(**inputs).logits)
    models = [adapted(model, adapters("CAUSAL_LM")[kind]).eval() for model in (base, plain)]
    for model in models:
        fill(model)
    with torch.no_grad():
        found, expected = (model(**inputs).logits for model in models)
        assert 0 < distance(found, expected) < 2 * scatter
        folder = saved(models[0], tmp_path / "adapter")
        again = PeftModel.from_pretrained(quantised(tmp_path / "base", 8), folder).eval()
        assert torch.equal(again(**inputs).logits, found)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())


@pytest.mark.parametrize("kind", CAUSAL)
def test_four_bits_are_the_dequantised_model(kind: str, tmp_path: Path) -> None:
    """Weights in 4 bits (nf4, double quantisation): logits and gradients equal those of the dequantised model to 1e-4,
    also after `prepare_model_for_kbit_training` with gradient checkpointing. The saved adapter gives the same
    logits on another quantised copy.
    """
    config = adapters("CAUSAL_LM")[kind]
    base = quantised(tmp_path / "base", 4)
    assert any(type(module).__name__ == "Linear4bit" for module in base.modules())
    prepared = prepare_model_for_kbit_training(quantised(tmp_path / "base", 4))
    plain = quantised(tmp_path / "base", 4).dequantize().float()
    models = {
        name: adapted(model, copy.deepcopy(config))
        for name, model in (("quantised", base), ("prepared", prepared), ("plain", plain))
    }
    found = {}
    for name, model in models.items():
        fill(model)
        found[name] = outcome(model)
    for name in ("quantised", "prepared"):
        torch.testing.assert_close(found[name][0], found["plain"][0], rtol=1e-4, atol=1e-4)
        assert largest_difference(found[name][1], found["plain"][1]) < 1e-3
    model = models["quantised"].eval()
    again = PeftModel.from_pretrained(quantised(tmp_path / "base", 4), saved(model, tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch()).logits, model(**batch()).logits)


def test_the_example_runs(tmp_path: Path) -> None:
    """`examples/four_bit.py` runs unchanged on a tiny model: it trains, saves, loads and generates."""
    script = ROOT / "examples" / "four_bit.py"
    environment = hub_environment(tmp_path / "hub")
    run_python(environment, tmp_path, str(ROOT / "tests" / "docs" / "run_examples.py"), "results.json", str(script))
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))[str(script)]
    assert found["error"] is None, found["error"]
    assert re.search(r"before: (.|\n)*tuned: ", found["printed"])
