"""The language and the target tokens of a micro-batch, wherever the user wrote them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding

from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.data.batch import Entries, LanguageTracker, Slot, stating
from bucketmoo_ds.errors import LanguageError

LANGUAGES = ["de", "fr", "pt_BR"]


def tracker(**changes: Any) -> LanguageTracker:
    return LanguageTracker(BucketMOOConfig(languages=LANGUAGES, **changes))


def slot_of(tracker: LanguageTracker, *args: Any, micro_steps: int = 1, world_size: int = 1, **kwargs: Any) -> Any:
    *_, entries = tracker.strip(args, kwargs)
    tracker.note(entries, training=True)
    return tracker.slot(micro_steps, world_size)


def error_of(tracker: LanguageTracker, *args: Any, **kwargs: Any) -> str:
    found = slot_of(tracker, *args, **kwargs)
    assert isinstance(found, LanguageError), f"expected an error, got {found}"
    return str(found)


@pytest.mark.parametrize(
    ("value", "index"),
    [
        ("fr", 1),
        (1, 1),
        (["fr"], 1),
        (["de", "de", "de"], 0),
        (("pt_BR", "pt_BR"), 2),
        ([2, 2], 2),
        (torch.tensor(2), 2),
        (torch.tensor([0, 0, 0]), 0),
        (torch.tensor([1], dtype=torch.int32), 1),
        (b"fr", 1),
        ([b"de", "de"], 0),
        (np.array(["fr", "fr"]), 1),
        ([torch.tensor(2), np.int8(2)], 2),
    ],
)
def test_forms_of_a_language(value: object, index: int) -> None:
    found = slot_of(tracker(), {"language": value})
    assert isinstance(found, Slot)
    assert found.language == index
    assert slot_of(tracker(), language=value) == found


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("xx", 'language "xx" is not in bucket_moo.languages (de, fr, pt_BR)'),
        ("pt_br", 'did you mean "pt_BR"?'),
        (["fr", "frr"], "several languages (fr, frr)"),
        (["de", "fr", "de"], "several languages (de, fr)"),
        (torch.tensor([0, 1]), "several languages (0, 1)"),
        ([], "several languages (none)"),
        (torch.empty(0, dtype=torch.int64), "several languages (none)"),
        (3, "language 3: expected a name, or an index from 0 to 2"),
        (-1, "language -1: expected a name, or an index from 0 to 2"),
        (True, "language True: expected a name"),
        (1.0, "language 1.0: expected a name"),
        (torch.tensor(1.0), "language 1.0: expected a name"),
        (torch.tensor([True]), "language True: expected a name"),
        (torch.tensor([[0], [0]]), "language [0]: expected a name"),
        ([0, "0"], "several languages (0, 0)"),
    ],
)
def test_bad_languages_are_error_values(value: object, expected: str) -> None:
    assert expected in error_of(tracker(), {"language": value})


def test_missing_language() -> None:
    message = error_of(tracker(language_key="lang"), {"input_ids": torch.ones(2, 3)})
    assert 'add the entry "lang" to the batch' in message
    assert 'engine.language("de")' in message


def test_no_forward_at_all() -> None:
    """Not even a context that names a language makes up for it."""
    one = tracker()
    with one.language("fr"):
        found = one.slot(1, 1)
    assert isinstance(found, LanguageError)
    assert str(found).startswith("a backward without a forward pass of the model since the last one: ")


def test_context_gives_the_language() -> None:
    one = tracker()
    with one.language("fr", target_tokens=9):
        assert slot_of(one, {"input_ids": 0}) == Slot(1, 9, 9.0)
        assert slot_of(one, {"language": "fr", "target_tokens": 4}) == Slot(1, 4, 4.0), "the batch knows better"
        with one.language(0):
            assert slot_of(one, {}).language == 0
        assert slot_of(one, {}).language == 1
    assert "names no language" in error_of(one, {})


def test_context_and_batch_that_contradict() -> None:
    one = tracker()
    with one.language("fr"):
        message = error_of(one, {"language": "de"})
        assert slot_of(one, {"language": 1}).language == 1, "the same one by index"
    assert message == "the batch says 'de', but engine.language(...) says 'fr'; name it in one place"


def test_context_survives_an_exception() -> None:
    one = tracker()
    with pytest.raises(ZeroDivisionError), one.language("fr"):
        raise ZeroDivisionError
    assert "names no language" in error_of(one, {})


def test_language_holds_for_the_forward_not_the_backward() -> None:
    one = tracker()
    with one.language("fr"):
        *_, entries = one.strip((), {})
        one.note(entries, training=True)
    with one.language("de"):
        assert one.slot(1, 1).language == 1


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_numbers_are_those_of_the_forward_pass(kind: Any) -> None:
    """Whoever made them may overwrite them before the backward: a loader that fills one buffer again and again."""
    one = tracker()
    tokens, divisor = kind([4, 3]), kind(20.0)
    one.note(Entries(language="de", target_tokens=tokens, loss_divisor=divisor), training=True)
    tokens *= 2
    divisor *= 2
    slot = one.slot(1, 1)
    assert isinstance(slot, Slot)
    assert (slot.target_tokens, slot.scale) == (7, 20.0)


def test_an_error_of_one_forward_is_not_lost_in_the_next() -> None:
    one = tracker()
    for language in ("xx", "de"):
        *_, entries = one.strip(({"language": language},), {})
        one.note(entries, training=True)
    found = one.slot(1, 1)
    assert isinstance(found, LanguageError)
    assert '"xx"' in str(found)
    assert slot_of(one, {"language": "de"}).language == 0, "the next micro-step starts clean"


def test_two_forwards_of_one_backward() -> None:
    one = tracker()
    for tokens in (3, 4):
        *_, entries = one.strip(({"language": "fr", "target_tokens": tokens},), {})
        one.note(entries, training=True)
    assert one.slot(2, 1) == Slot(1, 7, 14.0)
    for language in ("fr", "de"):
        *_, entries = one.strip(({"language": language},), {})
        one.note(entries, training=True)
    found = one.slot(2, 1)
    assert isinstance(found, LanguageError)
    assert "several languages (de, fr)" in str(found)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.booleans()), min_size=1, max_size=6))
def test_forward_passes_that_are_set_aside(passes: list[tuple[int, int, bool]]) -> None:
    """A backward belongs to those that are not; to all of them, where it went through none that we know of."""
    one = tracker()
    for language, tokens, aside in passes:
        passage = one.note(Entries(language=language, target_tokens=tokens), training=True)
        one.set_aside(passage)
        if not aside:
            one.bring_back(passage)
    meant = [each for each in passes if not each[2]] or passes
    found = one.slot(3, 1)
    if len({language for language, *_ in meant}) > 1:
        assert isinstance(found, LanguageError)
    else:
        tokens = sum(count for _, count, _ in meant)
        assert found == Slot(meant[0][0], tokens, 3.0 * tokens)
    assert isinstance(one.slot(3, 1), LanguageError), "a forward pass belongs to one micro-step"


def test_an_error_of_a_forward_pass_that_is_set_aside_is_none() -> None:
    one = tracker()
    one.set_aside(one.note(Entries(language="xx"), training=True))
    one.note(Entries(language="fr", target_tokens=2), training=True)
    assert one.slot(1, 1) == Slot(1, 2, 2.0)


def test_forgotten_forward_passes() -> None:
    one = tracker()
    for training in (True, False):
        one.note(Entries(language="de"), training)
        one.forget()
        assert isinstance(one.slot(1, 1), LanguageError)


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
@pytest.mark.parametrize("named", [False, True])
def test_the_callers_batch_stays_and_the_model_sees_the_rest(kind: type, named: bool) -> None:
    ids = torch.randint(9, (2, 3))
    batch = kind({"input_ids": ids, "language": "de", "target_tokens": 5, "labels": ids})
    one = tracker()
    args, kwargs, entries = one.strip(() if named else (7, batch), dict(batch) if named else {"flag": True})
    assert set(batch) == {"input_ids", "language", "target_tokens", "labels"}
    seen = kwargs if named else args[1]
    assert set(seen) == {"input_ids", "labels"}
    assert seen["input_ids"] is ids
    assert named or (args[0] == 7 and kwargs == {"flag": True})
    one.note(entries, training=True)
    assert one.slot(1, 1) == Slot(0, 5, 5.0)


def test_language_key_is_configurable() -> None:
    one = tracker(language_key="lang")
    args, _, _ = one.strip(({"lang": "de", "language": "model's own"},), {})
    assert args == ({"language": "model's own"},)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 4),
    length=st.integers(1, 9),
    shift=st.booleans(),
    micro_steps=st.integers(1, 4),
)
def test_tokens_are_counted_from_labels(seed: int, rows: int, length: int, shift: bool, micro_steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(50, (rows, length), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
    seen = labels.tolist()
    expected = sum(token != -100 for row in seen for token in (row[1:] if shift else row))
    found = slot_of(tracker(shift_labels=shift), language="de", labels=labels, micro_steps=micro_steps)
    assert found == Slot(0, expected, float(micro_steps * expected))


def test_labels_of_one_dimension_are_not_shifted() -> None:
    assert slot_of(tracker(), language="de", labels=torch.tensor([1, -100, 3])).target_tokens == 2


@pytest.mark.parametrize("labels", [None, torch.randn(3, 4), [[1, 2]], "text"])
def test_without_countable_labels_micro_batches_count_alike(labels: object) -> None:
    assert slot_of(tracker(), {"language": "de", "labels": labels}, micro_steps=3) == Slot(0, 1, 3.0)


@pytest.mark.parametrize(
    ("value", "tokens"), [(0, 0), (7, 7), (torch.tensor(7), 7), (torch.tensor([3, 4]), 7), (torch.tensor([[2]]), 2)]
)
def test_target_tokens_win_over_labels(value: object, tokens: int) -> None:
    found = slot_of(tracker(), language="de", labels=torch.ones(4, 9, dtype=torch.int64), target_tokens=value)
    assert found.target_tokens == tokens


@pytest.mark.parametrize("value", [-1, 2.5, "7", True, torch.tensor(2.0)])
def test_bad_target_tokens(value: object) -> None:
    assert "expected a whole number, 0 or more" in error_of(tracker(), language="de", target_tokens=value)


@pytest.mark.parametrize("items", [12, torch.tensor(12)])
def test_num_items_in_batch_makes_the_loss_a_sum(items: object) -> None:
    one = tracker()
    _, kwargs, entries = one.strip((), {"language": "de", "target_tokens": 5, "num_items_in_batch": items})
    assert kwargs == {"num_items_in_batch": items}, "the model needs it"
    one.note(entries, training=True)
    assert one.slot(3, 4) == Slot(0, 5, 12 / 4)


@pytest.mark.parametrize("items", [0, -3, float("nan"), float("inf")])
def test_impossible_num_items_in_batch(items: float) -> None:
    message = error_of(tracker(), language="de", target_tokens=5, num_items_in_batch=items)
    assert f"num_items_in_batch = {float(items)}" in message


@pytest.mark.parametrize("entry", ["num_items_in_batch", "loss_divisor"])
@pytest.mark.parametrize("labels", [None, torch.randn(3, 4), "text"])
def test_a_divisor_without_target_tokens_is_refused(entry: str, labels: object) -> None:
    """Micro-batches that count alike are right for means only: a sum grows with its tokens."""
    message = error_of(tracker(), {"language": "de", "labels": labels, entry: 8})
    assert message.startswith(f"{entry}: the loss is a sum divided by 8, but nothing tells over how many target tokens")
    assert "add the entry target_tokens" in message
    assert slot_of(tracker(), {"language": "de", "target_tokens": 3, entry: 8}) == Slot(0, 3, 8.0)


@settings(deadline=None)
@given(st.floats(1e-3, 1e6), st.integers(1, 999), st.integers(1, 99), st.integers(1, 9))
def test_a_stated_divisor_is_the_scale(divisor: float, tokens: int, items: int, micro_steps: int) -> None:
    """Wherever it is stated, however many micro-steps and ranks there are, and against `num_items_in_batch`."""
    one = tracker()
    entries = {"language": "fr", "target_tokens": tokens, "num_items_in_batch": items}
    args, _, _ = one.strip((entries | {"loss_divisor": divisor},), {})
    assert args == ({"num_items_in_batch": items},)
    told = slot_of(one, entries | {"loss_divisor": torch.tensor(divisor).double()}, micro_steps=micro_steps)
    assert told.scale == pytest.approx(divisor, rel=1e-7)  # the tensor was float32
    with one.language("fr", target_tokens=tokens, loss_divisor=divisor):
        assert slot_of(one, {"num_items_in_batch": items}, world_size=4) == Slot(1, tokens, divisor)
        assert slot_of(one, {"loss_divisor": 2 * divisor}).scale == 2 * divisor, "the batch knows better"


@pytest.mark.parametrize("value", [True, "8", [8], object()])
def test_a_divisor_that_is_no_number(value: object) -> None:
    assert "loss_divisor = " in error_of(tracker(), language="de", target_tokens=5, loss_divisor=value)


@pytest.mark.parametrize("value", [0, -3.0, float("nan"), float("inf")])
def test_an_impossible_divisor(value: float) -> None:
    message = error_of(tracker(), language="de", target_tokens=5, loss_divisor=value)
    assert message == f"loss_divisor = {float(value)} with 5 target tokens: expected more than 0"
    assert value != 0 or slot_of(tracker(), language="de", target_tokens=0, loss_divisor=0) == Slot(0, 0, 0.0)


def test_two_divisors_in_one_backward_are_refused() -> None:
    one = tracker()
    for divisor in (8, 9):
        *_, entries = one.strip(({"language": "fr", "target_tokens": 3, "loss_divisor": divisor},), {})
        one.note(entries, training=True)
    found = one.slot(1, 1)
    assert isinstance(found, LanguageError)
    assert "several loss_divisor ([8.0, 9.0])" in str(found)


class Stated:
    """A trainer whose batch has six labels, of which five are shifted in, and which divides by `number`."""

    def __init__(self, number: float | None, error: str = "") -> None:
        self.entries = Entries(labels=torch.ones(1, 6, dtype=torch.int64))
        self.number, self.error = number, error

    def divisor(self) -> float | None:
        if self.error:
            raise LanguageError(self.error)
        return self.number


def test_a_trainer_says_how_it_divides_and_knows_the_labels() -> None:
    one = tracker()
    with stating(Stated(24.0)):
        assert slot_of(one, {"language": "fr"}, micro_steps=3) == Slot(1, 5, 24.0), "labels it was not given"
        assert slot_of(one, {"language": "fr", "target_tokens": 2, "num_items_in_batch": 99}) == Slot(1, 2, 24.0)
        assert slot_of(one, {"language": "fr", "loss_divisor": 7}) == Slot(1, 5, 7.0), "the user knows better"
        for _ in range(2):  # two forward passes of one backward: the trainer's labels count once
            one.note(Entries(language="fr"), training=True)
        assert one.slot(1, 1) == Slot(1, 5, 24.0)
    with stating(Stated(None)):
        assert slot_of(one, {"language": "fr"}, micro_steps=3) == Slot(1, 5, 15.0)
        assert "Trainer takes its loss for the mean" in error_of(one, {"language": "fr", "num_items_in_batch": 99})
    with stating(Stated(None, "who knows")):
        assert error_of(one, {"language": "fr"}) == "who knows"
    assert slot_of(one, {"language": "fr"}) == Slot(1, 1, 1.0), "no trainer any more"


def model_that_says(encoder_decoder: bool | None, loss_type: str | None = None) -> nn.Module:
    """A wrapper around a model with a config as transformers writes it, one of whose parts says the opposite."""
    wrapper, model, part = nn.Module(), nn.Module(), nn.Module()
    wrapper.module, model.part = model, part
    if encoder_decoder is not None:
        model.config = SimpleNamespace(is_encoder_decoder=encoder_decoder)
        part.config = SimpleNamespace(is_encoder_decoder=not encoder_decoder)
        model.loss_type = loss_type
    return wrapper


@pytest.mark.parametrize(
    ("model", "shifted"),
    [
        (None, True),
        (nn.Linear(2, 2), True),
        (model_that_says(None), True),
        (model_that_says(False, "ForCausalLM"), True),
        (model_that_says(True, "ForConditionalGeneration"), False),
        (model_that_says(False, "ForMaskedLM"), False),
        (model_that_says(False, "ForTokenClassification"), False),
    ],
)
def test_the_model_tells_whether_labels_are_shifted(model: nn.Module | None, shifted: bool) -> None:
    labels = torch.ones(3, 7, dtype=torch.int64)
    for setting, expected in ((None, shifted), ("auto", shifted), (True, True), (False, False)):
        config = BucketMOOConfig(languages=LANGUAGES, shift_labels=setting)
        found = slot_of(LanguageTracker(config, model), language="de", labels=labels)
        assert found.target_tokens == (18 if expected else 21), setting


def test_labels_that_are_shifted_already_count_as_they_stand() -> None:
    labels = {"labels": torch.ones(1, 4).long(), "shift_labels": torch.tensor([[1, -100, 3, 4]])}
    assert slot_of(tracker(), language="de", **labels).target_tokens == 3


def test_evaluation_does_not_disturb_a_model_in_training_mode() -> None:
    """A forward pass in evaluation mode outside `no_grad` is no part of the next backward."""
    tracker = LanguageTracker(BucketMOOConfig(languages=("de", "fr")))
    tracker.note(Entries(language="fr"), training=False)
    tracker.note(Entries(language="de", target_tokens=3), training=True)
    assert tracker.slot(1, 1) == Slot(0, 3, 3.0)


def test_a_model_trained_in_evaluation_mode_has_the_language_of_its_latest_forward() -> None:
    """`from_pretrained` leaves a model in evaluation mode, and fine-tuning without dropout is legitimate."""
    tracker = LanguageTracker(BucketMOOConfig(languages=("de", "fr")))
    tracker.note(Entries(language="de", target_tokens=5), training=False)
    tracker.note(Entries(language="fr", target_tokens=7), training=False)
    assert tracker.slot(2, 1) == Slot(1, 7, 14.0)
    assert isinstance(tracker.slot(2, 1), LanguageError), "a forward pass belongs to one backward"
