# SPDX-License-Identifier: Apache-2.0
"""What is on disk: bit-exact round trips, stable names and bytes, reload as a model that trains on."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    PROMPT_CHILD,
    Case,
    adapter_parameters,
    assert_different,
    assert_equal,
    each_case,
    one_per_architecture,
    predict,
    set_head,
    train,
    trains_alone,
)
from filelock import FileLock
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

HERE = Path(__file__).parent
MANIFESTS = HERE / "manifests"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def trained(case: Case) -> PeftModel:
    model = case.model()
    train(model, case.batch(), 2)
    set_head(model)
    return model


@each_case()
def test_save_and_load_gives_the_same_logits(case: Case, trained: PeftModel, tmp_path: Path) -> None:
    batch = case.batch()
    expected = predict(trained, batch)
    trained.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG, "README.md"}
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert_equal(predict(loaded, batch), expected, "logits before saving and after loading")


@each_case()
def test_meta_device_load_gives_the_same_logits(case: Case, trained: PeftModel, tmp_path: Path) -> None:
    batch = case.batch()
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=True)
    assert not [name for name, parameter in loaded.named_parameters() if parameter.is_meta]
    assert_equal(predict(loaded, batch), predict(trained, batch), "logits with low_cpu_mem_usage")


@each_case()
def test_trainable_reload_continues_the_loss_curve(case: Case, trained: PeftModel, tmp_path: Path) -> None:
    batch = case.batch()
    trained.save_pretrained(tmp_path)
    expected = train(trained, batch, 3)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True)
    assert train(loaded, batch, 3) == expected
    assert expected[0] != expected[-1]


@each_case()
def test_the_adapter_name_leaves_no_trace_in_the_files(case: Case, tmp_path: Path) -> None:
    model, named = case.model(), case.model(adapter="second-try")
    model.save_pretrained(tmp_path)
    named.save_pretrained(tmp_path)
    folder = tmp_path / "second-try"
    for name in (WEIGHTS, CONFIG):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), f"{name} depends on the adapter's name"
    loaded = PeftModel.from_pretrained(case.base(), folder, adapter_name="third")
    assert_equal(predict(loaded, case.batch()), predict(model, case.batch()), "logits under another adapter name")


@each_case()
def test_a_trained_base_model_state_dict_round_trip(case: Case, trained: PeftModel) -> None:
    """The state dict of the wrapped model holds everything that was trained."""
    fresh = case.model()
    assert_different(predict(fresh, case.batch()), predict(trained, case.batch()), "trained and fresh logits")
    fresh.load_state_dict(trained.state_dict())
    assert_equal(predict(fresh, case.batch()), predict(trained, case.batch()), "logits after load_state_dict")


@each_case()
def test_deep_copies_are_independent(case: Case, trained: PeftModel) -> None:
    batch = case.batch()
    before = predict(trained, batch)
    copied = deepcopy(trained)
    assert_equal(predict(copied, batch), before, "logits of model and copy")
    train(copied, batch, 2, rate=0.5)
    assert_different(predict(copied, batch), before, "logits of the copy after training it")
    assert_equal(predict(trained, batch), before, "logits of the original after training its copy")
    copied.unload()
    assert_equal(predict(trained, batch), before, "logits of the original after unloading its copy")
    mine = {id(module) for module in trained.modules()}
    for module in copied.modules():
        for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]:
            assert id(getattr(hook, "__self__", None)) not in mine, "a hook of the copy belongs to the original"


@each_case()
def test_a_pickled_config_is_equal(case: Case) -> None:
    config = case.model().peft_config["default"]
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert again.peft_type is config.peft_type


@each_case()
def test_the_same_seed_gives_the_same_start(case: Case) -> None:
    one, two = (adapter_parameters(case, case.model()) for _ in range(2))
    assert one.keys() == two.keys()
    for name in one:
        assert_equal(one[name], two[name], name)
    torch.manual_seed(5)
    other = adapter_parameters(case, PeftModel(case.base(), case.config()))
    assert any(not torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------------------------------
# The names in a file: adapters of today must load in every later version
# ---------------------------------------------------------------------------------------------------------------------


def saved_names(case: Case) -> dict[str, Any]:
    """Names, shapes and types of the tensors in a saved adapter, and the names of its config's fields."""
    model = case.model()
    tensors = {without_hashes(model, name): value for name, value in get_peft_model_state_dict(model).items()}
    trained = [without_hashes(model, name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {
        "tensors": {name: f"{str(tensors[name].dtype)[6:]}{list(tensors[name].shape)}" for name in sorted(tensors)},
        "trained": sorted(trained),
    }


def without_hashes(model: PeftModel, name: str) -> str:
    """Experts are named by the hash of their weights, and random weights need not be the same on every machine."""
    for number, record in enumerate(getattr(model.peft_config["default"], "expert_records", None) or (), start=1):
        name = name.replace(f".e{record['weights'][:12]}.", f".<expert {number}>.")
    return name


def manifest_path(case: Case) -> Path:
    return MANIFESTS / f"{case}.json"


@each_case()
def test_saved_names_are_those_of_the_manifest(case: Case) -> None:
    found = saved_names(case)
    expected = json.loads(manifest_path(case).read_text())
    for what in ("tensors", "trained"):
        lost = sorted(set(expected[what]) - set(found[what]))
        new = sorted(set(found[what]) - set(expected[what]))
        assert not lost and not new, (
            f"The {what} of {case} are not those of tests/contract/manifests/{case}.json.\n"
            f"  lost: {lost}\n  new: {new}\n"
            "Adapters that users have saved hold the old names and would no longer load. If that is meant, keep a way "
            "to load the old names, say so in CHANGELOG.md and run python tests/contract/test_saving.py."
        )
    assert found == expected, "shapes or types of saved tensors changed; see above for what that means"


def test_every_manifest_has_its_case() -> None:
    expected = {manifest_path(case).name for case in CASES if case.kernel == "sdpa"}
    assert {path.name for path in MANIFESTS.iterdir()} == expected


# ---------------------------------------------------------------------------------------------------------------------
# Bytes from two processes
# ---------------------------------------------------------------------------------------------------------------------

SAVE_AND_SAVE_AGAIN = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from cases import CASES, PeftModel, set_head, torch
torch.set_num_threads(1)
target, source = Path(sys.argv[1]), sys.argv[2] and Path(sys.argv[2])
for case in CASES:
    if case.kernel != "sdpa":
        continue
    if source:
        model = PeftModel.from_pretrained(case.base(), source / str(case), is_trainable=True)
    else:
        model = case.model(target_modules=None, layers_to_transform=[1, 0])
        set_head(model)
    model.save_pretrained(target / str(case))
"""


@pytest.fixture(scope="session")
def saved_twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders with the adapters of all cases: saved by one process, and loaded and saved again by another."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    first, second = root / "saved_first", root / "saved_again"
    with FileLock(root / "saved_twice.lock"):
        for folder, source, seed in ((first, "", "1"), (second, str(first), "2")):
            if not folder.exists():
                script = SAVE_AND_SAVE_AGAIN.format(here=str(HERE))
                environment = os.environ | {"PYTHONHASHSEED": seed}
                subprocess.run([sys.executable, "-c", script, str(folder), source], check=True, env=environment)
    return first, second


@each_case()
def test_saving_again_from_another_process_gives_the_same_bytes(case: Case, saved_twice: tuple[Path, Path]) -> None:
    first, second = (folder / str(case) for folder in saved_twice)
    assert load_file(first / WEIGHTS).keys() == load_file(second / WEIGHTS).keys()
    for name in (CONFIG, WEIGHTS, "README.md"):
        one, two = (folder / name for folder in (first, second))
        assert one.read_bytes() == two.read_bytes(), f"{name} changes when an adapter is loaded and saved again"


# ---------------------------------------------------------------------------------------------------------------------
# Which tensors
# ---------------------------------------------------------------------------------------------------------------------


@each_case(one_per_architecture)
def test_the_file_holds_the_adapter_and_the_head_and_nothing_else(case: Case) -> None:
    names = get_peft_model_state_dict(case.model())
    heads = case.architecture.heads
    foreign = [
        name for name in names if case.method.prefix not in name and not any(f".{head}." in name for head in heads)
    ]
    assert not foreign
    for head in heads:
        assert any(f".{head}." in name for name in names), f"the head {head} is not saved"
    assert all(f".{PROMPT_CHILD}." in name for name in names if case.method.prefix in name)


@each_case(trains_alone)
def test_a_loaded_adapter_is_frozen_unless_asked(case: Case, tmp_path: Path) -> None:
    case.model().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


if __name__ == "__main__":
    MANIFESTS.mkdir(exist_ok=True)
    for _case in CASES:
        if _case.kernel == "sdpa":
            manifest_path(_case).write_text(json.dumps(saved_names(_case), indent=1, sort_keys=True) + "\n")
