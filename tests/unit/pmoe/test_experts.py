# SPDX-License-Identifier: Apache-2.0
"""pMoE's further experts: how they are found, loaded, described, compared and frozen."""

from __future__ import annotations

import copy
import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, inject_adapter_in_model
from peft.utils.integrations import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn

from peft_promptmoe.pmoe.experts import gather as module_under_test
from peft_promptmoe.pmoe.experts.gather import Expert, freeze, gather_experts
from peft_promptmoe.pmoe.experts.records import ExpertRecord, hash_weights, pixels_of, read_tensors
from peft_promptmoe.pmoe.experts.towers import check_tower, find_tower

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TIMM: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2}


def made(model: str, config: str | None = None, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    cls = getattr(transformers, model)
    name = config or model.removesuffix("Model") + "Config"
    return cls(getattr(transformers, name)(**SIZES | settings)).eval()


def vit(seed: int = 0, **settings: Any) -> Any:
    return made("ViTModel", seed=seed, **settings)


def timm_vit(architecture: str = "vit_tiny_patch16_224", seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(architecture, **{"num_classes": 0} | TIMM | settings).eval()


def clip(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    text = SIZES | {"vocab_size": 20, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=SIZES | {"hidden_size": 16})
    return transformers.CLIPModel(config).eval()


def write_timm(folder: Path, model: nn.Module, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    known = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 32, 32], "url": "http://nowhere"}
    settings = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": TIMM, "pretrained_cfg": known}
    (folder / "config.json").write_text(json.dumps(settings | config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def write(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def gather(*asked: Any, base: nn.Module | None = None, known: dict[str, Expert] | None = None, **how: Any) -> Any:
    how = {"records": None, "stored": how.get("records") is not None, "download": False} | how
    return gather_experts(list(asked), known=known or {}, base=base or nn.Linear(2, 2), **how)


def trained_by(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def records(*experts: Expert) -> list[dict[str, Any]]:
    return json.loads(json.dumps([expert.record.to_dict() for expert in experts]))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(tmp_path_factory.mktemp("experts") / "vit", vit()))


class Hub:
    """Stands in for the Hub: notes what is asked of it and gives one folder, or nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.calls = folder, []  # type: ignore[var-annotated]

    def __call__(self, repository: str, **kwargs: Any) -> str:
        self.calls.append((repository, kwargs))
        if self.folder is None:
            raise LocalEntryNotFoundError("not there")
        return str(self.folder)


@pytest.fixture
def hub(vit_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    shutil.copytree(vit_folder, tmp_path / COMMIT)
    made_hub = Hub(tmp_path / COMMIT)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made_hub)
    return made_hub


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(module_under_test, "load_encoder", refuse)


# -- from folders -----------------------------------------------------------------------------------------------------

FOLDERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], dict[str, Any]]] = {
    "vit": (vit, lambda m: m, {"type": "vit", "size": [32, 32]}),
    "vit_with_head": (
        lambda: made("ViTForImageClassification", "ViTConfig", num_labels=5),
        lambda m: m.vit,
        {"type": "vit"},
    ),
    "dinov2": (lambda: made("Dinov2Model"), lambda m: m, {"type": "dinov2", "size": None}),
    "dinov3": (lambda: made("DINOv3ViTModel"), lambda m: m, {"type": "dinov3_vit", "size": None}),
    "mae": (lambda: made("ViTMAEForPreTraining", "ViTMAEConfig"), lambda m: m.vit, {"type": "vit_mae"}),
    "clip": (clip, lambda m: m.vision_model, {"type": "clip_vision_model", "width": 16}),
    "siglip": (lambda: made("SiglipVisionModel"), lambda m: m, {"type": "siglip_vision_model"}),
    "beit": (lambda: made("BeitModel"), lambda m: m, {"type": "beit"}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_and_modules_are_one_expert(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    make, encoder_of, expected = FOLDERS[name]
    model = make()
    trained = trained_by(model)
    folder = write(tmp_path / name, model)
    capsys.readouterr()
    (expert,) = gather(str(folder))
    (handed,) = gather(model)
    record = expert.record
    wanted = {"library": "transformers", "width": 32, "depth": 2, "patch": [8, 8], "revision": None} | expected
    assert {key: getattr(record, key) for key in wanted} == wanted
    assert record.name == str(folder) and record.mean == [0.5, 0.4, 0.3] and record.std == [0.1, 0.2, 0.3]
    assert handed.module is encoder_of(model) and handed.key == expert.key and len(expert.key) == 13
    assert handed.record.name == type(model).__name__
    assert [site.index for site in expert.sites] == [0, 1]
    assert all(site.attention in set(expert.module.modules()) for site in expert.sites)
    assert trained_by(model) == trained  # nothing is touched before all is known to be right
    for found in (expert.module, handed.module):
        freeze(found)
        assert not any(p.requires_grad or p.is_meta for p in found.parameters())
        assert not any(m.training for m in found.modules())
    tensors = read_tensors(expert.module)
    for key, tensor in read_tensors(encoder_of(model)).items():
        assert torch.equal(tensor, tensors[key]), key
    # Nothing scary about heads that are left unread.
    assert "MISSING" not in capsys.readouterr().err and not recwarn.list
    assert ExpertRecord.from_dict(records(expert)[0]) == record


@pytest.mark.parametrize("prefix", ["", "timm_model."])
def test_timm_folder(prefix: str, tmp_path: Path) -> None:
    model = timm_vit(num_classes=4)
    folder = write_timm(tmp_path / "timm", model, num_classes=4, **({"model_type": "timm_wrapper"} if prefix else {}))
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (expert,) = gather(str(folder))
    record = expert.record
    assert (record.library, record.type, record.width, record.depth) == ("timm", "vit_tiny_patch16_224", 24, 3)
    assert (record.patch, record.size) == ([16, 16], [32, 32])
    assert (record.mean, record.std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert isinstance(expert.module.head, nn.Identity)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(expert.module.forward_features(x), model.forward_features(x))
    # The head is never read, so it makes no difference, and the module may have kept it.
    (handed,) = gather(model)
    assert handed.key == expert.key and handed.module is model


def test_loading_leaves_the_random_numbers_alone(vit_folder: str, tmp_path: Path) -> None:
    """Else prompts would begin otherwise for an expert that is loaded than for one that is handed over."""
    folder, base = write_timm(tmp_path / "timm", timm_vit()), nn.Linear(2, 2)
    state = torch.random.get_rng_state()
    gather(vit_folder, str(folder), base=base)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_handed_over_wrapper(tmp_path: Path) -> None:
    folder = write_timm(tmp_path / "timm", timm_vit())
    wrapper = transformers.AutoModel.from_pretrained(folder)
    (expert,) = gather(wrapper)
    assert expert.module is wrapper.timm_model and expert.record.library == "timm"
    assert expert.record.mean == [0.1, 0.2, 0.3]
    assert expert.key == gather(str(folder))[0].key


def test_sharded_weights(tmp_path: Path) -> None:
    model = vit()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert gather(str(tmp_path))[0].key == gather(model)[0].key


def test_mae_hides_no_patches() -> None:
    model = made("ViTMAEModel", mask_ratio=0.75)
    (expert,) = gather(model)
    assert model.config.mask_ratio == 0.75
    freeze(expert.module)
    assert model.config.mask_ratio == 0.0
    assert model(torch.randn(1, 3, 32, 32)).last_hidden_state.shape == (1, 17, 32)


def test_experts_have_weights_where_peft_makes_adapters_without(vit_folder: str, tmp_path: Path) -> None:
    timm_folder = write_timm(tmp_path / "timm", timm_vit())
    with init_empty_weights():
        experts = gather(vit_folder, str(timm_folder))
    for expert in experts:
        assert not any(tensor.is_meta for tensor in expert.module.state_dict().values())


# -- the Hub ----------------------------------------------------------------------------------------------------------


def test_own_names_load_freely(hub: Hub) -> None:
    (expert,) = gather("someone/vit")
    ((repository, how),) = hub.calls
    assert repository == "someone/vit" and how["revision"] is None and not how["local_files_only"]
    assert "*.bin" not in how["allow_patterns"] and "*.safetensors" in how["allow_patterns"]
    assert (expert.record.name, expert.record.revision) == ("someone/vit", COMMIT)
    gather("someone/vit@v2")
    assert hub.calls[1][0] == "someone/vit" and hub.calls[1][1]["revision"] == "v2"


@pytest.mark.parametrize("download", [False, True])
def test_stored_names_load_at_the_recorded_commit(download: bool, hub: Hub) -> None:
    stored = records(*gather("someone/vit@main"))
    (expert,) = gather("someone/vit@main", records=stored, download=download)
    repository, how = hub.calls[1]
    assert (repository, how["revision"], how["local_files_only"]) == ("someone/vit", COMMIT, not download)
    assert records(expert) == stored


def test_what_is_not_in_the_cache_is_not_downloaded(hub: Hub) -> None:
    stored = records(*gather("someone/vit"))
    hub.folder = None
    with pytest.raises(ValueError, match=r"(?s)someone/vit.*download_experts=True.*config.experts = \[module\]"):
        gather("someone/vit", records=stored)
    assert [how["local_files_only"] for _, how in hub.calls] == [False, True]
    with pytest.raises(ValueError, match="the Hub did not return it"):
        gather("someone/vit")


def test_local_cache_of_the_hub(vit_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's own code with its real cache layout, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    stored = records(*gather(vit_folder))
    stored[0] |= {"name": "someone/vit", "revision": COMMIT}
    with pytest.raises(ValueError, match="not in the local cache"):
        gather("someone/vit", records=stored)
    shutil.copytree(vit_folder, tmp_path / "models--someone--vit" / "snapshots" / COMMIT)
    (expert,) = gather("someone/vit", records=stored)
    assert expert.record.revision == COMMIT


def test_an_expert_of_the_same_commit_is_not_loaded_again(hub: Hub, no_loading: None) -> None:
    module = vit()
    (there,) = gather(module)
    there.record = replace(there.record, name="someone/vit", revision=COMMIT)
    (again,) = gather("someone/vit", known={there.key: there})
    assert again.module is module and again.key == there.key
    assert there.record.mean is None and again.record.mean == [0.5, 0.4, 0.3]


# -- what an adapter was trained with ---------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["name", "module"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 64),
        ("depth", 3),
        ("patch", [4, 8]),
        ("type", "deit"),
        ("library", "timm"),
        ("size", [64, 64]),
        ("size", None),
    ],
)
def test_another_architecture(field: str, value: Any, given: str, vit_folder: str, no_loading: None) -> None:
    model = vit()
    stored = records(*gather(model))
    stored[0] |= {field: value, "name": "the/one"}
    with pytest.raises(ValueError, match=r"the/one|its size"):
        gather(vit_folder if given == "name" else vit(), records=stored)


@pytest.mark.parametrize("given", ["name", "module"])
def test_other_weights(given: str, vit_folder: str) -> None:
    stored = records(*gather(vit(seed=1)))
    stored[0]["name"] = "the/one"
    other = vit_folder if given == "name" else vit().train()
    with pytest.raises(ValueError, match=r"not the one.*the/one.*its weights differ"):
        gather(other, records=stored)
    if given == "module":
        assert other.training and all(p.requires_grad for p in other.parameters())


def test_a_module_in_place_of_a_name(hub: Hub) -> None:
    stored = records(*gather("someone/vit"))
    stored[0] |= {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    model = vit().to(torch.bfloat16)
    (expert,) = gather(model, records=stored)
    assert expert.module is model and len(hub.calls) == 1
    # Tensors in the adapter's file are named by the record, and its pixels are those of the training.
    assert records(expert) == stored


def test_numbers_must_agree(vit_folder: str) -> None:
    stored = records(*gather(vit_folder))
    with pytest.raises(ValueError, match="trained with 1 further experts, but got 2"):
        gather(vit_folder, vit(seed=1), records=stored)
    with pytest.raises(ValueError, match="trained with 1 further experts, but got 0"):
        gather(records=stored)
    with pytest.raises(ValueError, match="has no expert_records"):
        gather(vit_folder, stored=True)
    assert gather(stored=True) == []


def test_hash() -> None:
    model = vit()
    plain = hash_weights(model)
    assert plain is not None and len(plain) == 64
    assert hash_weights(copy.deepcopy(model).to(torch.bfloat16)) == plain
    assert hash_weights(vit(seed=1)) != plain
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.pooler.dense.weight.add_(1.0)
    assert hash_weights(changed) == plain
    with torch.no_grad():
        changed.layers[1].mlp.fc1.bias[3] += 1.0
    assert hash_weights(changed) != plain
    half = copy.deepcopy(model)
    half.layers[0].mlp.fc1.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    assert hash_weights(half) is None


def test_quantised_weights_cannot_be_compared() -> None:
    stored = records(*gather(vit()))
    model = vit()
    weight = model.layers[0].attention.v_proj.weight if hasattr(model.layers[0].attention, "v_proj") else None
    assert weight is not None
    model.layers[0].attention.v_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.warns(UserWarning, match="cannot be compared") as caught:
        (expert,) = gather(model, records=stored)
    assert len(caught) == 1 and records(expert) == stored
    (fresh,) = gather(model)
    assert fresh.record.weights is None and fresh.key != expert.key and len(fresh.key) == 13
    assert fresh.key == ExpertRecord.from_dict(records(fresh)[0]).key


# -- experts that are there already -----------------------------------------------------------------------------------


def test_known_experts_are_used_again(vit_folder: str, no_loading: None, capsys: pytest.CaptureFixture[str]) -> None:
    model = vit()
    (expert,) = gather(model)
    known = {expert.key: expert}
    capsys.readouterr()
    assert gather(vit_folder, records=records(expert), known=known) == [expert]
    assert gather(model, known=known) == [expert]
    assert capsys.readouterr().err == ""
    twin = vit()
    assert gather(twin, known=known) == [expert]
    assert all(p.requires_grad for p in twin.parameters())


@pytest.mark.parametrize("twice", ["name", "module", "weights", "base", "encoder", "head"])
def test_listed_twice(twice: str, vit_folder: str) -> None:
    base = made("ViTForImageClassification", "ViTConfig", seed=2)
    model = vit()
    asked = {
        "name": [vit_folder, vit_folder],
        "module": [model, model],
        "weights": [vit_folder, model],
        "base": [base],
        "encoder": [base.vit],
        "head": [model, copy.copy(model)],
    }[twice]
    with pytest.raises(ValueError, match=r"twice|same model|shares modules with"):
        gather(*asked, base=base)
    assert all(p.requires_grad for p in [*base.parameters(), *model.parameters()])


# -- what no expert can be --------------------------------------------------------------------------------------------

NO_EXPERTS: dict[str, tuple[Callable[[], Any], str]] = {
    "eva": (lambda: timm_vit("eva02_tiny_patch14_224"), "rotary"),
    "timm_dinov3": (lambda: timm_vit("vit_small_patch16_dinov3"), "rotary"),
    "beit": (lambda: made("BeitModel", use_relative_position_bias=True), "relative position"),
    "beit_shared": (lambda: made("BeitModel", use_shared_relative_position_bias=True), "relative position"),
    "timm_beit": (lambda: timm_vit("beit_base_patch16_224"), "relative position"),
    "timm_relpos": (lambda: timm_vit("vit_relpos_small_patch16_224"), "relative position"),
    "timm_srelpos": (lambda: timm_vit("vit_srelpos_small_patch16_224"), "relative position"),
    "swin": (
        lambda: transformers.SwinModel(
            transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1])
        ),
        "patch grid",
    ),
    "resnet": (lambda: timm.create_model("test_resnet", num_classes=0), "patch grid"),
    "bert": (lambda: made("BertModel", vocab_size=20), "patch grid"),
    "linear": (lambda: nn.Linear(2, 2), "patch grid"),
    "wrapped_timm": (lambda: nn.ModuleDict({"body": timm_vit()}), "neither a model of transformers"),
}


@pytest.mark.parametrize("name", NO_EXPERTS)
def test_not_a_plain_vision_transformer(name: str) -> None:
    make, why = NO_EXPERTS[name]
    first, model = vit().train(), make()
    with pytest.raises(ValueError, match=rf"'{type(model).__name__}'.*{why}"):
        gather(first, model)
    # The first was fine, and is as it was.
    assert first.training and all(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize("name", ["bert", "swin", "beit", "clip_text_model"])
def test_not_a_plain_vision_transformer_by_name(name: str, tmp_path: Path, no_loading: None) -> None:
    model = made("CLIPTextModel", vocab_size=20) if name == "clip_text_model" else NO_EXPERTS[name][0]()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"loaded by name are plain vision transformers|relative position"):
        gather(str(tmp_path))


def test_tower() -> None:
    sites = find_tower(vit(), "vit")
    check_tower(sites, "vit")
    with pytest.raises(ValueError, match="one attention layer in each"):
        check_tower(sites[1:], "vit")
    with pytest.raises(ValueError, match="one attention layer in each"):
        check_tower([sites[0], sites[0]], "vit")
    with pytest.raises(ValueError, match="several patch grids"):
        check_tower([sites[0], find_tower(vit(), "other")[1]], "vit")
    with pytest.raises(ValueError, match="one patch grid"):
        check_tower([], "vit")
    other = copy.copy(sites[1])
    other.width = 16
    with pytest.raises(ValueError, match="several widths"):
        check_tower([sites[0], other], "vit")
    other = copy.copy(sites[1])
    other.patches = None
    with pytest.raises(ValueError, match="one patch grid"):
        check_tower([sites[0], other], "vit")


def test_weights_that_are_not_there() -> None:
    with torch.device("meta"):
        model = vit()
    with pytest.raises(ValueError, match="meta device"):
        gather(model)


def test_an_expert_with_an_adapter() -> None:
    model = inject_adapter_in_model(LoraConfig(target_modules=["fc1"]), vit())
    with pytest.raises(ValueError, match="contains an adapter"):
        gather(model)


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_weights_of_another_model(library: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", vit()) if library == "transformers" else write_timm(tmp_path / "a", timm_vit())
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors["elsewhere"] = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 of its tensors"):
        gather(str(folder))
    del tensors["elsewhere"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="describes a model with"):
        gather(str(folder))


# -- words and pixels -------------------------------------------------------------------------------------------------


def test_what_experts_weigh_is_said_before_they_load(
    vit_folder: str, capsys: pytest.CaptureFixture[str], no_loading: None
) -> None:
    second = made("ViTModel", seed=1, hidden_size=512, intermediate_size=1024)
    capsys.readouterr()
    with pytest.raises(AssertionError, match="weights were read"):
        gather(vit_folder, second, base=nn.Linear(1000, 1000, bias=False))
    said = capsys.readouterr().err
    assert said.startswith(f"pMoE experts: {vit_folder} 0.0 M parameters, 0 MB; ViTModel 4.3 M parameters, 17 MB; in ")
    assert said.endswith("in all 4.3 M parameters, 17 MB, beside the base model's 1.0 M, 4 MB\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("processor", "pixels"),
    [
        ({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}, ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])),
        ({"image_mean": [0], "image_std": [1]}, ([0.0], [1.0])),
        ({"do_normalize": False, "image_mean": [0.5], "image_std": [0.5]}, ([0.0] * 3, [1.0] * 3)),
        ({"image_mean": [0.5, 0.5], "image_std": [0.5, 0.5]}, (None, None)),
        ({"image_mean": [0.5] * 3, "image_std": [0.0] * 3}, (None, None)),
        ({"image_mean": [float("nan")] * 3, "image_std": [1.0] * 3}, (None, None)),
        ({"image_mean": [0.5] * 3}, (None, None)),
        ([], (None, None)),
    ],
)
def test_pixels_of_a_folder(processor: Any, pixels: Any, vit_folder: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(vit_folder, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    assert pixels_of(transformers.ViTModel.from_pretrained(folder)) == pixels
    record = gather(str(folder))[0].record
    assert (record.mean, record.std) == pixels


def test_pixels_of_models(tmp_path: Path, vit_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pixels_of(vit()) == (None, None)
    assert pixels_of(timm_vit()) == ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path), raising=False)
    model = vit()
    model.config._name_or_path = "someone/vit"
    assert pixels_of(model) == (None, None)
    repository = tmp_path / "models--someone--vit"
    shutil.copytree(vit_folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert pixels_of(model) == ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3])


def test_size_follows_the_encoder() -> None:
    assert gather(timm_vit(dynamic_img_size=True))[0].record.size is None
    assert gather(timm_vit(img_size=(32, 48)))[0].record.size == [32, 48]


def test_a_folder_that_timm_itself_has_written(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TIMM, num_classes=10).eval()
    timm.models.save_for_hf(model, tmp_path / "saved", model_args=dict(TIMM), safe_serialization=True)
    (expert,) = gather(str(tmp_path / "saved"))
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(expert.module.forward_features(pixels), model.forward_features(pixels))
