# SPDX-License-Identifier: Apache-2.0
"""Every way that PEFT and transformers offer to make, load and share an adapter (TARGETS E.2a: the entry points)."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
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
    prompted,
    prompted_base,
    set_head,
    train,
)
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn

FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.fixture
def saved(case: Case, tmp_path: Path) -> tuple[PeftModel, Path, Path]:
    """A trained model, the folder of its adapter and the folder of its base model, which the adapter names."""
    base_folder, folder = tmp_path / "base", tmp_path / "adapter"
    case.base().save_pretrained(base_folder)
    base = auto_base(case, base_folder)
    model = case.model(base)
    train(model, case.batch(), 1)
    set_head(model)
    model.save_pretrained(folder)
    return model, folder, base_folder


def auto_base(case: Case, folder: Path) -> nn.Module:
    return case.model_class.from_pretrained(folder, **case.kernel_setting).eval()


# -- PEFT -------------------------------------------------------------------------------------------------------------


@each_case(one_per_architecture)
def test_peft_config_from_pretrained(case: Case, saved: tuple[PeftModel, Path, Path]) -> None:
    model, folder, base_folder = saved
    config = PeftConfig.from_pretrained(folder)
    expected = model.peft_config["default"]
    assert type(config) is type(expected) is case.method.config
    assert config.base_model_name_or_path == str(base_folder)
    assert config.inference_mode is True
    for name in case.method.settings:
        assert getattr(config, name) == getattr(expected, name)
    fresh = get_peft_model(case.base(), config)
    assert not [name for name, p in fresh.named_parameters() if p.requires_grad and case.method.prefix in name]


def has_auto_peft(case: Case) -> bool:
    """PEFT imports classes of transformers by itself, and has no Auto class of models that read images and write."""
    return hasattr(transformers, case.architecture.model) and case.architecture.auto != "AutoModelForImageTextToText"


@each_case(has_auto_peft)
def test_auto_peft_model_is_bit_exact(case: Case, saved: tuple[PeftModel, Path, Path]) -> None:
    model, folder, _ = saved
    labels = {"num_labels": 3} if case.task_type in ("SEQ_CLS", "TOKEN_CLS") else {}
    loaded = getattr(peft, case.architecture.auto_peft).from_pretrained(folder, **labels)
    assert_equal(predict(loaded, case.batch()), predict(model, case.batch()), "logits of AutoPeftModelFor...")


@each_case()
def test_load_set_and_delete_adapter(case: Case, saved: tuple[PeftModel, Path, Path]) -> None:
    model, folder, base_folder = saved
    batch, expected = case.batch(), predict(model, case.batch())
    other = case.model(auto_base(case, base_folder), **case.method.other)
    first = predict(other, batch)
    other.load_adapter(folder, "loaded")
    assert_equal(predict(other, batch), first, "logits after loading an inactive adapter")
    other.set_adapter("loaded")
    assert_equal(predict(other, batch), expected, "logits of the loaded adapter")
    other.set_adapter("default")
    other.delete_adapter("loaded")
    assert_equal(predict(other, batch), first, "logits after deleting the loaded adapter")


@each_case()
def test_inject_adapter_in_model(case: Case, saved: tuple[PeftModel, Path, Path]) -> None:
    """By config alone, and with the state dict that tells where adapters go."""
    model, _, base_folder = saved
    batch, expected = case.batch(), predict(model, case.batch())
    tensors = get_peft_model_state_dict(model)
    inner = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    for state_dict in (None, {name: t for name, t in inner.items() if case.method.prefix in name}):
        base = auto_base(case, base_folder)
        config = case.config()
        injected = inject_adapter_in_model(config, base, state_dict=state_dict)
        assert injected is base and not isinstance(injected, PeftModel)
        assert len(prompted(base)) == len(prompted(model))
        set_peft_model_state_dict(base, inner)
        assert_equal(predict(base, batch), expected, "logits after inject_adapter_in_model")


def copy_heads(source: nn.Module, target: nn.Module, original: bool = False) -> None:
    """Give the heads of a `PeftModel` to a model that PEFT does not wrap, into whatever holds them there."""
    which = ".original_module." if original else ".modules_to_save.default."
    found = {name.removeprefix("base_model.model."): p.detach() for name, p in source.named_parameters()}
    heads = {name.replace(which, "."): p for name, p in found.items() if which in name}
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            plain = re.sub(r"\.(modules_to_save\.\w+|original_module)\.", ".", name)
            if plain in heads:
                parameter.copy_(heads[plain])


# -- transformers -----------------------------------------------------------------------------------------------------


@each_case()
def test_transformers_add_load_switch_delete(case: Case, saved: tuple[PeftModel, Path, Path]) -> None:
    model, folder, base_folder = saved
    batch, expected = case.batch(), predict(model, case.batch())
    base: Any = auto_base(case, base_folder)
    plain = predict(base, batch)
    base.add_adapter(case.config(), adapter_name="fresh")
    assert_different(predict(base, batch), plain, "logits with a fresh adapter")
    base.load_adapter(folder, adapter_name="loaded")
    base.set_adapter("loaded")
    copy_heads(model, base)
    assert_equal(predict(base, batch), expected, "logits of an adapter that transformers loaded")
    base.disable_adapters()
    copy_heads(model, base, original=True)
    assert_equal(predict(base, batch), plain, "logits of disabled adapters")
    base.enable_adapters()
    assert_different(predict(base, batch), plain, "logits of enabled adapters")
    base.delete_adapter("fresh")
    assert base.active_adapters() == ["loaded"]
    assert not [name for name in base.state_dict() if ".fresh" in name]


@each_case(one_per_architecture)
def test_transformers_saves_what_it_was_given(case: Case, tmp_path: Path) -> None:
    base: Any = case.base()
    torch.manual_seed(1)
    # PEFT's wrappers add a task's head by themselves; transformers' add_adapter leaves it to the user.
    base.add_adapter(case.config(modules_to_save=list(case.architecture.heads) or case.config().modules_to_save))
    base.save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written - {"generation_config.json"} == FILES
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    found = {name.removeprefix("base_model.model."): p for name, p in adapter_parameters(case, loaded).items()}
    expected = adapter_parameters(case, base)
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert_equal(found[name], parameter, name)


@each_case(lambda case: case.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"))
def test_transformers_from_pretrained_of_an_adapter_folder(case: Case, saved: tuple[PeftModel, Path, Path]) -> None:
    model, folder, _ = saved
    auto = getattr(transformers, case.architecture.auto)
    loaded = auto.from_pretrained(folder)
    assert type(loaded).__name__ == case.architecture.model
    assert_equal(predict(loaded, case.batch()), predict(model, case.batch()), "logits of AutoModel.from_pretrained")


@each_case(lambda case: bool(case.architecture.heads) and one_per_architecture(case))
def test_transformers_from_pretrained_of_an_adapter_folder_with_head(
    case: Case, saved: tuple[PeftModel, Path, Path]
) -> None:
    """The prompts arrive; a head only as far as transformers loads `modules_to_save` at all."""
    model, folder, _ = saved
    loaded = case.model_class.from_pretrained(folder)
    expected = {n.removeprefix("base_model.model."): p for n, p in adapter_parameters(case, model).items()}
    found = adapter_parameters(case, loaded)
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert_equal(found[name], parameter, name)


# -- other tasks ------------------------------------------------------------------------------------------------------


@each_case(lambda case: case.architecture_name == "bert")
@pytest.mark.parametrize("task_type", ["FEATURE_EXTRACTION", None])
def test_tasks_without_a_head(case: Case, task_type: str | None, tmp_path: Path) -> None:
    """FEATURE_EXTRACTION, and no task type at all, on the bare encoder."""

    def encoder() -> nn.Module:
        return case.base().bert

    config = case.config()
    config.task_type = task_type
    model = get_peft_model(encoder(), config).eval()
    ids = case.batch((6, 6))["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
        assert expected.shape == (2, 6, 32)
        assert_different(expected, encoder()(input_ids=ids).last_hidden_state, "prompted and plain states")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(encoder(), tmp_path)
        assert_equal(loaded(input_ids=ids).last_hidden_state, expected, "states after loading")


# -- the Hub ----------------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for the Hub client; keeps what was uploaded."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations: list[Any], **_: Any) -> None:
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()


SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


def run(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@each_case(lambda case: case.architecture_name in ("roberta", "modernbert", "llama") and one_per_architecture(case))
def test_push_to_hub_and_the_card_of_what_was_pushed(
    case: Case, saved: tuple[PeftModel, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is uploaded are the three files; the snippet of the card runs in a fresh process, next to them."""
    from transformers.utils import hub

    model = saved[0]
    client = Hub()
    monkeypatch.setattr(hub, "hf_api", lambda: client)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: _hub_card())
    model.push_to_hub("someone/adapter")
    assert client.files.keys() == FILES
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name, content in client.files.items():
        (downloaded / name).write_bytes(content)
    snippets = SNIPPET.findall((downloaded / "README.md").read_text())
    assert snippets, "the pushed card does not say how to load the adapter"
    check_snippet(case, snippets[0], model, downloaded, tmp_path)


def _hub_card() -> Any:
    from huggingface_hub import ModelCard

    return ModelCard("---\nlibrary_name: transformers\n---\n# Somebody's text\n")


@each_case(lambda case: case.architecture_name in ("distilbert", "t5") and one_per_architecture(case))
def test_the_snippet_of_the_saved_card_runs(case: Case, saved: tuple[PeftModel, Path, Path], tmp_path: Path) -> None:
    model, folder, _ = saved
    card = (folder / "README.md").read_text()
    assert "import peft_promptmoe" in card and 'pip install "peft-promptmoe @ git+https://' in card
    check_snippet(case, SNIPPET.findall(card)[0], model, folder, tmp_path)


def check_snippet(case: Case, snippet: str, model: PeftModel, folder: Path, tmp_path: Path) -> None:
    batch = case.batch()
    torch.save(batch, tmp_path / "batch.pt")
    code = f"""
import sys, torch
torch.set_num_threads(1)
{snippet}
with torch.no_grad():
    output = model.eval()(**torch.load({str(tmp_path / "batch.pt")!r}))
logits = output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], -1)
torch.save(logits, {str(tmp_path / "logits.pt")!r})
"""
    done = run(code, folder)
    assert done.returncode == 0, done.stderr
    assert_equal(torch.load(tmp_path / "logits.pt"), predict(model, batch), "logits of the card's snippet")


@each_case(lambda case: case.architecture_name == "llama" and one_per_architecture(case))
def test_without_the_import_loading_ends_in_a_key_error(case: Case, saved: tuple[PeftModel, Path, Path]) -> None:
    """What the model card says a stranger will see, and the import that cures it."""
    _, folder, _ = saved
    name = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    code = f"""
from peft import AutoPeftModelForCausalLM
try:
    AutoPeftModelForCausalLM.from_pretrained(".")
except KeyError as error:
    assert error.args == ({name!r},), error
else:
    raise AssertionError("loading worked without the import")
import peft_promptmoe
AutoPeftModelForCausalLM.from_pretrained(".")
"""
    done = run(code, folder)
    assert done.returncode == 0, done.stderr


def test_registering_twice_changes_nothing() -> None:
    import peft_promptmoe

    before = dict(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    members = list(peft.PeftType)
    importlib.import_module("peft_promptmoe")
    assert before == peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    assert members == list(peft.PeftType)
    for case in CASES:
        assert peft.PeftType(case.config().peft_type.value) is case.config().peft_type
    assert peft_promptmoe.__version__


@each_case(one_per_architecture)
def test_one_root_and_one_child_per_attention_layer(case: Case) -> None:
    model = case.model()
    model.add_adapter("other", case.config(**case.method.other))
    children = [name for name, _ in model.named_modules() if name.endswith(f".{PROMPT_CHILD}")]
    assert len(children) == len(prompted_base(model)) + 1
