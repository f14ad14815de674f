"""The window: what is stored and what it is multiplied by give the row that the module's docstring defines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bucketmoo_ds.data.batch import Slot
from bucketmoo_ds.pipeline.window import Window, merged_by_node

ELEMENTS = 7


def row_by_definition(
    tokens: list[list[int]], languages: list[list[int]], token_gradients: list[list[Tensor]], weighting: str
) -> dict[int, Tensor]:
    """`row_l`: the sum of the gradients of all of the language's token losses, over its number of tokens.

    With `token`: times its share of the window's tokens and the number of languages present.
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    for step, row in enumerate(languages):
        for rank, language in enumerate(row):
            if tokens[step][rank]:
                sums[language] = sums.get(language, 0) + token_gradients[step][rank]
                counts[language] = counts.get(language, 0) + tokens[step][rank]
    total = sum(counts.values())
    factor = {"language": lambda _: 1.0, "token": lambda language: counts[language] / total * len(counts)}[weighting]
    return {language: sums[language] / counts[language] * factor(language) for language in sums}


@st.composite
def windows(draw: st.DrawFn) -> tuple[str, str, int, list[list[int]], list[list[int]], list[list[float | None]], int]:
    """How gradients are exchanged: in every micro-step; once, of one language a rank; or once, with languages apart."""
    how = draw(st.sampled_from(["every", "once", "apart"]))
    micro_steps, world_size, count = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    language = st.integers(0, count - 1)
    first = draw(st.lists(language, min_size=world_size, max_size=world_size))
    rows = [first if how == "once" else [draw(language) for _ in first] for _ in range(micro_steps)]
    number = st.one_of(st.just(0), st.integers(1, 500))
    tokens = [[draw(number) for _ in first] for _ in range(micro_steps)]
    if not any(map(any, tokens)):
        tokens[0][0] = 1
    # Trainer tells the model num_items_in_batch: the loss is then a sum over it, and DeepSpeed does not divide by M.
    items = draw(st.none() | st.integers(1, 1000))
    return how, draw(st.sampled_from(["language", "token"])), count, rows, tokens, items, draw(st.integers(0, 2**32))


@settings(deadline=None)
@given(case=windows())
def test_rows_are_what_the_definition_says(case: tuple) -> None:
    how, weighting, count, languages, tokens, items, seed = case
    micro_steps, world_size = len(tokens), len(tokens[0])
    generator = torch.Generator().manual_seed(seed)
    # The gradient of the sum of each micro-batch's token losses.
    sums = [[torch.randn(ELEMENTS, generator=generator, dtype=torch.float64) * n for n in row] for row in tokens]

    def handed_over(step: int, rank: int) -> Tensor:
        if items is not None:
            return sums[step][rank] * world_size / items
        return sums[step][rank] / tokens[step][rank] / micro_steps

    def slot(step: int, rank: int) -> Slot:
        scale = items / world_size if items is not None else float(micro_steps * tokens[step][rank])
        return Slot(languages[step][rank], tokens[step][rank], scale)

    window = Window(count, weighting, once_a_window=how != "every", apart=how == "apart")
    stored: dict[int, Tensor] = {}
    zeros = torch.zeros(ELEMENTS, dtype=torch.float64)
    local_sums: list[dict[int, Tensor]] = [{} for _ in range(world_size)]
    for step in range(micro_steps):
        assert window.changed_language([slot(step, rank) for rank in range(world_size)]) is None
        window.add([slot(step, rank) for rank in range(world_size)])
        gradients = [handed_over(step, rank) if tokens[step][rank] else zeros for rank in range(world_size)]
        if how != "every":
            for rank, gradient in enumerate(gradients):
                of_rank, language = local_sums[rank], languages[step][rank]
                of_rank[language] = of_rank.get(language, 0) + window.own_factor(rank) * gradient
            if step < micro_steps - 1:
                continue
        for part in range(window.parts):
            sources = window.sources(part)
            if how != "every":
                gradients = [sums.get(slot.language, zeros) for sums, slot in zip(local_sums, sources, strict=True)]
            for gradient, source in zip(gradients, sources, strict=True):
                if source.target_tokens > 0:
                    scaled = source.scale / window.reference_scale(source.row) * gradient
                    stored[source.language] = stored.get(source.language, 0) + scaled
    expected = row_by_definition(tokens, languages, sums, weighting)
    assert window.present == sorted(expected)
    for language, coefficient in zip(window.present, window.coefficients(), strict=True):
        # float64, at most 16 terms and a handful of factors; signs may cancel, so relative to the largest element.
        size = float(expected[language].abs().max())
        torch.testing.assert_close(coefficient * stored[language], expected[language], rtol=0, atol=1e-12 * size)


def test_parts_are_as_many_as_the_rank_with_the_most_languages_has() -> None:
    window = Window(3, "language", once_a_window=True, apart=True)
    window.add([Slot(0, 1, 1.0), Slot(1, 1, 1.0), Slot(2, 0, 0.0)])
    assert window.parts == 1
    window.add([Slot(1, 2, 2.0), Slot(1, 3, 3.0), Slot(2, 0, 0.0)])
    window.add([Slot(0, 4, 4.0), Slot(2, 0, 0.0), Slot(0, 5, 5.0)])
    assert [[language for language, _ in window.rows_of(rank)] for rank in range(3)] == [[0, 1], [1], [0]]
    assert window.parts == 2
    assert [slot.target_tokens for slot in window.sources(0)] == [1, 1, 5]
    assert [slot.target_tokens for slot in window.sources(1)] == [2, 0, 0]


@settings(deadline=None)
@given(
    tokens=st.integers(1, 10**6),
    slots=st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_equal_micro_batches_are_added_without_any_factor(tokens: int, slots: list[list[int]]) -> None:
    window = Window(3, "language", once_a_window=False)
    for row in slots:
        window.add([Slot(language, tokens, float(len(slots) * tokens)) for language in row])
        assert all(slot.scale / window.reference_scale(slot.row) == 1.0 for slot in window.sources())


def test_absent_languages_are_left_out() -> None:
    window = Window(4, "token", once_a_window=False)
    window.add([Slot(3, 5, 5.0), Slot(1, 0, 0.0), Slot(0, 10, 10.0)])
    assert window.target_tokens == [10, 0, 0, 5]
    assert window.present == [0, 3]
    assert window.coefficients() == [10.0 * 2 / 15, 5.0 * 2 / 15]
    window.clear()
    assert window.present == []


@pytest.mark.parametrize("once_a_window", [False, True])
def test_changed_language(once_a_window: bool) -> None:
    window = Window(3, "language", once_a_window)
    window.add([Slot(0, 1, 1.0), Slot(1, 1, 1.0)])
    assert window.changed_language([Slot(0, 2, 2.0), Slot(1, 2, 2.0)]) is None
    assert window.changed_language([Slot(0, 2, 2.0), Slot(2, 2, 2.0)]) == ((1, 1) if once_a_window else None)
    window.clear()
    assert window.changed_language([Slot(2, 2, 2.0), Slot(0, 2, 2.0)]) is None


@settings(deadline=None)
@given(
    inside=st.integers(1, 4),
    nodes=st.lists(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 0, 3, 50])), min_size=4), min_size=1),
    micro_steps=st.integers(1, 3),
)
def test_a_nodes_slot_stands_for_the_sum_of_its_ranks(
    inside: int, nodes: list[list[tuple[int, int]]], micro_steps: int
) -> None:
    """With gradient g_b of slot b worth `scale_b g_b`, the ranks add up `scale_b / scale g_b`, which is worth `scale`
    times as much; those without a token take no part."""
    slots = [
        Slot(language, tokens, float(micro_steps * tokens)) for node in nodes for language, tokens in node[:inside]
    ]
    merged = merged_by_node(slots, inside)
    by_node = [slots[first : first + inside] for first in range(0, len(slots), inside)]
    fed = [[slot for slot in node if slot.target_tokens] for node in by_node]
    if any(len({slot.language for slot in node}) > 1 for node in fed):
        assert merged is None
        return
    assert merged is not None
    assert len(merged) == len(by_node)
    for found, ranks in zip(merged, fed, strict=True):
        assert found.target_tokens == sum(slot.target_tokens for slot in ranks)
        if ranks:
            assert found.language == ranks[0].language
            assert found.scale in {slot.scale for slot in ranks}, "a scale without which nobody's would be rounded"


def test_ranks_without_a_token_do_not_mix_a_node() -> None:
    slots = [Slot(1, 0, 0.0), Slot(2, 8, 16.0), Slot(0, 4, 8.0), Slot(0, 4, 8.0)]
    assert merged_by_node(slots, 2) == [Slot(2, 8, 16.0), Slot(0, 8, 8.0)]
    assert merged_by_node(slots, 4) is None
    assert merged_by_node([Slot(1, 0, 0.0), Slot(2, 0, 0.0)], 2) == [Slot(1, 0, 0.0)]
