# SPDX-License-Identifier: Apache-2.0
"""Hostile records and folders of pMoE's experts: refused with a message, nothing run, loaded, allocated or fetched."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTModel

from peft_promptmoe.pmoe.experts import gather as experts_module
from peft_promptmoe.pmoe.experts.gather import gather_experts
from peft_promptmoe.pmoe.experts.records import ExpertRecord

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TIMM: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
BASE = nn.Linear(2, 2)


def gather(asked: list[Any], records: Any = None, **how: Any) -> Any:
    how = {"stored": records is not None, "download": False} | how
    return gather_experts(asked, records, known={}, base=BASE, **how)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("experts") / "vit"
    ViTModel(ViTConfig(image_size=32, patch_size=8, **SIZES), add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def record(good: Path) -> dict[str, Any]:
    return gather([str(good)])[0].record.to_dict()


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "vit"))


@pytest.fixture
def timm_folder(tmp_path: Path) -> Path:
    target = tmp_path / "timm"
    target.mkdir()
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": TIMM,
        "pretrained_cfg": {"input_size": [3, 32, 32]},
    }
    (target / "config.json").write_text(json.dumps(config))
    save_file(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, **TIMM).state_dict(), target / "model.safetensors"
    )
    return target


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(experts_module, "load_encoder", refuse)


def settings_of(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "https://evil.example/model",
        "file:///etc",
        "hf-hub://evil/model",
        "../vit",
        "models/../../vit",
        "..",
        "..\\vit",
        "//evil.example/share",
        "\\\\evil.example\\share",
        "/no/such/folder",
        "./nothing",
        "~/vit",
        "a/b/c",
        "evil/model\x00",
        "--option/model",
        "ViTModel",
    ],
)
def test_stored_names(name: str, download: bool, record: dict[str, Any], no_hub: None, monkeypatch: Any) -> None:
    """Without a recorded commit nothing but a folder can be meant, whatever the opt-in."""
    with pytest.raises(ValueError, match=r"URL or a path|not a local folder|neither a local folder"):
        gather([name], [record | {"name": name}], download=download)


@pytest.mark.parametrize("name", ["https://evil.example/m", "../vit", "//evil/share", "/no/such/folder", "a/b/c"])
def test_stored_names_with_a_commit(name: str, record: dict[str, Any], no_hub: None) -> None:
    with pytest.raises(ValueError, match=r"URL or a path|not a local folder|neither a local folder"):
        gather([name], [record | {"name": name, "revision": COMMIT}], download=True)


def test_ways_upwards_are_refused_even_where_they_lead_somewhere(
    folder: Path, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch, no_loading: None
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="leads upwards"):
        gather(["../vit"], [record])
    monkeypatch.undo()


# -- records ----------------------------------------------------------------------------------------------------------

HOSTILE: list[tuple[str, Any]] = [
    ("width", 1_000_000),
    ("width", 10**30),
    ("width", -1),
    ("width", True),
    ("width", "32"),
    ("width", 32.0),
    ("width", float("nan")),
    ("width", None),
    ("depth", 0),
    ("depth", 1025),
    ("depth", [2]),
    ("patch", [8]),
    ("patch", [8, 0]),
    ("patch", [8, 20_000]),
    ("patch", "88"),
    ("patch", [8, True]),
    ("patch", None),
    ("size", [10**9, 10**9]),
    ("size", [32, -32]),
    ("size", 32),
    ("mean", [float("nan")] * 3),
    ("mean", [float("inf")] * 3),
    ("mean", [0.5, 0.5]),
    ("mean", ["0.5"] * 3),
    ("mean", [0.5]),
    ("mean", None),
    ("mean", [0.5] * 10_000),
    ("std", [0.0] * 3),
    ("std", [-1.0] * 3),
    ("std", [True] * 3),
    ("std", [float("nan")] * 3),
    ("weights", "0" * 63),
    ("weights", "../" + "0" * 61),
    ("weights", 7),
    ("revision", "main"),
    ("revision", "../../x"),
    ("revision", False),
    ("library", "os"),
    ("library", ["timm"]),
    ("type", "__import__('os')"),
    ("type", ""),
    ("type", None),
    ("name", ""),
    ("name", {"a": 1}),
    ("name", "n" * 100_000),
]


@pytest.mark.parametrize(
    ("field", "value"), [pytest.param(name, value, id=f"{name}={str(value)[:16]!r}") for name, value in HOSTILE]
)
def test_hostile_records(field: str, value: Any, good: Path, record: dict[str, Any], no_loading: None) -> None:
    hostile = record | {"mean": [0.5] * 3, "std": [0.5] * 3} | {field: value}
    tracemalloc.start()
    try:
        with pytest.raises((TypeError, ValueError), match=field) as caught:
            gather([str(good)], [hostile])
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("stored", [None, [], "record", 3, {}, {"trust_remote_code": True}], ids=str)
def test_records_that_are_none(stored: Any, good: Path, record: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="expert_records"):
        gather([str(good)], [stored])


@pytest.mark.parametrize("key", ["trust_remote_code", "auto_map", "url", "class_path"])
def test_unknown_fields(key: str, good: Path, record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=key):
        gather([str(good)], [record | {key: True}])
    with pytest.raises(ValueError, match="weights should not be there, or is missing"):
        gather([str(good)], [{name: value for name, value in record.items() if name != "weights"}])


def test_record_round_trip(record: dict[str, Any]) -> None:
    assert ExpertRecord.from_dict(json.loads(json.dumps(record))).to_dict() == record


def test_swapped_weights(folder: Path, record: dict[str, Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "intermediate" in name)
    tensors[name][0] += 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="its weights differ"):
        gather([str(folder)], [record])


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["transformers", "timm"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pth", "flax_model.msgpack", "model.npz"])
def test_pickles(file: str, library: str, folder: Path, timm_folder: Path, tmp_path: Path) -> None:
    target = folder if library == "transformers" else timm_folder
    (target / "model.safetensors").unlink()
    (target / file).write_bytes(pickle.dumps(Payload(tmp_path / "pwned")))
    with pytest.raises(ValueError, match="has no weights in safetensors"):
        gather([str(target)])
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_pickle_beside_or_behind_safetensors(library: str, folder: Path, timm_folder: Path, tmp_path: Path) -> None:
    target = folder if library == "transformers" else timm_folder
    data = pickle.dumps(Payload(tmp_path / "pwned"))
    (target / "pytorch_model.bin").write_bytes(data)
    gather([str(target)])
    os.rename(target / "model.safetensors", target / "open_clip_model.safetensors")
    if library == "timm":  # which prefers the pickle to this name
        gather([str(target)])
    (target / "open_clip_model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="cannot be loaded"):
        gather([str(target)])
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("part", ["../evil.safetensors", "/evil.safetensors", "evil.bin", "a/b.safetensors", 3, None])
def test_index_of_shards(part: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"x": part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names files outside its folder"):
        gather([str(folder)])


@pytest.mark.parametrize("native", [False, True])
def test_remote_code(native: bool, folder: Path, tmp_path: Path) -> None:
    """Code beside a model is not run, whether or not the architecture is one that transformers has."""
    (folder / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'pwned')!r})\n")
    auto_map = {"AutoConfig": "modeling_evil.Config", "AutoModel": "modeling_evil.Model"}
    settings_of(folder, auto_map=auto_map, trust_remote_code=True, model_type="vit" if native else "evil")
    if native:
        gather([str(folder)])
    else:
        with pytest.raises(ValueError, match=r"code of its own \(auto_map\)"):
            gather([str(folder)])
    assert not (tmp_path / "pwned").exists() and not any("modeling_evil" in name for name in sys.modules)


def test_kernels_from_elsewhere(folder: Path) -> None:
    for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        settings_of(folder, **{name: "evil/kernel"})
    (expert,) = gather([str(folder)])
    assert expert.module.config._attn_implementation in ("sdpa", "eager")


def test_adapter_that_leads_to_another_model(folder: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "evil/model"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is an adapter"):
        gather([str(folder)])


@pytest.mark.parametrize("model_type", [None, 3, [], {}, "", "no_such_model", "__import__"], ids=str)
def test_model_types(model_type: Any, folder: Path) -> None:
    settings_of(folder, model_type=model_type)
    with pytest.raises(ValueError, match="names no architecture"):
        gather([str(folder)])


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"model_type": "vit"', "\x00"])
def test_damaged_config(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        gather([str(folder)])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10_000_000},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": float("nan")},
        {"num_hidden_layers": "two"},
        {"hidden_size": 10_000_000},
        {"hidden_size": 60_000, "num_attention_heads": 1},
        {"hidden_size": None},
        {"intermediate_size": 2**40},
        {"image_size": 10**6},
        {"patch_size": 0},
        {"num_attention_heads": 0},
        {"quantization_config": {"quant_method": "evil"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("stored", [False, True])
def test_absurd_architectures(
    changes: dict[str, Any], stored: bool, folder: Path, record: dict[str, Any], no_loading: None
) -> None:
    settings_of(folder, **changes)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{folder.name}"):
            gather([str(folder)], [record] if stored else None)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_labels_by_the_billion(folder: Path, timm_folder: Path) -> None:
    """transformers would make a list of them."""
    settings_of(folder, num_labels=10**9, id2label=None)
    settings_of(timm_folder, num_classes=10**9, model_args=TIMM | {"num_classes": 10**9})
    assert len(gather([str(folder), str(timm_folder)])) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "/elsewhere/evil.pth"},
        {"pretrained": True},
        {"pretrained_cfg": {"url": "https://evil.example/x.pth"}},
        {"pretrained_cfg_overlay": {"file": "/elsewhere/evil.pth"}},
        {"cache_dir": "/tmp"},
        {"features_only": True},
        {"depth": 10**6},
        {"embed_dim": 10**6},
        {"norm_layer": "os.system"},
        {"block_fn": "evil"},
        {"depth": "many"},
    ],
    ids=str,
)
def test_arguments_for_timm(arguments: dict[str, Any], timm_folder: Path, no_loading: None) -> None:
    settings_of(timm_folder, model_args=TIMM | arguments)
    with pytest.raises(ValueError, match=timm_folder.name):
        gather([str(timm_folder)])


@pytest.mark.parametrize(
    "architecture",
    [
        "hf-hub:evil/vit_tiny_patch16_224",
        "local-dir:/tmp",
        "evil/vit",
        "no_such_model",
        "",
        3,
        ["vit"],
        None,
        "os.system",
    ],
    ids=str,
)
def test_architectures_for_timm(architecture: Any, timm_folder: Path, no_hub: None, no_loading: None) -> None:
    settings_of(timm_folder, architecture=architecture)
    with pytest.raises(ValueError, match="cannot be loaded"):
        gather([str(timm_folder)])


def test_sources_for_timm(timm_folder: Path, tmp_path: Path, no_hub: None) -> None:
    """Where else weights might come from is not looked at."""
    evil = tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps(Payload(tmp_path / "pwned")))
    known = {"url": "https://evil.example/x.pth", "file": str(evil), "hf_hub_id": "evil/x", "custom_load": True}
    settings_of(timm_folder, pretrained_cfg=known | {"source": "url", "state_dict": {}, "surprise": 1})
    (expert,) = gather([str(timm_folder)])
    assert "evil" not in str(expert.module.pretrained_cfg)
    state = load_file(timm_folder / "model.safetensors")
    assert torch.equal(expert.module.state_dict()["pos_embed"], state["pos_embed"])
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[999999,999999],"data_offsets":[0,4]}}',
        b"\xff" * 100,
    ],
    ids=["empty", "short", "header_length_bomb", "shape_bomb", "noise"],
)
@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_damaged_weights(data: bytes, library: str, folder: Path, timm_folder: Path, no_loading: None) -> None:
    target = folder if library == "transformers" else timm_folder
    (target / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="cannot be loaded"):
        gather([str(target)])
