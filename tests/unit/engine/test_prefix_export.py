# SPDX-License-Identifier: Apache-2.0
"""A static prompt as PEFT's own prefix: the same logits in a process that knows nothing of this package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from peft import get_peft_model
from torch import Tensor, nn

from peft_promptmoe import MEPTConfig, export_prefix

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18]])
MASK = torch.tensor([[1] * 7, [1, 1, 1, 1, 1, 0, 0]])

ELSEWHERE = """
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base, adapter, out, ids, mask = sys.argv[1], sys.argv[2], sys.argv[3], torch.load(sys.argv[4]), torch.load(sys.argv[5])
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    whole = model(input_ids=ids).logits
    padded = model(input_ids=ids, attention_mask=mask).logits
assert "peft_promptmoe" not in sys.modules
save_file({"whole": whole, "padded": padded}, out)
"""


def prompted(name: str, **settings: Any) -> nn.Module:
    base = Case("mept", name, "token", "sdpa").base()
    config = MEPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_experts=1, init_weights=False, **settings)
    return get_peft_model(base, config).eval()


def elsewhere(base: Any, tmp_path: Path) -> dict[str, Tensor]:
    """What the folder gives in a process without the package."""
    from safetensors.torch import load_file

    base.save_pretrained(tmp_path / "base")
    torch.save(IDS, tmp_path / "ids")
    torch.save(MASK, tmp_path / "mask")
    paths = [str(tmp_path / each) for each in ("base", "prefix", "out", "ids", "mask")]
    environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", ELSEWHERE, *paths], check=True, env=environment, cwd=tmp_path)
    return load_file(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"num_shared_experts": 2, "routing": "token"}),
        ("qwen3", {"prompt_positions": "unrotated", "routing": "sample"}),
    ],
    ids=["llama", "llama-three-tables", "qwen3-unrotated"],
)
def test_the_exported_folder_loads_without_this_package(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = prompted(name, **settings)
    export_prefix(model, tmp_path / "prefix")
    assert sorted(path.name for path in (tmp_path / "prefix").iterdir()) >= [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    found = elsewhere(Case("mept", name, "token", "sdpa").base(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(found["whole"], model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
        padded = model(input_ids=IDS, attention_mask=MASK).logits
        torch.testing.assert_close(found["padded"][MASK.bool()], padded[MASK.bool()], rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            assert (model(input_ids=IDS).logits - found["whole"]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gpt2", {}, "no rotary positions"),
        ("bloom", {}, "no rotary positions"),
        ("mistral", {}, "has a sliding window"),
        ("llama", {"num_experts": 2}, "depend on the input"),
        ("llama", {"layers_to_transform": [1]}, "prompts 1 of 2 layers"),
        ("llama", {"modules_to_save": ["lm_head"]}, "saved modules"),
        ("deepseek_v3", {}, "keys and values of one shape"),
        ("llama4", {}, "has a sliding window|no rotary"),
    ],
    ids=["gpt2", "bloom", "mistral", "routed", "layers", "saved", "deepseek_v3", "llama4"],
)
def test_what_a_prefix_cannot_be_is_refused(name: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = Case("mept", name, "token", "sdpa").base()
    config = MEPTConfig(task_type="CAUSAL_LM", **{"num_virtual_tokens": 3, "num_experts": 1} | settings)
    model = get_peft_model(base, config)
    with pytest.raises(ValueError, match=message):
        export_prefix(model, tmp_path / "prefix")
    assert not (tmp_path / "prefix").exists()


def test_logits_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason, as where a model scales its queries by position."""
    model = prompted("llama")
    attention = model.get_base_model().model.layers[1].self_attn
    attention.q_proj.register_forward_hook(lambda module, args, output: output * (1.0 + float(seen["texts"] > 1)))
    seen = {"texts": 0}
    model.get_base_model().register_forward_pre_hook(lambda *_: seen.update(texts=seen["texts"] + 1))
    with pytest.raises(ValueError, match="the logits differ"):
        export_prefix(model, tmp_path / "prefix")
    assert not (tmp_path / "prefix").exists()


def test_a_model_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter"):
        export_prefix(Case("mept", "llama", "token", "sdpa").base(), tmp_path)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        export_prefix(prompted("llama"), tmp_path, "other")
