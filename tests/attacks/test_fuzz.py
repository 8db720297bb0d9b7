# SPDX-License-Identifier: Apache-2.0
"""Configs by the thousand and damaged adapter files: a clear error or a working adapter, and nothing besides."""

from __future__ import annotations

import json
import math
import random
import shutil
import socket
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_adapter_folders import assert_untouched, snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from peft_promptmoe import MEPTConfig, PMoEConfig, ProMotionConfig, VAPTConfig
from peft_promptmoe.config import PromptConfig

LIMIT = 64 * 2**20  # bytes
WITNESS = "promptmoe_fuzz_witness"
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": 3,
}


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=32, **SHAPE))


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **SHAPE))


BASES = {MEPTConfig: bert, VAPTConfig: vit, PMoEConfig: vit, ProMotionConfig: vit}


class TensorWatch(TorchDispatchMode):
    """Notes the largest tensor that anything makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return made


@pytest.fixture(autouse=True)
def sealed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No network, nothing imported that a config names, no large tensor."""
    asked: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        asked.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (tmp_path / f"{WITNESS}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with TensorWatch() as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    assert not asked
    assert WITNESS not in sys.modules
    assert watch.largest <= LIMIT


# -- configs ----------------------------------------------------------------------------------------------------------

NUMBERS = [
    0,
    1,
    2,
    3,
    -1,
    7,
    64,
    10**6,
    10**9,
    10**18,
    10**30,
    -(10**12),
    0.0,
    0.5,
    0.1,
    1.0,
    1.5,
    -0.5,
    1e308,
    5e-324,
]
NUMBERS += [float("nan"), float("inf"), float("-inf")]
NAMES = [
    "",
    "default",
    "auto",
    "sample",
    "token",
    "match",
    "random",
    "prefix",
    "all",
    "relu",
    "concat",
    "expert",
    "none",
]
NAMES += [
    "classifier",
    "query",
    "attention",
    "encoder",
    "layers",
    "layer",
    "embeddings",
    "0",
    "1",
    "\0",
    "é",
    "a" * 5000,
]
HOSTILE = [
    WITNESS,
    f"{WITNESS}.Class",
    f"__import__({WITNESS!r})",
    "https://evil.example/x",
    "../../etc/passwd",
    "/",
    "~",
]
HOSTILE += [
    "file:///etc/passwd",
    "evil/model",
    "evil/model@main",
    "(",
    "[",
    "*",
    "a{99999999}",
    "(?P<x>",
    "\\",
    ".*",
    "{0}",
]


def junk(source: random.Random, depth: int = 0) -> Any:
    """Any value that JSON can hold."""
    kind = source.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return source.choice([None, True, False])
    if kind < 3:
        return source.choice(NUMBERS)
    if kind < 5:
        return source.choice(NAMES if source.random() < 0.6 else HOSTILE)
    inner = [junk(source, depth + 1) for _ in range(source.choice([0, 1, 2, 3, 3]))]
    if kind < 7:
        return inner
    return {source.choice(NAMES + HOSTILE + ["trust_remote_code", "name", "weights"]): value for value in inner}


def beyond_json(source: random.Random) -> Any:
    return source.choice([b"1", {1, 2}, (0, "x"), 1 + 2j, object(), int, nn.Identity(), range(10**12), Path("x"), ...])


def spoiled(source: random.Random, cls: type[PromptConfig]) -> dict[str, Any]:
    """Settings of a saved config with some values replaced, some missing and some too many."""
    settings = cls().to_dict()
    del settings["peft_type"]
    for name in source.sample(sorted(settings), source.choice([1, 1, 1, 2, 2, 3, 5])):
        settings[name] = junk(source)
    if source.random() < 0.1:
        del settings[source.choice(sorted(settings))]
    if source.random() < 0.1:
        settings[source.choice(["trust_remote_code", "auto_map", "field_of_the_future", "stored", "peft_type_"])] = (
            junk(source)
        )
    return settings


def made(build: Any, *args: Any, **kwargs: Any) -> Any:
    """The config or model, or None where it was refused as it should be."""
    try:
        return build(*args, **kwargs)
    except (TypeError, ValueError) as error:
        assert str(error)
        return None


@pytest.mark.parametrize("cls", BASES, ids=lambda cls: cls.__name__)
def test_configs(cls: type[PromptConfig], tmp_path: Path) -> None:
    """More than 13,000 in all: by call, from a dict and from a file. Some of those that pass are put into a model."""
    source = random.Random(cls.__name__)
    kind = str(cls().peft_type.value)
    file = tmp_path / "adapter_config.json"
    passed = worked = 0
    for number in range(3_400):
        settings = spoiled(source, cls)
        if number % 3 == 0:
            file.write_text(json.dumps(settings | {"peft_type": kind}))
            config = made(PeftConfig.from_pretrained, str(tmp_path))
        elif number % 3 == 1:
            config = made(PeftConfig.from_peft_type, peft_type=kind, **settings)
        else:
            settings[source.choice(sorted(settings))] = beyond_json(source)
            config = made(cls, **settings)
        if config is None:
            continue
        passed += 1
        assert isinstance(config, cls)
        if worked == 80:  # which takes most of the time
            continue
        base = BASES[cls]()
        names = [name for name, _ in base.named_modules()]
        model = made(get_peft_model, base, config)
        if model is None:
            assert [name for name, _ in base.named_modules()] == names, settings
        worked += model is not None
    assert passed > 200 and worked == 80


# -- files ------------------------------------------------------------------------------------------------------------

FILE = "adapter_model.safetensors"
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "C64": 8}
REFUSALS = (ValueError, TypeError, RuntimeError, SafetensorError)


def packed(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def flipped(source: random.Random, data: bytes, start: int, stop: int) -> bytes:
    changed = bytearray(data)
    for _ in range(source.choice([1, 1, 2, 8])):
        changed[source.randrange(start, stop)] ^= 1 << source.randrange(8)
    return bytes(changed)


def damaged(source: random.Random, data: bytes) -> bytes:
    """The bytes of an adapter file after an accident or an attack."""
    size = struct.unpack("<Q", data[:8])[0]
    body = data[8 + size :]
    kind = source.randrange(7)
    if kind == 0:
        return data[: source.choice([0, 7, 8, 9, source.randrange(len(data)), len(data) - 1])]
    if kind == 1:
        lengths = [0, 1, size - 1, size + 1, len(data), 2**31, 2**62, 2**64 - 1, source.randrange(2 * size)]
        return struct.pack("<Q", source.choice(lengths)) + data[8:]
    if kind == 2:
        return flipped(source, data, 8, 8 + size)
    if kind == 3:
        return flipped(source, data, 8 + size, len(data))
    if kind == 4:
        return data + bytes(source.choice([1, 8, 1000]))
    header = json.loads(data[8 : 8 + size])
    first, second = source.sample(sorted(header.keys() - {"__metadata__"}), 2)
    if kind == 5:  # one name twice
        text = json.dumps(header)
        return packed((text[:-1] + f", {json.dumps(first)}: {json.dumps(header[second])}}}").encode(), body)
    return packed(json.dumps(edited(source, header, first, second)).encode(), body)


def edited(source: random.Random, header: dict[str, Any], first: str, second: str) -> dict[str, Any]:
    """A header that says something else of one tensor."""
    entry = header[first]
    count = math.prod(entry["shape"])
    change = source.choice(
        ["dtype", "recast", "shape", "flat", "offsets", "swap", "rename", "drop", "metadata", "junk"]
    )
    if change == "dtype":
        entry["dtype"] = source.choice([*DTYPES, "F4", "__import__", "", None])
    elif change == "recast":  # of the same bytes
        entry["dtype"] = source.choice(sorted(DTYPES))
        entry["shape"] = [4 * count // DTYPES[entry["dtype"]]]
    elif change == "shape":
        entry["shape"] = source.choice(
            [[], [0], [-1], [2**62, 4], [*entry["shape"], 1], entry["shape"][::-1], "x", [1.5]]
        )
    elif change == "flat":
        entry["shape"] = [count]
    elif change == "offsets":
        start, stop = entry["data_offsets"]
        pairs = [
            [stop, start],
            [-1, stop],
            [start, 2**63],
            [start + 4, stop + 4],
            [start],
            header[second]["data_offsets"],
        ]
        entry["data_offsets"] = source.choice(pairs)
    elif change == "swap":
        header[first], header[second] = header[second], entry
    elif change == "rename":
        name = source.choice(["x", "", first.upper(), first + ".evil", "base_model.model.evil.weight", "\0", "../x"])
        header[name] = header.pop(first)
    elif change == "drop":
        del header[first]
    elif change == "metadata":
        header["__metadata__"] = source.choice([{"format": "tf"}, {"format": 1}, [], "x", {"a": {"b": "c"}}, {}])
    else:
        header[first] = junk(source)
    return header


CASES = [
    Case("mept", "bert", "sample", "sdpa"),
    Case("mept", "llama", "token", "sdpa"),
    Case("vapt", "vit", "adaptive", "sdpa"),
    Case("pmoe", "vit", "dinov2", "sdpa"),
    Case("promotion", "vit", "units", "sdpa"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_files(case: Case, tmp_path: Path) -> None:
    """A file is refused and the model is as it was, or the adapter is what the file says."""
    source = random.Random(str(case))
    good, bad = tmp_path / "good", tmp_path / "bad"
    case.model().save_pretrained(good)
    shutil.copytree(good, bad)
    data = (good / FILE).read_bytes()
    base = case.base()
    model = PeftModel.from_pretrained(case.base(), str(good), adapter_name="first")
    refused = loaded = 0
    for number in range(60):
        (bad / FILE).write_bytes(damaged(source, data))
        holder = base if number % 2 else model.get_base_model()
        before = snapshot(holder)
        trainable = source.random() < 0.5
        try:
            if number % 2:
                found = PeftModel.from_pretrained(base, str(bad), is_trainable=trainable)
            else:
                model.load_adapter(str(bad), adapter_name="second", is_trainable=trainable)
                found = model
        except REFUSALS as error:
            assert str(error)
            refused += 1
            assert_untouched(holder, before)
            continue
        loaded += 1
        tensors = load_file(bad / FILE)
        name = "default" if number % 2 else "second"
        state = get_peft_model_state_dict(found, adapter_name=name)
        assert state.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(state[key], tensor.to(state[key].dtype)), key
        if number % 2:
            base = case.base()
        else:
            model.delete_adapter("second")
    assert refused > 20 and loaded > 3
