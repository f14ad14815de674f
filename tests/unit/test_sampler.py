"""The sampler: every batch of one language, no sample twice, any world size, resumable, with real datasets."""

from __future__ import annotations

import ast
import itertools
import json
import re

import datasets
import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Subset
from torch.utils.data import Dataset as TorchDataset

from bucketmoo_ds.config import BucketMOOConfig
from bucketmoo_ds.data.sampler import LanguageBatchSampler
from bucketmoo_ds.errors import ConfigError

LANGUAGES = ("de", "fr", "ru", "pl", "ja")


@st.composite
def cases(draw):
    """Labels in random order, with options for which at least one window can be filled."""
    nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    micro_steps, batch = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    k = draw(st.integers(1, len(LANGUAGES)))
    least = batch * micro_steps * per_node
    sizes = [draw(st.integers(least, least + 40)) for _ in range(k)]
    # A unit of a node (batch x micro_steps x per_node) for each of them, with each language's remainder lost.
    sizes[0] += least * nodes
    labels = np.repeat(np.arange(k), sizes)
    np.random.default_rng(draw(st.integers(0, 2**32))).shuffle(labels)
    return {
        "sample_languages": labels,
        "languages": LANGUAGES[:k],
        "world_size": nodes * per_node,
        "ranks_per_node": per_node,
        "micro_steps": micro_steps,
        "micro_batch_size": batch,
        "temperature": draw(st.floats(1, 8)),
        "seed": draw(st.integers(0, 2**32)),
        "affinity": draw(st.sampled_from(["micro_step", "window"])),
        "epoch_end": draw(st.sampled_from(["longest", "shortest"])),
        "repeat": draw(st.sampled_from([1, 1, 2, "auto", {LANGUAGES[k - 1]: 3}])),
    }


def small(**changes):
    """A case of 3 languages, 2 ranks and 2 micro-steps; 60 rows."""
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [30, 20, 10]))
    options = {"languages": LANGUAGES[:3], "micro_batch_size": 2, "micro_steps": 2, "world_size": 2, "seed": 7}
    return LanguageBatchSampler(**({"sample_languages": labels} | options | changes))


@settings(deadline=None)
@given(cases(), st.integers(0, 3))
def test_a_round_takes_no_sample_twice_and_the_tail_is_the_rest(case, epoch):
    sampler = LanguageBatchSampler(**case)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    rows = np.array(list(itertools.chain(*batches)))
    labels = case["sample_languages"]
    assert len(batches) == len(sampler)
    assert all(len(batch) == case["micro_batch_size"] for batch in batches)
    unit = case["micro_batch_size"] * case["ranks_per_node"]
    unit *= case["micro_steps"] if case["affinity"] == "window" else 1
    for language in range(len(case["languages"])):
        drawn = rows[labels[rows] == language]
        of_a_round = np.count_nonzero(labels == language) // unit * unit
        for first in range(0, len(drawn), of_a_round):
            of_round = drawn[first : first + of_a_round]
            assert len(set(of_round)) == len(of_round)
    left = np.delete(labels, rows)
    assert sampler.tail == {name: int((left == index).sum()) for index, name in enumerate(case["languages"])}


@settings(deadline=None)
@given(cases(), st.integers(0, 3))
def test_every_batch_is_of_the_language_its_slot_names(case, epoch):
    sampler = LanguageBatchSampler(**case)
    sampler.set_epoch(epoch)
    for index, batch in enumerate(sampler):
        assert {int(label) for label in case["sample_languages"][batch]} == {sampler.language_of(epoch, index)}


@settings(deadline=None)
@given(cases(), st.integers(0, 3))
def test_the_ranks_of_a_node_train_on_one_language_and_on_other_rows(case, epoch):
    per_node = case["ranks_per_node"]
    sampler = LanguageBatchSampler(**case)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    for first in range(0, len(batches), per_node):
        of_node = list(itertools.chain(*batches[first : first + per_node]))
        assert len(set(of_node)) == per_node * case["micro_batch_size"]
        assert len({int(label) for label in case["sample_languages"][of_node]}) == 1


@settings(deadline=None, max_examples=40)
@given(cases(), st.integers(0, 3))
def test_ranks_and_accelerate_take_the_global_order_in_strides(case, epoch):
    world_size = case["world_size"]
    sampler = LanguageBatchSampler(**case)
    sampler.set_epoch(epoch)
    everything = list(sampler)
    for rank in range(world_size):
        own = LanguageBatchSampler(**case, rank=rank)
        own.set_epoch(epoch)
        batches = list(own)
        assert batches == everything[rank::world_size]
        assert len(batches) == len(own)
        labels = [own.language_of(epoch, index) for index in range(len(own))]
        assert labels == [sampler.language_of(epoch, index * world_size + rank) for index in range(len(own))]
        sampler.set_epoch(epoch)
        shard = BatchSamplerShard(sampler, world_size, rank, split_batches=False, even_batches=True)
        assert list(shard) == batches
        assert len(shard) == len(batches)


@settings(deadline=None)
@given(cases(), st.data())
def test_resuming_equals_not_stopping(case, data):
    sampler = LanguageBatchSampler(**case)
    per_window = case["world_size"] * case["micro_steps"]
    uninterrupted = [*sampler, *sampler]
    stop = data.draw(st.integers(0, len(sampler)))
    stopped = LanguageBatchSampler(**case)
    for _ in itertools.islice(stopped, stop):
        pass
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = LanguageBatchSampler(**case)
    resumed.load_state_dict(state)
    # A window that was stopped half-way is trained again.
    begin = stop // per_window * per_window
    rest = [*resumed, *resumed] if begin < len(sampler) else list(resumed)
    assert rest == uninterrupted[begin:]

    epoch, window = divmod(begin // per_window, sampler.windows_per_epoch)
    assert state == sampler.state_dict(epoch=epoch, window=window)
    sought = LanguageBatchSampler(**case)
    sought.seek(epoch, window)
    assert list(sought) == rest[: len(sampler) - begin % len(sampler)]


def test_iterating_again_after_a_break_begins_where_the_last_iteration_began():
    sampler = small()
    sampler.seek(2, 1)
    first = list(itertools.islice(sampler, 6))
    assert list(itertools.islice(sampler, 6)) == first


def test_epochs_shuffle_differently_and_follow_each_other():
    sampler = small()
    epochs = [list(sampler) for _ in range(3)]
    assert not any(a == b for a, b in itertools.combinations(epochs, 2))
    sampler.set_epoch(1)
    assert list(sampler) == epochs[1]


def test_set_epoch_keeps_a_position_within_that_epoch_only():
    sampler = small()
    sampler.set_epoch(3)
    epoch = list(sampler)
    sampler.seek(3, 2)
    sampler.set_epoch(3)
    assert list(sampler) == epoch[2 * 4 :]
    sampler.seek(3, 2)
    sampler.set_epoch(4)
    sampler.set_epoch(3)
    assert list(sampler) == epoch


def test_a_window_past_the_last_is_the_next_epoch():
    sampler = small()
    sampler.seek(0, sampler.windows_per_epoch)
    assert sampler.state_dict() == sampler.state_dict(epoch=1, window=0)
    for position in ((0, sampler.windows_per_epoch + 1), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match=f"epoch = {position[0]}, window = {position[1]}: expected"):
            sampler.seek(*position)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_data_loader_the_trainers_count_is_the_position(workers):
    dataset = hugging_face(["de", "fr", "ru"] * 20)
    options = {"languages": LANGUAGES[:3], "micro_batch_size": 2, "micro_steps": 2, "world_size": 1}
    sampler = LanguageBatchSampler(dataset, **options)
    seen = [batch["id"].tolist() for batch in DataLoader(dataset, batch_sampler=sampler, num_workers=workers)]
    assert len(seen) == len(sampler)
    sampler = LanguageBatchSampler(dataset, **options)
    iterator = iter(DataLoader(dataset, batch_sampler=sampler, num_workers=workers))
    for _ in range(3 * 2):
        next(iterator)
    resumed = LanguageBatchSampler(dataset, **options)
    resumed.load_state_dict(sampler.state_dict(epoch=0, window=3))
    loader = DataLoader(dataset, batch_sampler=resumed, num_workers=workers)
    assert [batch["id"].tolist() for batch in loader] == seen[3 * 2 :]
    for batch in DataLoader(dataset, batch_sampler=sampler):
        assert len(set(batch["language"])) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_accelerate_prepares_and_skips_it(rank):
    dataset = hugging_face(["de", "fr", "ru"] * 20)
    options = {"languages": LANGUAGES[:3], "micro_batch_size": 2, "micro_steps": 2, "world_size": 2}
    expected = list(LanguageBatchSampler(dataset, **options, rank=rank))
    loader = DataLoader(dataset, batch_sampler=LanguageBatchSampler(dataset, **options))
    prepared = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
    assert len(prepared) == len(expected)
    skipped = skip_first_batches(prepared, 4)
    assert [batch["id"].tolist() for batch in skipped] == expected[4:]
    prepared.batch_sampler.batch_sampler.set_epoch(0)
    assert [batch["id"].tolist() for batch in prepared] == expected


def prepare(sampler, rank, ranks, **settings):
    """Accelerate's loader of a rank, of a dataset whose rows are their own numbers."""
    loader = DataLoader(range(len(sampler._labels)), batch_sampler=sampler)
    return prepare_data_loader(loader, num_processes=ranks, process_index=rank, put_on_device=False, **settings)


def epochs_of(ranks, rank, epochs=3):
    """The rows of three epochs as a rank of a loop of one's own gets them."""
    sampler = small(world_size=ranks, rank=rank)
    return [list(sampler) for _ in range(epochs)]


def rows_of(loader):
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_accelerate_resumes_inside_a_later_epoch(ranks, rank):
    """As its documentation has it, and as Trainer does: skip in the first epoch after resuming, and go on with all."""
    first, second, third = epochs_of(ranks, rank)
    loader = prepare(small(world_size=ranks), rank, ranks)
    skipped = skip_first_batches(loader, 2)
    skipped.set_epoch(1)
    assert rows_of(skipped) == second[2:]
    assert rows_of(loader) == third, "without set_epoch"
    loader = prepare(small(world_size=ranks), rank, ranks)
    loader.set_epoch(2)
    assert rows_of(skip_first_batches(skip_first_batches(loader, 1), 3)) == third[4:]
    loader.set_epoch(0)
    assert rows_of(loader) == first


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_accelerate_begins_where_seek_put_it(ranks, rank):
    _, second, third = epochs_of(ranks, rank)
    sampler = small(world_size=ranks)
    loader = prepare(sampler, rank, ranks)
    sampler.seek(1, 1)
    assert rows_of(loader) == second[2:]
    assert rows_of(loader) == third


@pytest.mark.parametrize("rank", [0, 1])
def test_accelerate_that_splits_batches_needs_a_sampler_of_one_rank(rank):
    sampler = small(world_size=1, micro_batch_size=4)
    whole = list(small(world_size=1, micro_batch_size=4))
    assert rows_of(prepare(sampler, rank, 2, split_batches=True)) == [batch[2 * rank :][:2] for batch in whole]
    with pytest.raises(ConfigError, match=r"split_batches = True: .* micro_batch_size that is 2 times as large"):
        rows_of(prepare(small(), rank, 2, split_batches=True))


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"world_size": 1}, 2, "world_size = 1: Accelerate deals the batches out to 2 ranks"),
        ({"world_size": 2}, 4, "world_size=4"),
        ({"rank": 1}, 2, "rank = 1: .* leave rank out"),
    ],
)
def test_accelerate_deals_out_what_the_schedule_says_or_stops(changes, ranks, message):
    with pytest.raises(ConfigError, match=message):
        iter(prepare(small(**changes), 0, ranks))
    with pytest.raises(ConfigError, match=message):
        iter(skip_first_batches(prepare(small(**changes), 0, ranks), 1))


def test_accelerate_is_left_alone_without_our_sampler():
    class Own(BatchSampler):
        def set_epoch(self, epoch):
            raise AssertionError("accelerate does not call it through a shard")

    own = Own(range(8), 2, drop_last=True)
    loader = prepare_data_loader(DataLoader(range(8), batch_sampler=own), num_processes=2, put_on_device=False)
    assert rows_of(skip_first_batches(loader, 1)) == [[4, 5]]
    plain = prepare_data_loader(DataLoader(range(8)), num_processes=2, put_on_device=False)
    assert rows_of(plain) == [[0], [2], [4], [6]]


def unbalanced(**changes):
    """A large language and one that fills ten micro-batches of two, in windows of four."""
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1], [600, 20]))
    return small(**({"sample_languages": labels, "languages": LANGUAGES[:2]} | changes))


@pytest.mark.parametrize(
    ("changes", "level", "parts"),
    [
        ({}, "WARNING", ["67 of 77 windows of an epoch (87.0%)", 'repeat = "auto"', 'epoch_end = "shortest"']),
        ({"temperature": 3.0}, "WARNING", ["a lower temperature"]),
        ({"repeat": "auto"}, "INFO", ["0 of 100 windows of an epoch (0.0%)", "come round again: fr 10.0 times"]),
        ({"repeat": 2}, "WARNING", ["60 of 80 windows", "fr 2.0 times"]),
        ({"epoch_end": "shortest"}, "INFO", ["0 of 10 windows"]),
        (
            {"micro_steps": 1, "world_size": 1},
            "WARNING",
            ["(100.0%)", "one place (micro_steps = 1", "raise micro_steps"],
        ),
        ({"affinity": "window", "world_size": 1}, "WARNING", ["(100.0%)", 'affinity = "micro_step"']),
        ({"rank": 0}, "WARNING", ["87.0%"]),
        ({"rank": 1}, None, []),
        ({"sample_languages": [0] * 60, "languages": ["de"]}, None, []),
        ({"config": BucketMOOConfig(languages=LANGUAGES[:2], enabled=False)}, None, []),
    ],
)
def test_says_how_many_windows_hold_one_language(caplog, changes, level, parts):
    caplog.set_level("INFO", "bucketmoo_ds")
    sampler = unbalanced(**changes)
    assert not caplog.records, "before a batch is drawn"
    for _ in range(2):
        next(iter(sampler))
    assert [record.levelname for record in caplog.records] == ([level] if level else [])
    for part in parts:
        assert part in caplog.text


def hugging_face(languages, **features):
    features = {"id": datasets.Value("int64"), "language": features.get("language", datasets.Value("string"))}
    rows = {"id": list(range(len(languages))), "language": languages}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def rows_by_language(dataset, languages=("de", "fr")):
    """Returns the rows that one epoch of micro-batches of one sample yields for each language."""
    sampler = LanguageBatchSampler(dataset, languages=languages, micro_batch_size=1, world_size=1)
    found = {name: set() for name in languages}
    for index, (row,) in enumerate(sampler):
        found[languages[sampler.language_of(0, index)]].add(row)
    return found


def test_columns_of_names_indices_and_class_labels():
    languages = np.random.default_rng().choice(["de", "fr"], 40).tolist()
    languages[:2] = ["de", "fr"]
    expected = {name: {row for row, language in enumerate(languages) if language == name} for name in ("de", "fr")}
    label = datasets.ClassLabel(names=["de", "fr", "xx"])
    indices = [("de", "fr").index(language) for language in languages]
    assert rows_by_language(hugging_face(languages)) == expected
    assert rows_by_language(hugging_face(indices, language=datasets.Value("int32"))) == expected
    assert rows_by_language(hugging_face(languages, language=label)) == expected
    assert rows_by_language([{"language": language} for language in languages]) == expected
    assert rows_by_language([{"language": language.encode()} for language in languages]) == expected
    assert rows_by_language([{"language": np.str_(language)} for language in languages]) == expected
    as_bytes = [language.encode() for language in languages]
    assert rows_by_language(hugging_face(as_bytes, language=datasets.Value("binary"))) == expected
    torch_formatted = hugging_face(indices, language=datasets.Value("int32")).with_format("torch")
    assert rows_by_language(torch_formatted) == expected
    transformed = hugging_face(languages).with_transform(lambda rows: {"nothing": rows["id"]})
    assert rows_by_language(transformed) == expected


WRAPPERS = {
    "itself": lambda dataset: dataset,
    "torch format": lambda dataset: dataset.with_format("torch"),
    "Subset": lambda dataset: Subset(dataset, range(len(dataset))),
    "ConcatDataset": lambda dataset: ConcatDataset([dataset, hugging_face([0, 1], language=datasets.Value("int64"))]),
    "nested": lambda dataset: Subset(ConcatDataset([Subset(dataset, range(len(dataset)))]), range(len(dataset))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_class_label_in_another_order_is_refused(wrap):
    """A loader hands out its numbers, which would then be taken for indices of `languages`."""
    names = np.random.default_rng().choice(["de", "fr"], 40).tolist()
    names[:2] = ["de", "fr"]
    refusal = r"of its ClassLabel, but number \d in languages = .*align_labels_with_mapping"
    for classes in (["fr", "de"], ["fr", "xx", "de"], ["xx", "de", "fr"], ["de", "xx", "fr"]):
        dataset = wrap(hugging_face(names, language=datasets.ClassLabel(names=classes)))
        with pytest.raises(ValueError, match=refusal):
            rows_by_language(dataset)
    with pytest.raises(ValueError, match=r'"xx".* is not in'):
        rows_by_language(wrap(hugging_face([*names, "xx"], language=datasets.ClassLabel(names=["de", "fr", "xx"]))))
    assert rows_by_language(wrap(hugging_face(names, language=datasets.ClassLabel(names=["de", "fr", "xx"]))))


def test_the_way_out_of_another_order_works():
    names = np.random.default_rng().choice(["de", "fr"], 40).tolist()
    names[:2] = ["de", "fr"]
    dataset = hugging_face(names, language=datasets.ClassLabel(names=["xx", "fr", "de"]))
    with pytest.raises(ValueError, match="with_mapping") as refused:
        rows_by_language(dataset)
    call = re.search(r"dataset\.align_labels_with_mapping\((\{.*?\}), \"(.*?)\"\)", str(refused.value))
    aligned = dataset.align_labels_with_mapping(ast.literal_eval(call[1]), call[2])
    assert aligned["language"][:] == [("de", "fr").index(name) for name in names]
    assert rows_by_language(aligned) == {
        name: {row for row, language in enumerate(names) if language == name} for name in ("de", "fr")
    }


def test_selected_shuffled_and_concatenated_datasets():
    parts = [hugging_face(["de"] * 9 + ["fr"] * 4), hugging_face(["fr"] * 5 + ["de"] * 2)]
    dataset = datasets.concatenate_datasets(parts).shuffle(seed=3).select(range(2, 19))
    languages = dataset["language"][:]
    assert rows_by_language(dataset) == {
        name: {row for row, language in enumerate(languages) if language == name} for name in ("de", "fr")
    }


def test_configuration_gives_defaults_and_keywords_win():
    dataset = hugging_face(["de", "fr"] * 20).rename_column("language", "lang")
    config = BucketMOOConfig(languages=["fr", "de"], language_key="lang", seed=5)
    sampler = LanguageBatchSampler(dataset, config, micro_batch_size=2)
    assert (sampler.languages, sampler.schedule.seed, sampler.schedule.world_size) == (("fr", "de"), 5, 1)
    assert LanguageBatchSampler(dataset, config, micro_batch_size=2, seed=0).schedule.seed == 0
    other = BucketMOOConfig(languages=["de"], language_key="no", seed=1)
    sampler = LanguageBatchSampler(dataset, other, languages=["de", "fr"], language_column="lang", micro_batch_size=2)
    assert sampler.languages == ("de", "fr")


def test_nodes_come_from_a_config_that_asks_for_two_stages(monkeypatch):
    def nodes(of_config, exchange="two_stage", **given):
        config = BucketMOOConfig(languages=LANGUAGES[:3], exchange=exchange, ranks_per_node=of_config)
        return small(config=config, languages=None, world_size=4, micro_steps=1, **given).schedule.ranks_per_node

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert nodes(2) == 2
    assert nodes(2, exchange="auto") == nodes(2, exchange="flat") == 1
    assert nodes(2, ranks_per_node=1) == 1
    assert nodes(1, exchange="auto", ranks_per_node=4) == 4
    with pytest.raises(ValueError, match='exchange = "two_stage": 4 ranks with 4 a node are not several nodes'):
        nodes(0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert nodes(0) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 8},
        {"world_size": 1},
        {"temperature": 2.0},
        {"languages": ("fr", "de", "ru")},
        {"repeat": "auto"},
        {"ranks_per_node": 2},
    ],
)
def test_a_state_of_other_settings_is_refused_by_name(changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"another schedule: {name} = "):
        small(**changes).load_state_dict(small().state_dict())


def test_a_state_of_other_rows_is_refused():
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [30, 20, 10]))
    with pytest.raises(ValueError, match="languages of the rows"):
        small(sample_languages=labels).load_state_dict(small().state_dict())


def test_rank_does_not_change_the_fingerprint():
    assert small(rank=0).fingerprint() == small(rank=1).fingerprint() == small().fingerprint()


def test_half_a_position_is_refused():
    with pytest.raises(ValueError, match="both or neither"):
        small().state_dict(window=3)


class Unmapped(TorchDataset):
    """Rows that are tuples."""

    def __len__(self):
        return 8

    def __getitem__(self, row):
        return row, "de"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "dataset: missing"),
        (hugging_face(["de", "fr"]).to_iterable_dataset(), "dataset = IterableDataset: .* without streaming=True"),
        (hugging_face(["de", "fr"]).rename_column("language", "lang"), 'no such column; did you mean "lang".*id, lang'),
        ([{"langage": "de"}], 'did you mean "langage"'),
        (Unmapped(), "its rows are no mappings"),
        (hugging_face(["de", "fr", "de_"] * 3), 'column "language", row 2: language "de_" is not in .*did you mean'),
        (hugging_face(["de", None] * 3), "row 1: language None: expected"),
        (hugging_face([0, 1, 2, 2], language=datasets.Value("int8")), "row 2: language 2: expected"),
        (hugging_face([True, False], language=datasets.Value("bool")), "row 0: language True: expected"),
        (hugging_face([0, -1], language=datasets.ClassLabel(names=["de", "fr"])), "row 1: language None: expected"),
        (hugging_face(["de"] * 9, language=datasets.ClassLabel(names=["de", "fr"])), 'language "fr" has 0 samples'),
        (hugging_face([["de"]], language=datasets.List(datasets.Value("string"))), "holds List"),
        (hugging_face([]), 'language "de" has 0 samples'),
    ],
)
def test_errors_of_the_data(dataset, message):
    with pytest.raises(ValueError, match=message):
        LanguageBatchSampler(dataset, languages=["de", "fr"], micro_batch_size=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"languages": None}, "languages: missing"),
        ({"rank": 2}, "rank = 2: expected 0 to 1, as world_size = 2"),
        ({"rank": -1}, "rank = -1"),
        ({"dataset": [1, 2, 3]}, "sample_languages has 60 entries; expected 3"),
        ({"sample_languages": [0, 1, 2.5]}, "sample_languages, row 2: language 2.5: expected"),
    ],
)
def test_errors_of_the_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
