# SPDX-License-Identifier: Apache-2.0
"""What an output may depend on: not on padding, not on the rest of the batch, not on later tokens, not on threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import (
    ALL_KERNELS,
    IGNORED,
    LENGTHS,
    TARGETS,
    Case,
    assert_different,
    assert_equal,
    assert_same,
    each_case,
    one_per_architecture,
    predict,
    real_logits,
    train,
)
from torch import Tensor

# Double precision, but for what the models themselves compute in single precision (rotary tables, RMS norms).
CLOSE = {"rtol": 1e-4, "atol": 5e-5}


def assert_close(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    for i, (left, right) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(left, right, **CLOSE, msg=lambda text, i=i: f"{what}, sample {i}: {text}")


def has_left(case: Case) -> bool:
    return case.architecture.left is not None


def reads_text(case: Case) -> bool:
    return case.reads_text


@each_case()
def test_the_output_has_the_length_of_the_labels(case: Case) -> None:
    model, batch = case.model(), case.batch()
    with torch.no_grad():
        output = model(**batch)
    assert output.loss.ndim == 0 and torch.isfinite(output.loss)
    rows, length = next(iter(batch.values())).shape[:2]
    found = predict(model, batch).shape
    image = (rows, 3, *found[2:]) if case.architecture.dense else (rows, 3)
    expected = {"SEQ_CLS": (rows, found[-1]), "IMAGE": image, "SEQ_2_SEQ_LM": (rows, TARGETS, found[-1])}
    assert found == expected.get(case.task_type, (rows, length, found[-1]))


@each_case(reads_text, kernels=ALL_KERNELS)
def test_padding_on_the_right_changes_nothing(case: Case) -> None:
    model = case.model(case.base().double()).double()
    plain = real_logits(case, model, case.batch((6, 6)))
    assert_close(real_logits(case, model, case.batch((6, 6), pad_to=10)), plain, "padding on the right")


@each_case(lambda case: has_left(case) and case.task_type != "SEQ_CLS", kernels=ALL_KERNELS)
def test_padding_on_the_left_changes_nothing(case: Case) -> None:
    model = case.model(case.base().double()).double()
    expected = real_logits(case, model, case.batch((6, 6)))
    batch = case.batch((6, 6), side="left", pad_to=10)
    assert_close(real_logits(case, model, batch), expected, "padding on the left")


@each_case(lambda case: has_left(case) and case.task_type == "SEQ_CLS", kernels=ALL_KERNELS)
def test_padding_on_the_left_changes_no_hidden_state(case: Case) -> None:
    """Classifiers read the first column, padding or not, so these are compared behind their last block."""
    model = case.model(case.base().double()).double()

    def last(batch: dict[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states[-1]
        mask = batch.get("attention_mask", torch.ones(states.shape[:2]))
        return [row[real.bool()] for row, real in zip(states, mask, strict=True)]

    assert_close(last(case.batch((6, 6), side="left", pad_to=10)), last(case.batch((6, 6))), "padding on the left")


def _by_width(case: Case) -> list[int | None]:
    return list(case.method.widths) or [None]


@each_case(kernels=ALL_KERNELS)
def test_a_sample_alone_equals_the_sample_in_a_batch(case: Case) -> None:
    """For every number of active experts, with neighbours of other lengths."""
    side = "left" if case.is_causal_lm else "right"
    base = case.base().double()
    for width in _by_width(case):
        settings = {} if width is None else {case.method.active: width}
        model = case.model(base, **settings).double()
        together = real_logits(case, model, case.batch(LENGTHS, side=side))
        samples = [case._sample(length, 10 * i) for i, length in enumerate(LENGTHS)]
        alone = [real_logits(case, model, case.collate([sample]))[0] for sample in samples]
        assert_close(together, alone, f"{width} active")
        others = [samples[1], case._sample(7, 99)]
        assert_close(real_logits(case, model, case.collate(others, side))[:1], alone[1:2], f"{width} active, others")
        base = model.unload()


@each_case(lambda case: case.is_causal_lm and case.variant.causal, kernels=ALL_KERNELS)
def test_no_later_token_reaches_an_earlier_logit(case: Case) -> None:
    """In evaluation and in training mode, with and without labels and padding."""
    for width in _by_width(case):
        model = case.model(**({} if width is None else {case.method.active: width}))
        for training in (False, True):
            model.train(training)
            for batch in (case.batch((8, 8)), case.batch((8, 5)), case.prompt_only(case.batch((8, 8)))):
                expected = predict(model, batch)
                for t in (2, 5, 7):
                    changed = dict(batch, input_ids=batch["input_ids"].clone())
                    changed["input_ids"][:, t] = (changed["input_ids"][:, t] + 17) % 50 + 5
                    found = predict(model, changed)
                    assert_same(case, found[:, :t], expected[:, :t], f"logits before position {t}")
                    assert_different(found[0, t], expected[0, t], f"logits at position {t}")


@each_case(lambda case: case.is_causal_lm and not case.variant.causal)
@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("side", ["right", "left"])
def test_no_answer_reaches_an_earlier_logit_when_labels_tell_what_it_is(case: Case, turns: int, side: str) -> None:
    """Sample routing may read the leading -100 labels only; later -100 spans (a second question) count as answers."""
    model = case.model()
    batch = case.batch((8, 8), side=side, pad_to=10)
    start = 2 if side == "left" else 0
    if turns == 2:
        batch["labels"][:, start + 5 : start + 7] = IGNORED
    assert (batch["labels"][:, start : start + 2] == IGNORED).all() and batch["labels"][0, start + 2] != IGNORED
    for training in (False, True):
        model.train(training)
        expected = predict(model, batch)
        for t in range(2, 8):
            changed = dict(batch, input_ids=batch["input_ids"].clone())
            changed["input_ids"][:, start + t] = (changed["input_ids"][:, start + t] + 17) % 50 + 5
            found = predict(model, changed)
            before = slice(start, start + t)
            assert_same(case, found[:, before], expected[:, before], f"logits before position {t}")
        changed["input_ids"][:, start + 1] = (changed["input_ids"][:, start + 1] + 17) % 50 + 5
        assert_different(predict(model, changed), expected, "logits after a change of the question")


@each_case(lambda case: case.is_causal_lm and not case.variant.causal)
def test_training_without_labels_is_refused_where_answers_would_leak(case: Case) -> None:
    model, batch = case.model().train(), case.batch()
    with pytest.raises(ValueError, match="routing='token'"):
        model(**case.prompt_only(batch))
    model.eval()
    with pytest.warns(UserWarning, match="leak later tokens into earlier ones"):
        model(**case.prompt_only(batch))


@each_case(reads_text)
def test_embeddings_can_be_passed_instead_of_ids(case: Case) -> None:
    model, batch = case.model(), case.batch((6, 6))
    expected = predict(model, batch)
    embeddings = model.get_base_model().get_input_embeddings()(batch["input_ids"])
    passed = {name: value for name, value in batch.items() if name != "input_ids"} | {"inputs_embeds": embeddings}
    torch.testing.assert_close(predict(model, passed), expected, rtol=1e-5, atol=1e-5)


@each_case(lambda case: case.architecture.left == "ids" and one_per_architecture(case))
def test_position_ids_are_honoured(case: Case) -> None:
    model, batch = case.model(), case.batch((6, 6))
    expected = predict(model, batch)
    positions = torch.arange(6).expand(2, -1)
    assert_equal(predict(model, batch, position_ids=positions), expected, "logits with the default positions passed")
    assert_different(predict(model, batch, position_ids=positions.flip(1)), expected, "logits of other positions")


@each_case(lambda case: case.architecture_name == "bert")
def test_token_type_ids_are_honoured(case: Case) -> None:
    model, batch = case.model(), case.batch((6, 6))
    expected = predict(model, batch)
    types = torch.zeros_like(batch["input_ids"])
    assert_equal(predict(model, batch, token_type_ids=types), expected, "logits with the default types passed")
    assert_different(predict(model, batch, token_type_ids=types + 1), expected, "logits of other types")


@each_case(kernels=ALL_KERNELS)
def test_four_threads_on_one_model_give_the_results_of_one(case: Case) -> None:
    model = case.model()
    batches = [case.batch(lengths, seed=i) for i, lengths in enumerate([(8, 4), (3,), (6, 6, 6), (8, 7, 2), (5, 5)])]
    expected = [predict(model, batch) for batch in batches]
    jobs = [i % len(batches) for i in range(30)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: predict(model, batches[i]), jobs))
    for i, logits in zip(jobs, found, strict=True):
        assert_equal(logits, expected[i], f"logits of batch {i} among threads")


@each_case()
def test_two_models_in_two_threads_do_not_meet(case: Case) -> None:
    """One trains and one answers, each as it would alone; what a thread has lying about is its own."""
    batch, other = case.batch(), case.batch((5, 8), seed=3)
    expected = predict(case.model(), batch)
    losses = train(case.model(case.base(seed=1)), other, 6)
    answering, training = case.model(), case.model(case.base(seed=1))
    with ThreadPoolExecutor(2) as pool:
        trained = pool.submit(train, training, other, 6)
        found = pool.submit(lambda: [predict(answering, batch) for _ in range(20)])
    assert trained.result() == losses
    for logits in found.result():
        assert_equal(logits, expected, "logits while another model trains")


@each_case(lambda case: case.architecture.generates)
def test_threads_that_generate_with_one_model_get_the_tokens_of_one(case: Case) -> None:
    model = case.model()
    batches = [case.prompt_only(case.batch((length, length), seed=length)) for length in (3, 5, 8)]

    def generate(number: int) -> list[list[int]]:
        return model.generate(**batches[number], max_new_tokens=4, min_new_tokens=4, do_sample=False).tolist()

    expected = [generate(number) for number in range(3)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(generate, [number % 3 for number in range(12)]))
    assert found == [expected[number % 3] for number in range(12)]


@each_case()
def test_evaluation_repeats_itself(case: Case) -> None:
    model, batch = case.model(**case.method.noisy), case.batch()
    first = predict(model, batch)
    predict(model, case.batch((3, 5), seed=4))
    assert_equal(predict(model, batch), first, "logits of the same batch, another one in between")


@each_case(lambda case: not case.architecture.generates, kernels=ALL_KERNELS)
def test_features_are_as_many_as_the_base_models(case: Case) -> None:
    """No prompt is among them, and they are other features than the base model's."""
    model, batch = case.model(), case.prompt_only(case.batch())
    with torch.no_grad():
        found = model(**batch, output_hidden_states=True).hidden_states
        with model.disable_adapter():
            plain = model(**batch, output_hidden_states=True).hidden_states
    assert [states.shape for states in found] == [states.shape for states in plain] and found
    assert_different(found[-1], plain[-1], "features with and without prompts")
