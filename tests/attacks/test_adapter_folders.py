# SPDX-License-Identifier: Apache-2.0
"""Hostile and broken adapter folders: refused with a message that helps, nothing allocated, the model as it was."""

from __future__ import annotations

import ast
import json
import pickle
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_promptmoe import MEPTConfig, PMoEConfig
from peft_promptmoe.engine.transformers_attention import ConfigView

Tensors = dict[str, Tensor]
IDS = torch.tensor([[3, 4, 5, 6]])
CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"


def make_base(width: int = 16, layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of three layers, width 16, four experts of two slots and a shared one, with a trained head."""
    folder = tmp_path_factory.mktemp("good")
    model = get_peft_model(make_base(), MEPTConfig(num_virtual_tokens=2, modules_to_save=["lm_head"]))
    model.save_pretrained(folder)
    return folder


def spoil(good: Path, target: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """A copy of the good adapter with other tensors or settings."""
    shutil.copytree(good, target)
    if tensors is not None:
        save_file(tensors, target / FILE)
    if config:
        settings = json.loads((target / CONFIG).read_text()) | config
        (target / CONFIG).write_text(json.dumps(settings))
    return target


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that loading could change."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "objects": {name: id(parameter) for name, parameter in model.named_parameters()},
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modules": {name: (type(module), module.training) for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_pre_hooks), len(module._forward_hooks), len(module._load_state_dict_pre_hooks))
            for name, module in model.named_modules()
        },
        "views": [name for name, m in model.named_modules() if isinstance(getattr(m, "config", None), ConfigView)],
        # PEFT says again that adapters are not disabled where one is loaded to be trained.
        "attributes": {name: sorted(vars(m).keys() - {"_disable_adapters"}) for name, m in model.named_modules()},
        "disabled": {name: getattr(module, "_disable_adapters", None) for name, module in model.named_modules()},
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for name, tensor in before.pop("tensors").items():
        assert torch.equal(after["tensors"].pop(name), tensor), name
    assert not after.pop("tensors")
    assert after == before


# -- tensors that do not belong to the config or the model ------------------------------------------------------------


def _first(tensors: Tensors) -> str:
    return next(name for name in sorted(tensors) if "mept_prompts" in name)


def _without(tensors: Tensors, part: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def _with(tensors: Tensors, value: Tensor, name: str | None = None) -> Tensors:
    return tensors | {name or _first(tensors): value}


BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "one_tensor_missing": (lambda t: _without(t, _first(t)), {}, "lacks 1 of the 9 prompt tensors"),
    "routers_missing": (lambda t: _without(t, "mept_router"), {}, "lacks 3 of the 9 prompt tensors"),
    "last_layer_missing": (lambda t: _without(t, "layers.2."), {}, "lacks 3 of the 9.*fewer layers"),
    "extra_layer": (
        lambda t: _with(t, torch.zeros(4, 2, 16), _first(t).replace("layers.0", "layers.7")),
        {},
        "holds 1 prompt tensors that this model has no place for.*layers.7",
    ),
    "extra_tensor": (
        lambda t: _with(t, torch.zeros(2), _first(t).replace("mept_prompts", "mept_more")),
        {},
        "no place for.*mept_more",
    ),
    "base_weight": (
        lambda t: _with(t, torch.zeros(16), "base_model.model.model.norm.weight"),
        {},
        "neither prompts nor saved modules.*model.norm.weight",
    ),
    "tensor_of_nobody": (
        lambda t: _with(t, torch.zeros(16), "base_model.model.evil.weight"),
        {},
        "neither prompts nor saved modules.*evil",
    ),
    "nan": (lambda t: _with(t, t[_first(t)].clone().fill_(float("nan"))), {}, "not finite"),
    "one_inf": (
        lambda t: _with(t, t[_first(t)].clone().index_fill_(0, torch.tensor([3]), float("-inf"))),
        {},
        "not finite",
    ),
    "wrong_shape": (lambda t: _with(t, torch.zeros(4, 3, 16)), {}, r"shape \(4, 3, 16\) in the adapter file and"),
    "flattened": (lambda t: _with(t, t[_first(t)].flatten().clone()), {}, r"shape \(128,\)"),
    "scalar": (lambda t: _with(t, torch.zeros(())), {}, r"shape \(\)"),
    "empty": (lambda t: _with(t, torch.zeros(0, 2, 16)), {}, r"shape \(0, 2, 16\)"),
    "integers": (lambda t: _with(t, torch.ones(4, 2, 16, dtype=torch.int64)), {}, "dtype torch.int64"),
    "truth_values": (lambda t: _with(t, torch.ones(4, 2, 16, dtype=torch.bool)), {}, "dtype torch.bool"),
    "complex_numbers": (lambda t: _with(t, torch.ones(4, 2, 16, dtype=torch.complex64)), {}, "dtype torch.complex64"),
    "eight_bit_floats": (lambda t: _with(t, t[_first(t)].to(torch.float8_e4m3fn)), {}, "dtype torch.float8_e4m3fn"),
    "config_names_fewer_experts": (
        lambda t: t,
        {"num_experts": 2},
        r"\(4, 2, 16\) in the adapter file and \(2, 2, 16\)",
    ),
    "config_names_more_experts": (
        lambda t: t,
        {"num_experts": 8},
        r"\(4, 2, 16\) in the adapter file and \(8, 2, 16\)",
    ),
    "config_names_more_slots": (lambda t: t, {"num_virtual_tokens": 5}, "num_virtual_tokens"),
    "config_names_no_shared": (lambda t: t, {"num_shared_experts": 0}, "no place for.*mept_shared_prompts"),
    "config_names_more_shared": (lambda t: t, {"num_shared_experts": 2}, r"\(2, 2, 16\) in the model"),
    "config_names_one_expert": (lambda t: t, {"num_experts": 1}, "no place for.*mept_router"),
    "config_names_fewer_layers": (lambda t: t, {"layers_to_transform": [0, 1]}, "no place for.*layers.2"),
    "config_centres_routers": (lambda t: t, {"router_centering": True}, "lacks 6 of the 15"),
}


ENTRIES: dict[str, Callable[[Any, Path], Any]] = {
    "from_pretrained": lambda base, folder: PeftModel.from_pretrained(base, str(folder)),
    "trainable": lambda base, folder: PeftModel.from_pretrained(base, str(folder), is_trainable=True),
    "low_cpu_mem": lambda base, folder: PeftModel.from_pretrained(base, str(folder), low_cpu_mem_usage=True),
    "load_adapter": lambda model, folder: model.load_adapter(str(folder), adapter_name="second"),
    "load_trainable": lambda model, folder: model.load_adapter(str(folder), adapter_name="second", is_trainable=True),
    "transformers": lambda base, folder: base.load_adapter(str(folder)),
    "transformers_second": lambda base, folder: base.load_adapter(str(folder), adapter_name="second"),
}


def start(entry: str, good: Path) -> tuple[Any, Any]:
    """A base model, and what an adapter is loaded into by an entry: the model or one with an adapter."""
    base = make_base()
    if entry.startswith("load_"):
        return base, PeftModel.from_pretrained(base, good, adapter_name="first")
    if entry == "transformers_second":
        base.load_adapter(good, adapter_name="first")
    return base, base


def check_refused(entry: str, good: Path, folder: Path, error: Any, message: str) -> None:
    """An entry refuses a folder, leaves the model as it was, and takes a good one afterwards."""
    base, model = start(entry, good)
    before = snapshot(base)
    with pytest.raises(error, match=message):
        ENTRIES[entry](model, folder)
    assert_untouched(base, before)
    if entry.startswith("load_"):
        assert list(model.peft_config) == ["first"] and model.active_adapters == ["first"]
    loaded = ENTRIES[entry](model, good)
    if entry.startswith("load_"):
        model.set_adapter("second")
    elif entry.startswith("transformers"):
        base.set_adapter("second" if entry == "transformers_second" else "default")
    model = loaded if isinstance(loaded, PeftModel) else model
    with torch.no_grad():
        expected = PeftModel.from_pretrained(make_base(), good)(input_ids=IDS).logits
        assert torch.equal(model.eval()(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("entry", [name for name in ENTRIES if not name.startswith("transformers")])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_tensors(case: str, entry: str, good: Path, tmp_path: Path) -> None:
    change, config, message = BROKEN[case]
    folder = spoil(good, tmp_path / "bad", change(load_file(good / FILE)), **config)
    check_refused(entry, good, folder, ValueError, message)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_head_of_another_shape(entry: str, good: Path, tmp_path: Path) -> None:
    """torch refuses it when the prompts are loaded already."""
    tensors = load_file(good / FILE)
    name = next(name for name in tensors if "lm_head" in name)
    folder = spoil(good, tmp_path / "bad", _with(tensors, torch.zeros(7, 16), name))
    message = "size mismatch|ignore_mismatched_sizes"
    check_refused(entry, good, folder, RuntimeError, message)


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_weights(entry: str, good: Path, tmp_path: Path) -> None:
    """PEFT then takes the folder for the name of a repository."""
    folder = spoil(good, tmp_path / "bad")
    (folder / FILE).unlink()
    check_refused(entry, good, folder, (ValueError, OSError), "adapter_model|Repo id")


@pytest.mark.parametrize(
    ("width", "layers", "message"),
    [
        pytest.param(32, 3, r"\(4, 2, 16\) in the adapter file and \(4, 2, 32\) in the model", id="wider_model"),
        pytest.param(8, 3, r"\(4, 2, 16\) in the adapter file and \(4, 2, 8\) in the model", id="narrower_model"),
        pytest.param(16, 2, "no place for.*layers.2", id="shallower_model"),
        pytest.param(16, 4, "lacks 3 of the 12 prompt tensors", id="deeper_model"),
    ],
)
def test_adapter_of_another_model(width: int, layers: int, message: str, good: Path, tmp_path: Path) -> None:
    folder = spoil(good, tmp_path / "bad", _without(load_file(good / FILE), "lm_head"), modules_to_save=None)
    base = make_base(width, layers)
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert_untouched(base, before)


ELSEWHERE = {
    "mept": Case("mept", "bert", "sample", "sdpa"),
    "vapt": Case("vapt", "vit", "adaptive", "sdpa"),
    "pmoe": Case("pmoe", "vit", "dinov2", "sdpa"),
    "promotion": Case("promotion", "vit", "units", "sdpa"),
}


@pytest.mark.parametrize("architecture", ["llama", "t5", "distilbert", "vit", "timm_vit"])
@pytest.mark.parametrize("method", ELSEWHERE)
def test_adapter_of_another_architecture(method: str, architecture: str, tmp_path: Path) -> None:
    """Its own target modules, or none, are not there; or its tensors have other names."""
    case = ELSEWHERE[method]
    if architecture == case.architecture_name:
        architecture = "dinov2"
    case.model().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    base = Case("mept", architecture, "token", "sdpa").base() if architecture != "dinov2" else DINOV2.base()
    for target in (settings["target_modules"], None):
        (tmp_path / CONFIG).write_text(json.dumps(settings | {"target_modules": target}))
        before = snapshot(base)
        with pytest.raises(
            (ValueError, RuntimeError), match=r"target_modules|no place for|lacks|patch grid|image|size"
        ):
            PeftModel.from_pretrained(base, str(tmp_path))
        assert_untouched(base, before)


DINOV2 = Case("vapt", "dinov2", "adaptive", "sdpa")


def test_embeddings_that_grew_are_saved_and_loaded(tmp_path: Path) -> None:
    model = get_peft_model(make_base(), MEPTConfig(num_virtual_tokens=2))
    model.base_model.model.resize_token_embeddings(24)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / FILE))
    base = make_base()
    base.resize_token_embeddings(24)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_a_refused_file_takes_away_no_adapter_in_use(good: Path) -> None:
    """Only an adapter that was made to be read into is taken back; one that is being trained stays."""
    model = get_peft_model(make_base(), MEPTConfig(num_virtual_tokens=2))
    name = next(n for n in model.state_dict() if "mept_prompts" in n)
    with pytest.raises(ValueError, match="lacks"):
        model.load_state_dict({name: torch.zeros(4, 2, 16)}, strict=False)
    assert list(model.peft_config) == ["default"] and name in model.state_dict()
    trained = PeftModel.from_pretrained(make_base(), good)
    with torch.no_grad():
        trained(input_ids=IDS)
    with pytest.raises(ValueError, match="not finite"):
        trained.load_state_dict({n: t * torch.nan for n, t in trained.state_dict().items()})
    assert list(trained.peft_config) == ["default"]


# -- numbers in the config --------------------------------------------------------------------------------------------

HOSTILE_SETTINGS = [
    ("num_experts", 10_000_000),
    ("num_experts", 10**30),
    ("num_experts", -1),
    ("num_experts", 0),
    ("num_experts", True),
    ("num_experts", "4"),
    ("num_experts", float("nan")),
    ("num_experts", 4.0),
    ("num_experts", [4]),
    ("num_virtual_tokens", 50_000_000),
    ("num_virtual_tokens", -5),
    ("num_virtual_tokens", "10"),
    ("num_shared_experts", 10_000_000),
    ("num_shared_experts", -1),
    ("top_k", 0),
    ("top_k", 5),
    ("top_k", False),
    ("router_noise", float("nan")),
    ("router_noise", float("inf")),
    ("router_dropout", 1.5),
    ("balance_loss_weight", "1e9"),
    ("prompt_scale", float("-inf")),
    ("prompt_scale", 0),
    ("init_std", float("nan")),
    ("routing", "__import__('os')"),
    ("prompt_positions", {"a": 1}),
    ("layers_to_transform", [-1]),
    ("layers_to_transform", ["0"]),
    ("layers_to_transform", [99]),
    ("layers_to_transform", [0, 10**12]),
    ("target_modules", ["q_proj"]),
    ("target_modules", [1]),
    ("target_modules", "no_such_module"),
    ("modules_to_save", 3),
]


@pytest.mark.parametrize(
    ("field", "value"), [pytest.param(name, value, id=f"{name}={value!r:.16}") for name, value in HOSTILE_SETTINGS]
)
def test_hostile_settings(field: str, value: Any, good: Path, tmp_path: Path) -> None:
    folder = spoil(good, tmp_path / "bad", **{field: value})
    base = make_base()
    before = snapshot(base)
    tracemalloc.start()
    try:
        with pytest.raises((TypeError, ValueError)) as caught:
            PeftModel.from_pretrained(base, folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    named = (field, "num_virtual_tokens", f"does not have ({value!r})")
    assert any(name in str(caught.value) for name in named)
    assert peak < 64 * 2**20
    assert_untouched(base, before)


def test_millions_allocate_no_tensors(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: (sizes.append(1), plain(*args, **kwargs))[1])
    for field in ("num_experts", "num_virtual_tokens", "num_shared_experts"):
        with pytest.raises(ValueError, match=field):
            PeftModel.from_pretrained(make_base(), spoil(good, tmp_path / field, **{field: 3_000_000}))
    assert not sizes


def test_unknown_fields_of_a_newer_version_are_dropped_with_a_warning(good: Path, tmp_path: Path) -> None:
    folder = spoil(good, tmp_path / "newer", field_of_the_future={"trust_remote_code": True, "path": "/etc/passwd"})
    with pytest.warns(UserWarning, match="field_of_the_future"):
        config = PeftConfig.from_pretrained(folder)
    assert not hasattr(config, "field_of_the_future")


def test_a_version_number_from_the_future_is_no_reason_to_refuse(good: Path, tmp_path: Path) -> None:
    folder = spoil(good, tmp_path / "newer", peft_version="99.9.9")
    loaded = PeftModel.from_pretrained(make_base(), folder)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(make_base(), good)(input_ids=IDS).logits
        assert torch.equal(loaded(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '{"peft_type": 3}', '{"peft_type": ["MEPT"]}', '{"a":' * 100_000],
    ids=range(8),
)
def test_damaged_config(text: str, good: Path, tmp_path: Path) -> None:
    """PEFT reads it; nothing of it reaches the model."""
    folder = spoil(good, tmp_path / "bad")
    (folder / CONFIG).write_text(text)
    base = make_base()
    before = snapshot(base)
    with pytest.raises((ValueError, TypeError, KeyError, RecursionError)):
        PeftModel.from_pretrained(base, str(folder))
    assert_untouched(base, before)


def test_names_from_a_file_put_no_code_into_the_card(tmp_path: Path) -> None:
    """The card's snippet names the experts, and users run it."""
    evil = "ViT\nimport os  # \nos.system('true')\n```\n"
    config = PMoEConfig(experts=[nn.Identity()], expert_records=[{"name": evil}])
    for experts in ([nn.Identity()], [evil]):
        config.experts = experts
        lines = config.card_preparation().splitlines()
        assert len(lines) == 2 and all(line.startswith("config") for line in lines)
        assert ast.unparse(ast.parse("\n".join(lines))).count("\n") == 1


@pytest.mark.parametrize("library", ["os", "subprocess", "evil_package"])
def test_config_that_names_a_module_to_import(library: str, good: Path, tmp_path: Path) -> None:
    mapping = {"base_model_class": "system", "parent_library": library}
    folder = spoil(good, tmp_path / "bad", auto_mapping=mapping, task_type=None, base_model_name_or_path="x")
    with pytest.raises((ValueError, ImportError, KeyError, TypeError), match=rf"base model is one of {library}\."):
        AutoPeftModelForCausalLM.from_pretrained(folder)


# -- files that are no safetensors ------------------------------------------------------------------------------------


def _write(folder: Path, data: bytes) -> None:
    (folder / FILE).write_bytes(data)


def _file(header: bytes, size: int) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(size)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="truncated_data"),
        pytest.param(lambda data: data[:100], id="truncated_header"),
        pytest.param(lambda data: data[:4], id="truncated_length"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: struct.pack("<Q", 2**62) + data[8:], id="header_length_bomb"),
        pytest.param(lambda data: struct.pack("<Q", 2**31) + data[8:], id="header_of_two_gigabytes"),
        pytest.param(lambda data: data[:8] + b"\xff" * (len(data) - 8), id="header_is_no_json"),
        pytest.param(
            lambda data: _file(b'{"a":{"dtype":"F32","shape":[999999999,999999999],"data_offsets":[0,4]}}', 4),
            id="shape_bomb",
        ),
        pytest.param(
            lambda data: _file(
                b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
                8,
            ),
            id="duplicate_keys",
        ),
    ],
)
def test_damaged_safetensors(entry: str, damage: Callable[[bytes], bytes], good: Path, tmp_path: Path) -> None:
    """The message is that of safetensors, which reads the file; by then the adapter stands in the model."""
    folder = spoil(good, tmp_path / "bad")
    _write(folder, damage((good / FILE).read_bytes()))
    check_refused(entry, good, folder, (SafetensorError, ValueError, OSError), ".")


class Payload:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"open({str(self.witness)!r}, 'w').write('executed')",)


@pytest.mark.parametrize("entry", ["peft", "transformers"])
def test_pickle_payload_is_never_executed(entry: str, good: Path, tmp_path: Path) -> None:
    folder, witness = spoil(good, tmp_path / "bad"), tmp_path / "witness"
    (folder / FILE).unlink()
    torch.save({"base_model.model.x.mept_prompts.weight": Payload(witness)}, folder / "adapter_model.bin")
    with pytest.raises((pickle.UnpicklingError, ValueError, OSError, RuntimeError)):
        if entry == "peft":
            PeftModel.from_pretrained(make_base(), folder)
        else:
            make_base().load_adapter(folder)
    assert not witness.exists()
    # The bait works where pickles are trusted.
    torch.load(folder / "adapter_model.bin", weights_only=False)
    assert witness.exists()


# -- names and kernels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["a.b", ".", "a/b", "../up", "a\\b", "mept_", "my_mept_adapter", "mept", "m", "promptmoe", "", "weight.x"],
    ids=lambda name: name or "empty",
)
@pytest.mark.parametrize("entry", ["get_peft_model", "from_pretrained", "add_adapter", "load_adapter", "transformers"])
def test_adapter_names(name: str, entry: str, good: Path) -> None:
    base = make_base()
    model: Any = base
    if entry in ("add_adapter", "load_adapter"):
        model = get_peft_model(base, MEPTConfig(num_virtual_tokens=2))
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"name|module path|substring|not allowed"):
        if entry == "get_peft_model":
            get_peft_model(base, MEPTConfig(num_virtual_tokens=2), adapter_name=name)
        elif entry == "from_pretrained":
            PeftModel.from_pretrained(base, good, adapter_name=name)
        elif entry == "add_adapter":
            model.add_adapter(name, MEPTConfig(num_virtual_tokens=2))
        elif entry == "load_adapter":
            model.load_adapter(good, adapter_name=name)
        else:
            base.load_adapter(good, adapter_name=name)
    assert_untouched(base, before)
    if entry in ("add_adapter", "load_adapter"):
        assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("kernel", ["paged|sdpa", "somebody/else"])
def test_kernels_that_are_not_supported(kernel: str, good: Path) -> None:
    for attempt in (
        lambda base: get_peft_model(base, MEPTConfig(num_virtual_tokens=2)),
        lambda base: PeftModel.from_pretrained(base, good),
        lambda base: base.load_adapter(good),
    ):
        base = make_base()
        base.config._attn_implementation_internal = kernel
        before = snapshot(base)
        with pytest.raises(ValueError, match=rf"uses '{re.escape(kernel)}'.*set_attn_implementation\('sdpa'\)"):
            attempt(base)
        assert_untouched(base, before)


# -- transformers' own loader -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["one_tensor_missing", "routers_missing", "last_layer_missing", "nan", "one_inf"])
def test_transformers_loader_is_checked_at_the_first_forward(case: str, good: Path, tmp_path: Path) -> None:
    """It reads tensor by tensor and only logs what is missing; the adapter does not run before somebody looked."""
    change, config, message = BROKEN[case]
    base = make_base()
    base.load_adapter(spoil(good, tmp_path / "bad", change(load_file(good / FILE)), **config))
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            base(input_ids=IDS)


@pytest.mark.parametrize("case", ["wrong_shape", "config_names_fewer_experts", "config_names_more_experts"])
def test_transformers_loader_refuses_shapes_itself(case: str, good: Path, tmp_path: Path) -> None:
    change, config, _ = BROKEN[case]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        make_base().load_adapter(spoil(good, tmp_path / "bad", change(load_file(good / FILE)), **config))


def test_transformers_loader_of_a_good_file(good: Path) -> None:
    base = make_base()
    base.load_adapter(good)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(make_base(), good)(input_ids=IDS).logits
        assert torch.equal(base(input_ids=IDS).logits, expected)
