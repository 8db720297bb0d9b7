# SPDX-License-Identifier: Apache-2.0
"""Vision towers with a form of their own: V-JEPA 2 turns its patches itself, EoMT brings queries and an odd mask."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import EomtConfig, EomtForUniversalSegmentation, VJEPA2Config, VJEPA2Model

from peft_promptmoe import MEPTConfig, VAPTConfig
from peft_promptmoe.engine.model_hooks import prompt_layers

P, QUERIES = 3, 5
_TOWER = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8}


def _shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.double().eval()


def eomt() -> Any:
    torch.manual_seed(0)
    settings = {"image_size": 32, "num_blocks": 2, "num_queries": QUERIES, "num_upscale_blocks": 1, "mlp_ratio": 2}
    return _shaken(EomtForUniversalSegmentation(EomtConfig(**_TOWER, **settings)))


def vjepa() -> Any:
    torch.manual_seed(0)
    settings = {"crop_size": 32, "frames_per_clip": 4, "tubelet_size": 2, "pred_hidden_size": 32, "mlp_ratio": 2}
    predictor = {"pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    return _shaken(VJEPA2Model(VJEPA2Config(**_TOWER, **settings, **predictor)))


def noise(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(5)).double()


def prompted(model: nn.Module) -> Any:
    """With one prompt set in each layer, open to all."""
    config = MEPTConfig(num_virtual_tokens=P, num_experts=1, num_shared_experts=0, init_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config).double().eval()


def heard_of(layer: Any, model: nn.Module, **inputs: Any) -> tuple[dict[str, Any], Tensor]:
    """What the attention layer is given by name, its input as `hidden_states`, and what it puts out."""
    heard: dict[str, Any] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        heard["given"] = kwargs | ({"hidden_states": args[0]} if args else {})
        heard["output"] = output[0]

    handle = layer.site.attention.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return heard["given"], heard["output"]


def rows_of(layer: Any) -> Tensor:
    scale = layer.prompt_config["default"].prompt_scale
    rows: Tensor = layer.site.norm(layer.mept_prompts["default"].weight.detach() * scale)
    return rows


def test_prompts_of_vjepa_stand_at_no_frame_and_no_place() -> None:
    model = vjepa()
    wrapped = prompted(model)
    layers: list[Any] = prompt_layers(wrapped)
    assert [layer.site.name for layer in layers] == [f"encoder.layer.{n}.attention" for n in range(4)]
    given, output = heard_of(layers[1], wrapped, pixel_values_videos=noise(2, 4, 3, 32, 32), skip_predictor=True)
    rows, x = rows_of(layers[1]), given["hidden_states"]
    wrapped.unload()
    attention = model.encoder.layer[1].attention

    def heads(projection: nn.Module, x: Tensor) -> Tensor:
        return projection(x).unflatten(-1, (4, -1)).transpose(1, 2)

    ids = attention.get_position_ids(x)
    query, key = (attention.apply_rotary_embeddings(heads(part, x), ids) for part in (attention.query, attention.key))
    key = torch.cat([heads(attention.key, rows).expand(2, -1, -1, -1), key], dim=2)
    value = torch.cat([heads(attention.value, rows).expand(2, -1, -1, -1), heads(attention.value, x)], dim=2)
    weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(dim=-1)
    with torch.no_grad():
        expected = attention.proj((weights @ value).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("block", [0, 3], ids=["patches", "queries"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_prompts_of_eomt_are_as_open_as_its_tokens(block: int, kernel: str) -> None:
    """Its mask adds 1 where attention is open."""
    model = eomt()
    model.set_attn_implementation(kernel)
    wrapped = prompted(model)
    layer: Any = prompt_layers(wrapped)[block]
    given, output = heard_of(layer, wrapped, pixel_values=noise(2, 3, 32, 32))
    mask, x = given.get("attention_mask"), given["hidden_states"]
    longer = torch.cat([rows_of(layer).expand(2, -1, -1), x], dim=1)
    wrapped.unload()
    if mask is not None:
        assert mask.max() == 1
        mask = F.pad(mask.double(), (P, 0, P, 0), value=1.0)  # torch's sdpa of float64 takes no float32 for a mask
    assert (mask is None) == (block == 0)
    with torch.no_grad():
        expected = model.layers[block].attention(longer, attention_mask=mask)[0][:, P:]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)


def test_vapt_finds_the_patches_behind_eomts_queries() -> None:
    model = eomt()
    torch.manual_seed(1)
    wrapped = get_peft_model(model, VAPTConfig()).double().eval()
    layers: list[Any] = prompt_layers(wrapped)
    inputs = {"pixel_values": noise(2, 3, 32, 32)}
    counts = [heard_of(layer, wrapped, **inputs)[0]["hidden_states"].shape[1] for layer in layers]
    assert [layer.site.patches.prefix + 16 for layer in layers] == counts
    assert counts == [5 + 16, 5 + 16, 10 + 16, 10 + 16]  # class token and four registers


def test_hieras_layers_of_windows_and_of_merged_queries_are_named() -> None:
    model = timm.create_model("hiera_tiny_224", num_classes=3, img_size=(64, 64))
    with pytest.warns(UserWarning) as caught:
        get_peft_model(model, MEPTConfig(num_virtual_tokens=P))
    said = next(str(each.message) for each in caught if "leave out" in str(each.message))
    assert "RuntimeError" not in said
    assert "leave out 5" in said and "attends within windows" in said and "merges its queries" in said
