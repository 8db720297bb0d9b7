# SPDX-License-Identifier: Apache-2.0
"""What is loaded: all that PEFT writes for a config comes back, and nothing else gets in by a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from peft_promptmoe import MEPTConfig, VAPTConfig

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VOCABULARY, GROWN = 40, 43
IDS = torch.tensor([[3, 4, 5, 41, 42], [7, 8, 40, 9, 10]])
FILE = "adapter_model.safetensors"


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, tie_word_embeddings=tied, **SIZES)
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))


def bert_mlm() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **SIZES))


def bert(seed: int = 0, **settings: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **SIZES | {"num_labels": 3} | settings))


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=3, **SIZES))


def grown(make: Callable[[], Any]) -> Any:
    model = make()
    model.resize_token_embeddings(GROWN)
    return model


@torch.no_grad()
def changed(model: Any) -> Any:
    """The model with all that trains changed by a lot."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    more = {"decoder_input_ids": ids[:, :2]} if model.config.model_type == "t5" else {}
    return model.eval()(input_ids=ids, **more).logits


# -- what PEFT writes -------------------------------------------------------------------------------------------------

BASES: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama_tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "t5": t5,
    "bert_mlm": bert_mlm,
}


@pytest.mark.parametrize("name", BASES)
def test_embeddings_of_a_grown_vocabulary(name: str, tmp_path: Path) -> None:
    """Tied ones are written under the head's name as well, and heads may have a bias."""
    model = changed(get_peft_model(grown(BASES[name]), MEPTConfig(num_virtual_tokens=2)))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(grown(BASES[name]), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="+".join)
def test_saved_modules_of_a_grown_vocabulary(tied: bool, saved: list[str], tmp_path: Path) -> None:
    """PEFT sees that the vocabulary has grown and writes embeddings beside their own saved copies."""
    llama(tied).save_pretrained(tmp_path / "base")
    base = grown(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    config = MEPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, modules_to_save=saved)
    model = changed(get_peft_model(base, config))
    model.save_pretrained(tmp_path / "adapter")
    base = grown(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), logits(model))


OTHERS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(target_modules=["q_proj"]),
    "dora": lambda: LoraConfig(target_modules=["q_proj"], use_dora=True),
    "lora_on_embeddings": lambda: LoraConfig(target_modules=["embed_tokens"]),
    "lora_with_head": lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "lora_with_tokens": lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    "tokens": lambda: TrainableTokensConfig(token_indices=[3, 4], target_modules=["embed_tokens"]),
    "ia3": lambda: IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", OTHERS)
def test_another_methods_adapter_in_the_same_file(name: str, tied: bool, tmp_path: Path) -> None:
    """Adapters of one name are saved together."""

    def beneath() -> PeftModel:
        return get_peft_model(llama(tied), OTHERS[name]())

    ids = IDS % VOCABULARY
    model = changed(get_peft_model(beneath(), MEPTConfig(num_virtual_tokens=2)))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(beneath(), tmp_path), ids), logits(model, ids))


def test_another_methods_file_onto_prompts(tmp_path: Path) -> None:
    """LoRA may bring the base model's biases, which is no business of ours."""

    def beneath() -> PeftModel:
        return get_peft_model(bert(), MEPTConfig(num_virtual_tokens=2), adapter_name="prompts")

    model = changed(get_peft_model(beneath(), LoraConfig(target_modules=["query"], bias="all"), adapter_name="lora"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(beneath(), tmp_path / "lora", adapter_name="lora")
    name = "base_model.model.base_model.model.bert.encoder.layer.0.output.dense.bias"
    assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])


def test_the_trainer_resumes_with_saved_embeddings(tmp_path: Path) -> None:
    def run(resume: bool) -> dict[str, Tensor]:
        config = MEPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, modules_to_save=["embed_tokens", "lm_head"])
        torch.manual_seed(0)
        model = get_peft_model(grown(llama), config)
        settings = {"report_to": [], "use_cpu": True, "save_steps": 1, "logging_steps": 1, "disable_tqdm": True}
        arguments = TrainingArguments(tmp_path, max_steps=2, per_device_train_batch_size=1, **settings)
        data = [{"input_ids": row, "labels": row} for row in IDS]
        Trainer(model, arguments, train_dataset=data).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1") if resume else None
        )
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    whole, resumed = run(False), run(True)
    assert any("embed_tokens" in name for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


# -- what a user loads by hand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("unfrozen", ["head", "norms"])
@pytest.mark.parametrize("kind", ["mept", "vapt", "loaded"])
def test_a_checkpoint_of_what_trains(kind: str, unfrozen: str, used: bool, tmp_path: Path) -> None:
    """Prompts and what was thawed by hand; also into an adapter that came from a file."""
    inputs: dict[str, Tensor] = (
        {"pixel_values": torch.ones(1, 3, 16, 16)} if kind == "vapt" else {"input_ids": IDS % 40}
    )

    def make() -> PeftModel:
        if kind == "vapt":
            model = get_peft_model(vit(), VAPTConfig(num_virtual_tokens=2, modules_to_save=[]))
        elif kind == "loaded":
            get_peft_model(bert(), MEPTConfig(num_virtual_tokens=2)).save_pretrained(tmp_path)
            model = PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)
        else:
            model = get_peft_model(bert(), MEPTConfig(num_virtual_tokens=2))
        part = "classifier" if unfrozen == "head" else "norm"
        for name, parameter in model.named_parameters():
            if part in name.lower():
                parameter.requires_grad_(True)
        return model.eval()

    trained = changed(make())
    checkpoint = {name: p.detach().clone() for name, p in trained.named_parameters() if p.requires_grad}
    assert any("promptmoe" not in name for name in checkpoint)
    model = make()
    with torch.no_grad():
        if used:
            model(**inputs)
        assert not model.load_state_dict(checkpoint, strict=False).unexpected_keys
        assert torch.equal(model(**inputs).logits, trained(**inputs).logits)


# -- what a stranger's file brings ------------------------------------------------------------------------------------


def hostile(folder: Path, more: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> Path:
    get_peft_model(llama(), MEPTConfig(num_virtual_tokens=2, **config)).save_pretrained(folder)
    tensors = load_file(folder / FILE)
    save_file(tensors | {name: tensor.contiguous() for name, tensor in more(tensors).items()}, folder / FILE)
    return folder


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def whole_model(_: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"base_model.model.{name}": tensor + 1 for name, tensor in llama().state_dict().items()}


@pytest.mark.parametrize("trainable", [False, True], ids=["inference", "trainable"])
def test_a_whole_base_model_in_the_file_is_refused(trainable: bool, tmp_path: Path) -> None:
    base = llama()
    before = state(base)
    with pytest.raises(ValueError, match=r"neither prompts nor saved modules.*must not contain weights of the base"):
        PeftModel.from_pretrained(base, hostile(tmp_path, whole_model), is_trainable=trainable)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("part", ["prompts", "head", "embeddings"])
def test_tensors_of_another_adapter_are_refused(part: str, tmp_path: Path) -> None:
    """Under the name that most adapters have, a file could overwrite one that is in use."""

    def more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if part == "prompts":
            return {k.replace(".weight", ".default.weight"): t + 1 for k, t in tensors.items() if "promptmoe" in k}
        name = "lm_head" if part == "head" else "model.embed_tokens"
        return {f"base_model.model.{name}.modules_to_save.default.weight": torch.zeros(VOCABULARY, 16)}

    saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
    model = get_peft_model(llama(), MEPTConfig(num_virtual_tokens=2, **saved))
    before = state(model)
    with pytest.raises(ValueError, match="neither prompts nor saved modules"):
        model.load_adapter(hostile(tmp_path, more, **saved), "second")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_to_resume_from_is_looked_at_as_any_file(tmp_path: Path) -> None:
    model = get_peft_model(llama(), MEPTConfig(num_virtual_tokens=2))
    logits(model, IDS % VOCABULARY)
    before = state(model)
    with pytest.raises(ValueError, match="neither prompts nor saved modules"):
        model.load_adapter(hostile(tmp_path, whole_model), "default", is_trainable=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
def test_transformers_loader_brings_no_weight_of_the_base_model(second: bool, tmp_path: Path) -> None:
    """It asks nobody and puts new tensors in the place of old ones, which then come back."""
    base = llama()
    if second:
        base.load_adapter(hostile(tmp_path / "good", lambda _: {}), "first")
    before = state(base)
    folder = hostile(tmp_path / "bad", lambda _: {"base_model.model.model.norm.weight": torch.zeros(16)})
    with pytest.raises(ValueError, match=r"neither prompts nor saved modules, for example 'model.norm.weight'"):
        base.load_adapter(folder, "second" if second else "first")
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    base.load_adapter(hostile(tmp_path / "fine", lambda _: {}), "third")


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "recorded"), [("peft", True), ("peft", False), ("transformers", True)])
def test_another_number_of_classes_names_num_labels(entry: str, recorded: bool, tmp_path: Path) -> None:
    """In older files nothing is recorded; transformers' loader hands no tensor on, so there only the record tells."""
    model = get_peft_model(bert(num_labels=5), MEPTConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    if not recorded:
        model.peft_config["default"].base_record = None
    model.save_pretrained(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"trained with 5 classes, but the base model has 3.*num_labels=5"
    ) as caught:
        PeftModel.from_pretrained(bert(), tmp_path) if entry == "peft" else bert().load_adapter(tmp_path)
    assert str(caught.value).count("num_labels") == 1
    loaded = PeftModel.from_pretrained(bert(), tmp_path, ignore_mismatched_sizes=True)
    assert logits(loaded, IDS % VOCABULARY).shape == (2, 3)


def test_another_vocabulary_names_the_call(tmp_path: Path) -> None:
    config = MEPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, modules_to_save=["lm_head"])
    get_peft_model(grown(llama), config).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=rf"resize_token_embeddings\({GROWN}\)"):
        PeftModel.from_pretrained(llama(), tmp_path)


# -- router centres ---------------------------------------------------------------------------------------------------


def centred() -> PeftModel:
    return get_peft_model(bert(), MEPTConfig(num_virtual_tokens=2, top_k=2, router_centering=True))


@pytest.fixture
def trained() -> PeftModel:
    model = changed(centred()).train()
    for _ in range(3):
        model(input_ids=IDS % VOCABULARY)
    return model.eval()


def test_a_checkpoint_of_parameters_has_the_centres(trained: PeftModel) -> None:
    model = centred()
    parameters = {name: p.detach() for name, p in trained.named_parameters() if "promptmoe" in name}
    assert sum(name.endswith("mept_router_center.default.weight") for name in parameters) == 2
    model.load_state_dict(parameters, strict=False)
    ids = IDS % VOCABULARY
    assert torch.equal(logits(model, ids), logits(trained, ids))
    assert not torch.equal(logits(trained, ids), logits(changed(centred()), ids))
    model.train()(input_ids=ids)
    for name, centre in model.named_parameters():
        if "center" in name:  # it goes on from what it was, as after many steps
            torch.testing.assert_close(centre, parameters[name], rtol=0, atol=0.05)


def test_a_checkpoint_without_centres_is_told_so(trained: PeftModel) -> None:
    checkpoint = {name: p.detach() for name, p in trained.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=r"Router centres are part of the adapter although they need no gradient"):
        centred().load_state_dict(checkpoint, strict=False)


def test_a_clone_by_names_of_parameters_answers_as_its_source(trained: PeftModel) -> None:
    """As TRL makes a frozen reference of the adapter it trains; and as running averages of weights are made."""
    ids = IDS % VOCABULARY
    expected = logits(trained, ids)
    trained.add_adapter("ref", trained.peft_config["default"])
    for name, parameter in list(trained.named_parameters()):
        if ".default." in name:
            trained.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    trained.set_adapter("ref")
    assert torch.equal(logits(trained, ids), expected)
    trained.delete_adapter("ref")
    average = centred()
    with torch.no_grad():
        for mine, other in zip(average.parameters(), trained.parameters(), strict=True):
            mine.mul_(0.0).add_(other)
    assert torch.equal(logits(average, ids), expected)


def test_transformers_loader_leaves_centres_frozen(trained: PeftModel, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    base = bert()
    base.load_adapter(tmp_path, is_trainable=True)
    flags = {p.requires_grad for name, p in base.named_parameters() if "center" in name}
    assert flags == {False}
    assert any(p.requires_grad for name, p in base.named_parameters() if "mept_router." in name)


# -- tokens of a vocabulary -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_name", [False, True], ids=["ids", "by-embedding"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tokens_that_train_are_saved_alone_and_load_again(tied: bool, by_name: bool, tmp_path: Path) -> None:
    """As LoRA's; new chat tokens come so from TRL."""
    tokens = {"embed_tokens": [3, 4]} if by_name else [3, 4]
    config = MEPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, trainable_token_indices=tokens)
    model, ids = get_peft_model(llama(tied), config).train(), torch.tensor([[3, 4, 5, 6]])
    embeddings = model.get_input_embeddings().weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    merged = model.get_input_embeddings().token_adapter.get_merged_weights(["default"])
    changed_rows = (merged != embeddings).any(dim=1).nonzero().flatten().tolist()
    assert changed_rows == [3, 4]
    if tied:
        torch.testing.assert_close(model.get_output_embeddings().token_adapter.get_merged_weights(["default"]), merged)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert [name.split("model.")[-1] for name in names if "prompt" not in name and "router" not in name] == [
        "embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    loaded = PeftModel.from_pretrained(llama(tied), tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    other = tmp_path / "again"
    loaded.save_pretrained(other)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (other / file).read_bytes() == (tmp_path / file).read_bytes()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(llama(tied), ids))
    assert torch.equal(logits(model.unload(), ids), logits(llama(tied), ids))


@pytest.mark.parametrize(
    ("make", "tokens", "message"),
    [
        (llama, [10**6], "names token 1000000"),
        (llama, {"lm_head": [10**6]}, "'lm_head' has"),
        (llama, {"nothing": [1]}, "has no such token embeddings"),
        (vit, [1], "has no such token embeddings"),
    ],
    ids=["too-large", "too-large-by-name", "no-module", "images"],
)
def test_tokens_that_there_are_not_are_refused(make: Callable[[], Any], tokens: Any, message: str) -> None:
    base = make()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, MEPTConfig(num_virtual_tokens=2, trainable_token_indices=tokens))
    assert not any("promptmoe" in name for name, _ in base.named_modules())


def test_experts_that_a_file_brings_are_not_drawn_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"num_experts": 4, "num_shared_experts": 2, "num_virtual_tokens": 3}
    config = MEPTConfig(task_type="SEQ_CLS", routing="sample", **settings)
    saved = changed(get_peft_model(bert(), config))
    saved.save_pretrained(tmp_path)
    drawn: list[tuple[int, ...]] = []
    normal = Tensor.normal_

    def watched(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        drawn.append(tuple(tensor.shape))
        return normal(tensor, *args, **kwargs)

    base, rows = bert(), {(4, 3, 16), (2, 3, 16)}
    monkeypatch.setattr(Tensor, "normal_", watched)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert not rows & set(drawn)
    assert torch.equal(logits(loaded, IDS % VOCABULARY), logits(saved, IDS % VOCABULARY))
    get_peft_model(bert(), config)
    assert rows <= set(drawn)
