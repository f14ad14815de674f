"""The schedule: what every window covers, how often languages come, and what an epoch uses and leaves out."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from draw import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketmoo_ds.data.schedule import MAX_LAG, LanguageSchedule

NAMES = tuple("abcdefghij")

temperatures = st.one_of(st.just(1.0), st.just(math.inf), st.floats(1, 10))


numbers_of_rounds = st.one_of(st.just("auto"), st.integers(1, 5))


def repeats(names):
    """One number of rounds for all languages, or some of their own."""
    return st.one_of(numbers_of_rounds, st.dictionaries(st.sampled_from(names), numbers_of_rounds))


@st.composite
def schedules(draw, max_units=60, repeat=None):
    """Random sizes, 1 to 8 nodes of 1 to 4 ranks, all options; each language has at least one unit, a window is
    filled."""
    nodes, per_node = draw(st.integers(1, 8)), draw(st.one_of(st.just(1), st.integers(2, 4)))
    micro_steps, batch = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    affinity = draw(st.sampled_from(["micro_step", "window"]))
    unit = batch * per_node * (micro_steps if affinity == "window" else 1)
    slots = nodes * (1 if affinity == "window" else micro_steps)
    units = draw(st.lists(st.integers(1, max_units), min_size=1, max_size=len(NAMES)))
    units[0] += max(0, slots - sum(units))
    sizes = [n * unit + draw(st.integers(0, unit - 1)) for n in units]
    return LanguageSchedule(
        NAMES[: len(sizes)],
        sizes,
        world_size=nodes * per_node,
        micro_steps=micro_steps,
        micro_batch_size=batch,
        temperature=draw(temperatures),
        seed=draw(st.integers(0, 2**63 - 1)),
        affinity=affinity,
        epoch_end=draw(st.sampled_from(["longest", "shortest"])),
        repeat=draw(repeats(NAMES[: len(sizes)])) if repeat is None else repeat,
        ranks_per_node=per_node,
    )


def tables(schedule, epoch=0):
    return [schedule.table(epoch, window) for window in range(schedule.windows_per_epoch)]


def in_units(schedule):
    """Returns the units (see the module) in each window, `[windows, K]`, the units of each language, and S."""
    per_unit = schedule.ranks_per_node * (schedule.micro_steps if schedule.affinity == "window" else 1)
    slots = schedule.world_size * schedule.micro_steps // per_unit
    counts = np.array([np.bincount(t.ravel(), minlength=len(schedule.sizes)) for t in tables(schedule)])
    assert not (counts % per_unit).any()
    return counts // per_unit, np.array(schedule.sizes) // (per_unit * schedule.micro_batch_size), slots


def make(sizes, **options):
    options = {"world_size": 2, "micro_steps": 2, "micro_batch_size": 1} | options
    return LanguageSchedule(NAMES[: len(sizes)], sizes, **options)


@settings(deadline=None, max_examples=examples(30))
@given(schedules(repeat=1))
def test_every_window_covers_as_many_languages_as_it_can(schedule):
    counts, units, slots = in_units(schedule)
    remaining = units.copy()
    for window in counts:
        with_data = np.count_nonzero(remaining)
        assert np.count_nonzero(window) == min(with_data, slots)
        if with_data >= slots:
            assert window.max() == 1
        remaining -= window
        assert remaining.min() >= 0


@settings(deadline=None, max_examples=examples(30))
@given(schedules(), st.integers(0, 100))
def test_slots_are_what_the_window_takes(schedule, epoch):
    for window, table in enumerate(tables(schedule, epoch)):
        assert table.shape == (schedule.micro_steps, schedule.world_size)
        taken = schedule.taken(window + 1) - schedule.taken(window)
        assert np.array_equal(np.bincount(table.ravel(), minlength=len(taken)), taken)


@settings(deadline=None, max_examples=examples(30))
@given(schedules())
def test_affinity_window_keeps_one_language_a_rank(schedule):
    if schedule.affinity == "window":
        assert all((table == table[0]).all() for table in tables(schedule))


@settings(deadline=None, max_examples=examples(30))
@given(schedules())
def test_the_ranks_of_a_node_have_one_language_in_a_micro_step(schedule):
    for table in tables(schedule):
        nodes = table.reshape(schedule.micro_steps, -1, schedule.ranks_per_node)
        assert (nodes == nodes[:, :, :1]).all()


@settings(deadline=None, max_examples=examples(30))
@given(schedules(), st.integers(0, 5))
def test_a_node_is_scheduled_as_one_rank_with_larger_micro_batches(schedule, epoch):
    nodes = schedule.world_size // schedule.ranks_per_node
    of_node = {"world_size": nodes, "micro_batch_size": schedule.micro_batch_size * schedule.ranks_per_node}
    same = schedule.settings() | {"temperature": schedule.temperature, "ranks_per_node": 1}
    by_rank = LanguageSchedule(**same | of_node)
    assert by_rank.windows_per_epoch == schedule.windows_per_epoch
    for nodes_table, table in zip(tables(by_rank, epoch), tables(schedule, epoch), strict=True):
        assert np.array_equal(np.repeat(nodes_table, schedule.ranks_per_node, axis=1), table)
    for window in range(schedule.windows_per_epoch + 1):
        assert np.array_equal(by_rank.taken(window) * schedule.ranks_per_node, schedule.taken(window))
    assert by_rank.tail == schedule.tail


def test_nodes_share_no_language_where_places_suffice():
    """16 ranks on 4 nodes: the 8 places of 2 micro-steps hold 8 languages, each on all ranks of one node."""
    schedule = make([100] * 8, world_size=16, ranks_per_node=4)
    for table in tables(schedule):
        assert sorted(table[:, ::4].ravel().tolist()) == list(range(8))
        assert np.array_equal(table, np.repeat(table[:, ::4], 4, axis=1))


@settings(deadline=None, max_examples=examples(30))
@given(schedules())
def test_used_and_tail_are_all_samples(schedule):
    used = np.bincount(np.concatenate(tables(schedule)).ravel(), minlength=len(schedule.sizes))
    used *= schedule.micro_batch_size
    for n, name, size in zip(used, schedule.languages, schedule.sizes, strict=True):
        assert schedule.tail[name] == max(size - n, 0)


@settings(deadline=None, max_examples=examples(30))
@given(schedules())
def test_no_language_comes_round_more_often_than_it_may(schedule):
    limit = schedule.repeat if isinstance(schedule.repeat, dict) else dict.fromkeys(schedule.languages, schedule.repeat)
    for name, rounds in schedule.rounds.items():
        assert rounds <= (math.inf if limit.get(name, 1) == "auto" else limit.get(name, 1))


@settings(deadline=None, max_examples=examples(30))
@given(schedules())
def test_somebody_comes_round_once_only(schedule):
    """Rounds are added for as long as another language is in its first one; rounding adds less than a unit."""
    _, units, _ = in_units(schedule)
    assert any(schedule.rounds[name] < 1 + 1 / n for name, n in zip(schedule.languages, units, strict=True))


@settings(deadline=None, max_examples=examples(30))
@given(schedules(repeat="auto"))
def test_auto_lets_languages_last_to_the_end(schedule):
    counts, _, slots = in_units(schedule)
    with_data = np.count_nonzero(counts.sum(axis=0))
    if slots < len(schedule.languages) or with_data < 2:
        return  # in rotation a language need not be in the last windows
    # Each has a share of 1 or more in all windows that the largest lasts, and is within the lag of it; besides, numbers
    # of units are rounded up, by less than one for each language.
    short = MAX_LAG + 1 + len(schedule.languages) / slots
    last = [np.flatnonzero(counts[:, language]).max() for language in range(len(schedule.languages))]
    assert min(last) >= len(counts) - 1 - short
    assert schedule.windows_of_one_language <= short


@settings(deadline=None, max_examples=examples(30))
@given(schedules())
def test_windows_of_one_language_are_counted(schedule):
    alone = sum(len(np.unique(table)) == 1 for table in tables(schedule))
    assert schedule.windows_of_one_language == alone


@settings(deadline=None, max_examples=examples(30))
@given(schedules(), st.integers(0, 3), st.integers(0, 4))
def test_each_round_is_a_permutation_and_begins_with_what_the_one_before_left_out(schedule, epoch, turn):
    for language, size in enumerate(schedule.sizes):
        before, after = (schedule.sample_order(epoch, language, 2 * turn + odd) for odd in (0, 1))
        assert sorted(before) == sorted(after) == list(range(size))
        _, place = schedule.place_in_round(language, -1)
        left_out = before[(place + 1) * schedule.micro_batch_size :]
        assert set(after[: len(left_out)]) == set(left_out)


def test_rounds_are_shuffled_differently():
    schedule = make([400, 300], repeat=3)
    orders = [schedule.sample_order(epoch, 1, turn) for epoch in range(2) for turn in range(4)]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(orders, 2))


def test_a_small_language_comes_round_while_the_large_one_lasts():
    """Of 4 places the small one has 1: the large one lasts 10000 / 3 windows, in which the small one takes 3334."""
    sizes = [10_000, 40]
    assert make(sizes).windows_of_one_language > 0.9 * make(sizes).windows_per_epoch
    schedule = make(sizes, repeat="auto")
    assert (schedule.windows_of_one_language, schedule.rounds["a"]) == (0, pytest.approx(1, abs=1e-3))
    assert schedule.rounds["b"] == pytest.approx(10_000 / 3 / 40, rel=1e-3)
    assert make(sizes, repeat={"b": 5}).rounds["b"] == 5
    assert make(sizes, repeat={"a": 5}).rounds == make(sizes).rounds == {"a": 1, "b": 1}


@settings(deadline=None, max_examples=examples(30))
@given(schedules(repeat=1), st.integers(0, 3))
def test_one_round_by_number_and_by_name_are_the_same(schedule, epoch):
    same = schedule.settings() | {"temperature": schedule.temperature, "repeat": dict.fromkeys(schedule.languages, 1)}
    again = LanguageSchedule(**same)
    assert again.tail == schedule.tail
    assert np.array_equal(tables(again, epoch), tables(schedule, epoch))


@settings(deadline=None, max_examples=examples(30))
@given(schedules(repeat=1))
def test_longest_epoch_leaves_less_than_a_window_of_units_and_shortest_ends_at_the_first_to_run_out(schedule):
    counts, units, slots = in_units(schedule)
    left = units - counts.sum(axis=0)
    if schedule.epoch_end == "longest":
        assert left.sum() < slots
    else:
        assert (units - counts[:-1].sum(axis=0)).min() > 0
        assert left.min() == 0 or left.sum() < slots


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(20, 2000), min_size=2, max_size=10),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 3),
    temperatures,
    st.integers(0, 2**32),
)
def test_languages_follow_their_shares(sizes, nodes, per_node, micro_steps, temperature, seed):
    schedule = make(
        [n * per_node for n in sizes],
        world_size=nodes * per_node,
        ranks_per_node=per_node,
        micro_steps=micro_steps,
        temperature=temperature,
        seed=seed,
    )
    slots, k = nodes * micro_steps, len(sizes)
    share = clipped_shares([n ** (1 / temperature) for n in sizes], slots)
    # As long as all languages have data: no window takes more than the share rounded up.
    windows = min(300, schedule.windows_per_epoch, *(int(n / np.ceil(s)) for n, s in zip(sizes, share, strict=True)))
    taken = np.array([schedule.taken(window) for window in range(windows + 1)]) // per_node
    lag = np.arange(windows + 1)[:, None] * share - taken
    # The stated bound; rounding of sums of 300 shares is far below the 1e-6.
    assert np.abs(lag).max() <= MAX_LAG + 1e-6
    # Follows from it: between two appearances a language's shares add up to at most twice the bound, plus its own 1.
    for language in range(k):
        windows_with = np.flatnonzero(np.diff(taken[:, language]))
        gaps = np.diff(np.concatenate([[-1], windows_with, [windows]]))
        assert gaps.max() <= (2 * MAX_LAG + 1) / share[language] + 1


def clipped_shares(weights, slots):
    """Rule 2 by bisection: shares `max(1, c w)` or `min(1, c w)` with the c that makes their sum the slots."""
    weights = np.array(weights) / max(weights)
    clip = np.maximum if slots >= len(weights) else np.minimum
    low, high = 0.0, slots / weights.min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if clip(1.0, middle * weights).sum() < slots else (low, middle)
    return clip(1.0, high * weights)


def test_natural_sampling_lets_all_languages_run_out_together():
    sizes = [8000, 4000, 2000, 2000]
    schedule = make(sizes, world_size=8)
    halfway = schedule.taken(schedule.windows_per_epoch // 2)
    # Shares of 8, 4, 2 and 2 of 16 slots are whole numbers, so nothing is rounded.
    assert halfway.tolist() == [4000, 2000, 1000, 1000]
    assert schedule.tail == dict.fromkeys("abcd", 0)


def test_infinite_temperature_treats_languages_alike():
    schedule = make([100_000, 1000, 1000], world_size=3, micro_steps=3, temperature=math.inf)
    assert np.array_equal(schedule.taken(100), [300, 300, 300])


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32), st.booleans())
def test_in_rotation_all_pairs_of_languages_meet(seed, equal):
    # Sizes that differ a little must not freeze the order: each pair has to meet in a window, or its conflict is never
    # resolved. Of 250 windows about 50 hold a given pair, so a miss by chance is out of the question.
    sizes = [500] * 8 if equal else [500 + language for language in range(8)]
    schedule = make(sizes, seed=seed, world_size=4, micro_steps=1)
    met = {pair for t in tables(schedule)[:250] for pair in itertools.combinations(sorted(t.ravel().tolist()), 2)}
    assert len(met) == 28


@settings(deadline=None, max_examples=examples(30))
@given(schedules(), st.integers(0, 5))
def test_is_deterministic(schedule, epoch):
    again = LanguageSchedule(**schedule.settings() | {"temperature": schedule.temperature})
    assert again.fingerprint() == schedule.fingerprint()
    assert np.array_equal(tables(again, epoch), tables(schedule, epoch))
    assert np.array_equal(again.sample_order(epoch, 0), schedule.sample_order(epoch, 0))


def test_epochs_and_seeds_differ():
    schedule, other = make([400, 300], seed=1), make([400, 300], seed=2)
    assert not np.array_equal(tables(schedule, 0), tables(schedule, 1))
    assert not np.array_equal(tables(schedule, 0), tables(other, 0))
    orders = [schedule.sample_order(0, 0), schedule.sample_order(1, 0), other.sample_order(0, 0)]
    assert all(sorted(order) == list(range(400)) for order in orders)
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(orders, 2))


@pytest.mark.parametrize(
    "change",
    [
        {"world_size": 4},
        {"micro_steps": 4},
        {"micro_batch_size": 2},
        {"temperature": 2.0},
        {"temperature": math.inf},
        {"seed": 1},
        {"affinity": "window"},
        {"epoch_end": "shortest"},
        {"repeat": "auto"},
        {"repeat": 2},
        {"repeat": {"b": 2}},
        {"ranks_per_node": 2},
    ],
)
def test_fingerprint_covers_every_setting(change):
    assert make([40, 30], **change).fingerprint() != make([40, 30]).fingerprint()
    assert make([40, 31]).fingerprint() != make([40, 30]).fingerprint()
    assert json.loads(json.dumps(make([40, 30], **change).settings(), allow_nan=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 0}, "world_size = 0: expected a whole number, 1 or more"),
        ({"micro_steps": 1.5}, "micro_steps = 1.5"),
        ({"micro_batch_size": True}, "micro_batch_size = True"),
        ({"seed": -1}, "seed = -1"),
        ({"temperature": 0.5}, "temperature = 0.5: expected a number, 1 or more"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": "1"}, "temperature = '1'"),
        ({"affinity": "windows"}, 'affinity = "windows": unknown, .* did you mean "window"'),
        ({"epoch_end": "short"}, 'epoch_end = "short": unknown, .* did you mean "shortest"'),
        ({"repeat": 0}, 'repeat = 0: expected a whole number, 1 or more, or "auto"'),
        ({"repeat": "yes"}, "repeat = 'yes': expected"),
        ({"repeat": True}, "repeat = True: expected"),
        ({"repeat": {"b": 1.5}}, "repeat.b = 1.5: expected"),
        ({"repeat": {"c": 2}}, r"""repeat: "c" is no language of \['a', 'b'\]"""),
        ({"micro_batch_size": 31}, 'language "b" has 30 samples, fewer than .* micro_batch_size = 31'),
        ({"micro_batch_size": 16, "affinity": "window"}, 'language "b" has 30 samples, .* 16 x 2'),
        ({"ranks_per_node": 0}, "ranks_per_node = 0"),
        ({"ranks_per_node": 4}, "ranks_per_node = 4: world_size = 2 is no multiple of it"),
        (
            {"micro_batch_size": 16, "ranks_per_node": 2},
            '"b" has 30 samples, .* micro_batch_size x ranks_per_node = 16 x 2 samples;',
        ),
        (
            {"micro_batch_size": 8, "ranks_per_node": 2, "affinity": "window"},
            r"micro_batch_size x micro_steps x ranks_per_node = 8 x 2 x 2 samples \(affinity",
        ),
        ({"world_size": 36}, "no window can be filled: the 70 samples make 70 .* a window takes 72"),
    ],
)
def test_errors_name_the_setting(change, message):
    with pytest.raises(ValueError, match=message):
        make([40, 30], **change)


def test_languages_and_sizes_must_fit():
    options = {"world_size": 1, "micro_steps": 1, "micro_batch_size": 1}
    with pytest.raises(ValueError, match=r"sizes = \[3\]"):
        LanguageSchedule(["de", "fr"], [3], **options)
    with pytest.raises(ValueError, match="each once"):
        LanguageSchedule(["de", "de"], [3, 3], **options)
    with pytest.raises(ValueError, match="one name or more"):
        LanguageSchedule([], [], **options)


def test_a_window_beyond_the_epoch_is_an_index_error():
    schedule = make([40, 30])
    for window in (-1, schedule.windows_per_epoch):
        with pytest.raises(IndexError, match=f"window {window}"):
            schedule.table(0, window)
