"""Rows of mixed languages: what is said of them is what a plain loop over tokens finds, or an error that says why."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from bucketmoo_ds.data.attention import Attention
from bucketmoo_ds.data.languages import LanguageTable
from bucketmoo_ds.data.rows import Rows, rows_of
from bucketmoo_ds.errors import LanguageError

TABLE = LanguageTable(["de", "fr", "pt_BR"])
IDS = torch.ones(2, 3, dtype=torch.long)


def rows(value: object, *args: Any, shifted: bool = True, **kwargs: Any) -> Rows:
    kwargs = kwargs if args else {"input_ids": IDS} | kwargs
    return rows_of(value, args, kwargs, TABLE, shifted=shifted)


def error_of(value: object, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(LanguageError) as error:
        rows(value, *args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("fr", [[1] * 3] * 2),
        (b"pt_BR", [[2] * 3] * 2),
        (np.int8(2), [[2] * 3] * 2),
        (torch.tensor(1), [[1] * 3] * 2),
        (["de", "fr"], [[0] * 3, [1] * 3]),
        ((b"de", 2), [[0] * 3, [2] * 3]),
        (np.array(["fr", "de"]), [[1] * 3, [0] * 3]),
        (torch.tensor([2, -1], dtype=torch.int32), [[2] * 3, [-1] * 3]),
        (torch.tensor([2, 1], dtype=torch.uint8), [[2] * 3, [1] * 3]),
        ([np.int64(1), -1], [[1] * 3, [-1] * 3]),
        ([torch.tensor(0), torch.tensor(2)], [[0] * 3, [2] * 3]),
        ([["de"] * 3, ["fr"] * 3], [[0] * 3, [1] * 3]),
        ([[1, 1, -1], (2, 2, 2)], [[1, 1, -1], [2] * 3]),
        ([np.array([1, 1, -1]), [2, 2, 2]], [[1, 1, -1], [2] * 3]),
        (np.array([[0, 0, 0], [2, 2, -1]]), [[0] * 3, [2, 2, -1]]),
        ([torch.tensor([1, 1, 1]), torch.tensor([0, 0, 0])], [[1] * 3, [0] * 3]),
    ],
)
def test_forms_of_languages(value: object, expected: list[list[int]]) -> None:
    found = rows(value)
    assert found.languages.tolist() == expected
    assert (found.languages.dtype, found.checks) == (torch.int64, ())
    assert found.documents.tolist() == [[0] * 3, [1] * 3]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("fre", 'language "fre" is not in bucket_moo.languages (de, fr, pt_BR); did you mean "fr"?'),
        (["de", "xx"], 'language "xx" is not in'),
        (3, "language 3: expected a name, or an index from 0 to 2"),
        (-1, "language -1: expected a name"),
        (torch.tensor(-1), "language: an index that is none; expected 0 to 2 (de, fr, pt_BR), or -1 for padding"),
        ([0, 3], "language 3: expected a name"),
        ([1, True], "language True: expected a name"),
        ([0, -2], "language -2: expected a name"),
        (torch.tensor([0, 3]), "language: an index that is none"),
        (torch.tensor([0, -2]), "language: an index that is none"),
        (torch.tensor([0.0, 1.0]), "language: a tensor of torch.float32; expected whole numbers"),
        (torch.tensor([True, False]), "language: a tensor of torch.bool; expected whole numbers"),
        (["de"], "language: 1 values for a batch of [2, 3] tokens; expected one for each of its 2 sequences"),
        ([], "language: 0 values for a batch of [2, 3] tokens"),
        ([["de"] * 3, ["fr"] * 2], "language: expected one for each sequence, or for each as many as it has tokens"),
        (["de", ["fr"] * 3], "language: expected one for each sequence"),
        ([torch.tensor([1, 1, 1]), torch.tensor([0])], "language: expected one for each sequence"),
        ([["de"] * 2] * 2, "language: [2, 2] for a batch of [2, 3] tokens, [batch, sequence]"),
        ([[["de"] * 3]] * 2, "language ['de', 'de', 'de']: expected a name"),
        (torch.zeros(2, 3, 1, dtype=torch.long), "language: [2, 3, 1] for a batch of [2, 3] tokens"),
        ([["de", "fr", "fr"], ["de"] * 3], "language: a sequence of several languages, as far as the model reads"),
        ([["de", -1, "de"], ["de"] * 3], "language: -1 for a token that others of its document attend to"),
        ([[-1, "de", "de"], ["de"] * 3], "language: -1 for a token that others of its document attend to"),
    ],
)
def test_bad_languages(value: object, expected: str) -> None:
    assert error_of(value).startswith(expected)


def test_a_forward_pass_without_tensors() -> None:
    assert "no tensor that would tell how many sequences" in error_of("de", 3, x="y")


def test_a_packed_sequence_needs_a_mask_that_the_model_reads() -> None:
    value = [[0, 0, 1], [1, 1, 1]]
    positions = torch.tensor([[0, 1, 0], [0, 1, 2]])
    found = rows(value, position_ids=positions)
    assert found.documents.tolist() == [[0, 0, 1], [2, 2, 2]]
    message = error_of(value, position_ids=positions, attention_mask=torch.ones(2, 3, dtype=torch.long))
    assert "a token's gradient would belong to several languages" in message
    assert "Pass position_ids that start again with each document" in message
    assert message.endswith("Not followed: position_ids: not read beside an attention_mask; leave that out")
    assert "a document that holds several languages" in error_of([[0, 1, 1], [1, 1, 1]], position_ids=positions)
    rows([0, 1], position_ids=torch.zeros(2, 3))  # one language a sequence: nothing crosses


def test_padding_of_no_language() -> None:
    value = [[-1, 0, 0], [1, 1, -1]]
    hidden = torch.tensor([[0, 1, 1], [1, 1, 0]])
    for shifted in (True, False):
        assert rows(value, attention_mask=hidden, shifted=shifted).languages.tolist() == value
    after = [[0, 0, -1], [1, 1, -1]]
    assert rows(after).languages.tolist() == after
    assert "-1 for a token" in error_of(after, shifted=False), "attention goes both ways"


@pytest.mark.parametrize(
    ("args", "kwargs", "shape"),
    [
        ((IDS,), {}, (2, 3)),
        (({"input_ids": IDS, "x": torch.ones(5)},), {}, (2, 3)),
        ((torch.ones(2, 3, 4),), {}, (2, 3)),
        ((torch.ones(2, 4),), {}, (2, 1)),
        ((torch.ones(2, 3, 8, 8),), {}, (2, 1)),
        ((torch.ones(2, dtype=torch.long),), {}, (2, 1)),
        ((), {"labels": torch.ones(7, 1), "inputs_embeds": torch.ones(2, 3, 4)}, (2, 3)),
        ((), {"decoder_input_ids": IDS, "encoder_outputs": (torch.ones(2, 9, 4),)}, (2, 3)),
    ],
)
def test_the_shape_of_a_batch(args: Any, kwargs: Any, shape: tuple[int, int]) -> None:
    found = rows_of(["de", "fr"], args, kwargs | {"labels": None}, TABLE, shifted=True)
    assert found.languages.shape == found.documents.shape == shape


def test_activations_of_other_shapes() -> None:
    sequences, tokens = rows(["de", "fr"]), rows([[0, 0, 0], [1, 1, -1]])
    for each in (sequences, tokens):
        assert torch.equal(each.of_shape(torch.Size((2, 3))), each.languages)
        flat = each.of_shape(torch.Size((6,)))
        assert flat is not None
        assert flat.tolist() == each.languages.flatten().tolist()
        for shape in ((2, 3, 4), (4,), (3, 3), ()):
            assert each.of_shape(torch.Size(shape)) is None
    for shape, expected in {(2,): [0, 1], (2, 2): [[0, 0], [1, 1]]}.items():
        found, documents = sequences.of_shape(torch.Size(shape)), sequences.documents_of_shape(torch.Size(shape))
        assert found is not None
        assert documents is not None
        assert found.tolist() == documents.tolist() == expected
        assert tokens.of_shape(torch.Size(shape)) is None
    packed = rows(["de", "fr"], position_ids=torch.tensor([[0, 0, 1]]))
    assert packed.documents.tolist() == [[0, 1, 1], [2, 3, 3]]
    assert packed.of_shape(torch.Size((2, 5))) is not None
    assert packed.documents_of_shape(torch.Size((2, 5))) is None


def test_an_encoder_and_a_decoder() -> None:
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )  # fmt: skip
    attention = Attention(model)
    inputs = {
        "input_ids": IDS,
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "labels": torch.tensor([[3, 4, 5, 6, 1], [3, 1, -100, -100, -100]]),
    }
    found = rows_of(["fr", "de"], (), inputs, TABLE, shifted=False, attention=attention)
    assert found.target_tokens.tolist() == [2, 5, 0]
    documents = found.documents_of_shape(torch.Size((2, 5)))
    assert documents is not None
    assert documents.tolist() == [[0] * 5, [1] * 5]
    with pytest.raises(LanguageError, match="an encoder and a decoder, whose sequences differ"):
        rows_of([[0] * 3] * 2, (), inputs, TABLE, shifted=False, attention=attention)


@pytest.mark.parametrize(
    ("value", "told", "expected"),
    [
        ("fr", 7, [0, 7, 0]),
        (["fr", "fr"], torch.tensor(7), [0, 7, 0]),
        ([[1, 1, -1], [1, 1, 1]], np.int64(7), [0, 7, 0]),
        (["fr", "de"], [4, 5, 0], [4, 5, 0]),
        (["fr", "de"], torch.tensor([4, 5, 0], dtype=torch.int32), [4, 5, 0]),
    ],
)
def test_target_tokens_that_are_stated(value: object, told: object, expected: list[int]) -> None:
    labels = torch.zeros(2, 3, dtype=torch.long)
    assert rows(value, labels=labels, target_tokens=told).target_tokens.tolist() == expected
    kept = rows_of(value, (IDS,), {}, TABLE, shifted=True, target_tokens=told)
    assert (kept.target_tokens.tolist(), kept.target_tokens.dtype) == (expected, torch.int64)


@pytest.mark.parametrize(
    ("value", "kwargs", "expected"),
    [
        (["fr", "de"], {"target_tokens": 7}, "target_tokens is one number, but the batch is not of one language"),
        (
            "fr",
            {"target_tokens": [1, 2]},
            "target_tokens = [1, 2]: expected a whole number for each of the 3 languages",
        ),
        ("fr", {"target_tokens": 1.5}, "target_tokens = 1.5: expected a whole number"),
        ("fr", {"target_tokens": True}, "target_tokens = True: expected a whole number"),
        ("fr", {"target_tokens": "x"}, "target_tokens = 'x': expected a whole number"),
        ("fr", {"target_tokens": -1}, "target_tokens: a number below 0"),
        ([0, -1], {"labels": IDS}, "language: target tokens belong to no language (-1)"),
        ([[0, -1, -1], [0, 0, 0]], {"labels": IDS}, "language: target tokens belong to no language (-1)"),
        ([0, 1], {"labels": torch.ones(6, dtype=torch.long)}, "language: [2], but labels are [6]"),
        ([[0] * 3] * 2, {"labels": torch.ones(2, dtype=torch.long)}, "language: [2, 3], but labels are [2]"),
    ],
)
def test_bad_target_tokens(value: object, kwargs: dict[str, Any], expected: str) -> None:
    assert error_of(value, **kwargs).startswith(expected)


def test_target_tokens_without_labels() -> None:
    assert rows([1, -1]).target_tokens.tolist() == [0, 1, 0]
    assert rows([[1, 1, -1], [0, 0, 0]]).target_tokens.tolist() == [3, 2, 0]
    assert rows([1, 2], labels=torch.rand(2, 1)).target_tokens.tolist() == [0, 1, 1], "a regression's"
    assert rows([1, 2], labels=torch.tensor([4, -100])).target_tokens.tolist() == [0, 1, 0], "one for each sequence"


@dataclasses.dataclass
class Packed:
    """A batch: by sequence the language and length of each document; what the sequence has left is padding."""

    length: int
    sequences: list[list[tuple[int, int]]]
    labels: list[list[int]]

    def by_token(self, of: Any, padding: int) -> Tensor:
        """`of(document, language, position)` of each token."""
        table = torch.full((len(self.sequences), self.length), padding)
        document = 0
        for row, sequence in zip(table, self.sequences, strict=True):
            start = 0
            for language, length in sequence:
                for place in range(length):
                    row[start + place] = of(document, language, place)
                start, document = start + length, document + 1
        return table

    def mask(self) -> Tensor:
        numbers = self.by_token(lambda document, language, place: document, -1)
        return (numbers.unsqueeze(1) == numbers.unsqueeze(2)) & (numbers >= 0).unsqueeze(1)


@st.composite
def packings(draw: st.DrawFn, sequences: int = 3, padded: bool = True) -> Packed:
    length = draw(st.integers(1, 9))
    batch = []
    for _ in range(draw(st.integers(1, sequences))):
        left, documents = length, []
        while left and (not padded or not documents or draw(st.booleans())):
            taken = draw(st.integers(1, left))
            documents.append((draw(st.integers(0, len(TABLE) - 1)), taken))
            left -= taken
        batch.append(documents)
    labels = [
        [draw(st.sampled_from([-100, 5])) if place < sum(n for _, n in each) else -100 for place in range(length)]
        for each in batch
    ]
    return Packed(length, batch, labels)


def expected_targets(batch: Packed, shifted: bool) -> list[int]:
    counts = [0] * len(TABLE)
    for sequence, labels in zip(batch.sequences, batch.labels, strict=True):
        languages = [language for language, length in sequence for _ in range(length)]
        for place, language in enumerate(languages):
            label = place + shifted
            counts[language] += label < batch.length and labels[label] != -100
    return counts


def check(batch: Packed, shifted: bool, shift_labels: bool = False, **told: Any) -> None:
    languages = batch.by_token(lambda document, language, place: language, -1)
    labels = torch.tensor(batch.labels)
    if shift_labels:
        told["shift_labels"], labels = labels, torch.zeros_like(labels)
    ids = torch.ones_like(languages)
    found = rows_of(languages, (ids,), told | {"labels": labels}, TABLE, shifted=shifted)
    numbers = batch.by_token(lambda document, language, place: document, -1)
    assert torch.equal(found.languages, languages)
    assert found.target_tokens.tolist() == expected_targets(batch, shifted and not shift_labels)
    both = zip(numbers.flatten().tolist(), found.documents.flatten().tolist(), strict=True)
    pairs = sorted({(expected, number) for expected, number in both if expected >= 0})
    numbered = [number for _, number in pairs]
    assert [expected for expected, _ in pairs] == list(range(len(pairs))), "documents are whole"
    assert numbered == sorted(set(numbered)), "and apart, in their order"
    assert found.documents.unique().tolist() == list(range(int(found.documents.max()) + 1)), "without a gap"


@settings(max_examples=60, deadline=None)
@given(packings(), st.booleans(), st.sampled_from(["mask", "heads", "hides", "causal", "positions", "values"]))
def test_random_packings(batch: Packed, shift_labels: bool, form: str) -> None:
    mask, place = batch.mask(), lambda document, language, place: place
    causal = mask & torch.ones(batch.length, batch.length, dtype=torch.bool).tril()
    told = {
        "mask": {"attention_mask": mask},
        "heads": {"attention_mask": mask.unsqueeze(1).expand(-1, 2, -1, -1)},
        "hides": {"attention_mask": torch.zeros(mask.shape).masked_fill(~mask, -torch.inf).unsqueeze(1)},
        "causal": {"attention_mask": causal.long()},
        "positions": {"position_ids": batch.by_token(place, 0)},
        "values": {"attention_mask": batch.by_token(lambda document, *_: document % batch.length + 1, 0)},
    }[form]
    check(batch, True, shift_labels, **told)


@settings(max_examples=30, deadline=None)
@given(packings(sequences=1, padded=False), st.booleans(), st.sampled_from(["cu_seq_lens_q", "cu_seqlens", "seq_idx"]))
def test_random_packings_of_one_row(batch: Packed, as_list: bool, name: str) -> None:
    bounds = [0]
    for _, length in batch.sequences[0]:
        bounds.append(bounds[-1] + length)
    told: Any = bounds if as_list else torch.tensor(bounds, dtype=torch.int32)
    if name == "seq_idx":
        told = batch.by_token(lambda document, *_: document, -1).int()
    check(batch, False, **{name: told})


@settings(max_examples=60, deadline=None)
@given(packings(), st.booleans())
def test_an_error_exactly_where_a_document_crosses(batch: Packed, shifted: bool) -> None:
    """Without a mask a sequence is one document: it must be of one language, and padding must not be attended to."""
    languages = batch.by_token(lambda document, language, place: language, -1)
    mixed = any(len({language for language, _ in each}) > 1 for each in batch.sequences)
    padded = any(sum(length for _, length in each) < batch.length for each in batch.sequences)
    try:
        rows_of(languages, (torch.ones_like(languages),), {}, TABLE, shifted=shifted)
    except LanguageError as error:
        assert mixed or (padded and not shifted)
        assert ("several languages" in str(error)) == mixed
    else:
        assert not mixed
        assert shifted or not padded
