"""The table of languages: one value is one language, however a data loader has written it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bucketmoo_ds.data.languages import LanguageTable
from bucketmoo_ds.errors import ConfigError, LanguageError

names = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=1, unique=True)


def spellings(name: str, index: int) -> list[object]:
    """Every way to write one language; names that NumPy would change (trailing zeros) are left to Python."""
    by_name = [name, name.encode()]
    if not name.endswith("\0"):
        by_name += [np.str_(name), np.bytes_(name.encode()), np.array(name), np.array(name.encode())]
    numbers = [index, np.int8(index), np.uint64(index), np.array(index), torch.tensor(index)]
    return by_name + numbers + [torch.tensor(index, dtype=torch.uint8)]


@given(names, st.data())
def test_every_spelling_is_the_same_language(languages: list[str], data: st.DataObject) -> None:
    table = LanguageTable(languages)
    index = data.draw(st.integers(0, len(languages) - 1))
    for value in spellings(languages[index], index):
        assert table.index(value) == index, repr(value)
        assert table.index_of_batch(value) == index
        assert table.index_of_batch([value, value]) == table.index_of_batch((value,)) == index


@given(names, st.lists(st.integers(0, 5), min_size=1))
def test_a_column_is_its_values_row_by_row(languages: list[str], rows: list[int]) -> None:
    indices = [row % len(languages) for row in rows]
    values = [*languages, "no language, and no row has it"]
    found = LanguageTable(languages).column(values, np.array(indices), "here")
    assert found.tolist() == indices


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.True_,
        torch.tensor(True),
        1.0,
        np.float32(1),
        torch.tensor(1.0),
        None,
        -1,
        2,
        "0",
        b"\xff",
        "DE",
        [],
        {},
    ],
)
def test_what_is_no_language(value: object) -> None:
    table = LanguageTable(["de", "fr"])
    with pytest.raises(LanguageError, match=r"language .*(expected a name, or an index from 0 to 1|is not in)"):
        table.index(value)
    with pytest.raises(ConfigError, match="column x, row 3: language"):
        table.column(["de", value], np.array([0, 0, 0, 1]), "column x")


def test_numbers_of_classes_are_indices_of_languages() -> None:
    table = LanguageTable(["de", "fr"])
    table.check_classes(["de", "fr", "ko"], [0, 1], "c")
    table.check_classes(["fr", "de"], [], "c")
    table.check_classes(["de", "ko", "fr"], [0, -1, 7], "c")
    for classes, used in ((["fr", "de"], [0]), (["ko", "de", "fr"], [2]), (["de", "ko", "fr"], [0, 2])):
        with pytest.raises(ConfigError, match="with_mapping"):
            table.check_classes(classes, used, "c")
    with pytest.raises(ConfigError, match=r'"fr_", number 1 of its ClassLabel, is not in .*did you mean "fr"'):
        table.check_classes(["de", "fr_"], [1], "c")
