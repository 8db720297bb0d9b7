# SPDX-License-Identifier: Apache-2.0
"""Which expert each token of a text chose: read off the routers' records, and drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from peft_promptmoe import MEPTConfig, TokenRouting, VAPTConfig, token_routing
from peft_promptmoe.reports.token_picture import Frames, lines_of, shown

EXPERTS, LAYERS = 3, 2


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=LAYERS, pad_token_id=0, **sizes))
    config = MEPTConfig(task_type="CAUSAL_LM", num_experts=EXPERTS, init_weights=False, **settings)
    return get_peft_model(base, config).eval()


def names(count: int) -> list[str]:
    return [f"t{number}" for number in range(count)]


@torch.no_grad()
def test_every_sample_without_its_padding() -> None:
    model = llama()
    ids = torch.randint(1, 40, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    model(ids, attention_mask=mask)
    both = [token_routing(model, names(count), sample=row).experts for row, count in enumerate((4, 6))]
    for row, found in enumerate(both):
        own = ids[row][mask[row].bool()][None]
        model(own)
        alone = token_routing(model, names(own.shape[1]))
        assert alone.layers == [0, 1] and alone.num_experts == EXPERTS
        torch.testing.assert_close(alone.experts, found)
    assert len(both[1].unique()) > 1


@torch.no_grad()
def test_of_a_generation_it_is_what_one_forward_gives() -> None:
    model = llama()
    ids = model.generate(torch.randint(1, 40, (1, 5)), max_new_tokens=7, min_new_tokens=7, do_sample=False)
    written = token_routing(model, names(11))
    with pytest.raises(
        ValueError, match=r"There are 12 tokens, but the last forward pass routed 11 tokens of sample 0.* last token"
    ):
        token_routing(model, names(12))
    model(ids[:, :-1])
    torch.testing.assert_close(token_routing(model, names(11)).experts, written.experts)


def test_what_cannot_be_shown() -> None:
    model = llama()
    with pytest.raises(ValueError, match="No forward pass was routed yet"):
        token_routing(model, names(3))
    model(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="sample=2 is not in the last batch"):
        token_routing(model, names(3), sample=2)
    whole = llama(routing="sample")
    whole(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="chooses experts per text, not per token"):
        token_routing(whole, names(3))


def routing() -> TokenRouting:
    tokens = ["\u0120It", "\u0120costs", "\u0120$", "5", "\u010a"]
    return TokenRouting([0, 3, 4], tokens, torch.tensor([[0, 1, 2, 0, 1], [2] * 5, [1, 0, 1, 0, 1]]), EXPERTS)


def test_a_frame_shows_the_layers_up_to_its_own() -> None:
    found = routing()
    frames = Frames(found.layers, found.tokens, found.experts, found.num_experts)
    for number, layer in enumerate(found.layers):
        frames.show(number)
        drawn = frames.image.get_array()
        assert np.array_equal(drawn[: number + 1], found.experts[: number + 1].numpy())
        assert drawn.mask[number + 1 :].all() and f"Layer {layer}:" in frames.heading.get_text()
        faces = [word.get_bbox_patch().get_facecolor()[:3] for word in frames.words]
        assert faces == [frames.colours[expert][:3] for expert in found.experts[number]]


@pytest.mark.parametrize("ending", ["gif", "png"])
def test_an_animation_has_a_frame_for_each_layer_and_ends_on_the_whole(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"routing.{ending}"
    routing().animate(path, seconds=0.2)
    with Image.open(path) as image:
        assert image.n_frames == 3 and image.info["loop"] == 0
        pictures, durations = [], []
        for number in range(3):
            image.seek(number)
            pictures.append(np.asarray(image.convert("RGB")).astype(int))
            durations.append(image.info["duration"])
    assert durations == [200, 200, 2500]
    assert all((pictures[number] != pictures[number + 1]).any() for number in range(2))
    whole = np.asarray(Image.open(io.BytesIO(routing().plot()._repr_png_())).convert("RGB")).astype(int)
    flat = (whole == np.asarray(pictures[2])).all(axis=-1)
    assert whole.shape == pictures[2].shape and flat.mean() > 0.95 and np.abs(whole - pictures[2]).mean() < 2


def test_lines_break_between_tokens() -> None:
    assert lines_of(["abc", "de", "fghi", "jklmnopq", "r"], width=6) == [(0, 0), (0, 3), (1, 0), (2, 0), (3, 0)]
    assert [shown(token) for token in routing().tokens] == [" It", " costs", r" \$", "5", "\u21b5"]


def test_methods_without_token_routing_say_so() -> None:
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_heads=2, num_classes=2)
    with pytest.raises(ValueError, match="one of VAPT"):
        token_routing(get_peft_model(vit, VAPTConfig()), names(4))
