"""Splitting, statistics and fingerprints of a corpus."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketmoo_ds.apps.corpus.pages import Page, fingerprint, split, stats, texts
from bucketmoo_ds.errors import ConfigError


def corpus_of(languages: str = "de fr ko", pages: int = 200, seed: int = 0) -> dict[str, list[Page]]:
    draw = random.Random(seed)
    return {
        language: [
            Page(f"book/{number}", language, (f"{language} page {number}", f"random {draw.random()}", "boilerplate"))
            for number in range(pages)
            if draw.random() < 0.8
        ]
        for language in languages.split()
    }


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), share=st.floats(0.1, 0.9))
def test_split_keeps_pages_together(seed: int, share: float) -> None:
    corpus = corpus_of(seed=seed)
    parts = split(corpus, share, seed)
    held_out = {page.id for found in parts.held_out.values() for page in found}
    training = {page.id for found in parts.training.values() for page in found}
    assert not held_out & training
    for language, pages in corpus.items():
        assert {page.id for page in pages} == {p.id for p in parts.training[language] + parts.held_out[language]}
        assert all(page in pages for page in parts.training[language])
        # 160 pages: within five standard deviations of the share, so a sound hash fails once in 10^6 examples.
        expected, spread = share * len(pages), (len(pages) * share * (1 - share)) ** 0.5
        assert abs(len(parts.held_out[language]) - expected) < 5 * spread


def test_split_depends_on_id_and_seed_only() -> None:
    whole, fewer = corpus_of("de"), corpus_of("de", pages=150)
    ids = {page.id for page in split(whole).held_out["de"]}
    assert {page.id for page in split(fewer).held_out["de"]} == ids & {page.id for page in fewer["de"]}
    assert {page.id for page in split(whole, seed=1).held_out["de"]} != ids


def test_no_held_out_paragraph_is_trained_on() -> None:
    parts = split(corpus_of())
    for language, pages in parts.held_out.items():
        trained_on = {paragraph for page in parts.training[language] for paragraph in page.paragraphs}
        assert "boilerplate" in trained_on
        assert not trained_on & {paragraph for page in pages for paragraph in page.paragraphs}


def test_split_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match=r"held_out = 1\.0: expected"):
        split(corpus_of(), 1.0)
    with pytest.raises(ConfigError, match="language 'de' with 1 pages is left without"):
        split({"de": [Page("only", "de", ("text",))]})
    assert split(corpus_of(), 0.0).held_out == {"de": [], "fr": [], "ko": []}


def test_stats_and_texts() -> None:
    corpus = {"ru": [Page("a", "ru", ("да", "no")), Page("b", "ru", ("нет",))]}
    found = stats(corpus)["ru"]
    assert (found.pages, found.paragraphs, found.bytes) == (2, 3, 4 + 2 + 6)
    assert texts(corpus) == {"ru": ["да\nno", "нет"]}


def test_fingerprint_sees_every_change_but_not_the_order_of_languages() -> None:
    base = {"de": [Page("a", "de", ("x", "y")), Page("b", "de", ("z",))], "fr": [Page("a", "fr", ("w",))]}
    assert fingerprint(dict(reversed(base.items()))) == fingerprint(base)
    changed = [
        {**base, "de": [Page("a", "de", ("x",)), Page("b", "de", ("y", "z"))]},
        {**base, "de": [Page("a", "de", ("xy",)), Page("b", "de", ("z",))]},
        {**base, "de": base["de"][::-1]},
        {**base, "fr": [Page("b", "fr", ("w",))]},
        {"de": base["de"], "es": base["fr"]},
    ]
    assert len({fingerprint(base), *map(fingerprint, changed)}) == 1 + len(changed)
