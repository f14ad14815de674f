"""The GNOME guides: the parser on small pages, the fetch's failures, and the real package where there is one."""

import random
from pathlib import Path

import pytest
from draw import SEED

from bucketmoo_ds.apps.corpus import debian, gnome, pages, sources, tokenizer
from bucketmoo_ds.apps.corpus.fetching import CorpusUnavailable, fetch_once, run_command
from bucketmoo_ds.errors import ConfigError

MALLARD = """<?xml version="1.0" encoding="utf-8"?>
<page xmlns="http://projectmallard.org/1.0/" type="topic" id="sound">
  <info>
    <link type="guide" xref="media"/>
    <credit type="author"><name>An Author</name><email>author@example.org</email></credit>
    <include xmlns="http://www.w3.org/2001/XInclude" href="legal.xml"/>
    <desc>{desc}</desc>
    <mal:credit xmlns:mal="http://projectmallard.org/1.0/"><mal:name>A Translator</mal:name></mal:credit>
    <license><p>A licence is no prose of the page.</p></license>
  </info>
  <!-- <p>An XML comment is not for readers.</p> -->
  <title>{title}</title>
  <comment><cite>editor</cite><p>An editorial comment is not for readers either.</p></comment>
  <p>{first}</p>
  <steps><item><p>{second}</p></item></steps>
  <terms><item><title>Ok</title><p>{third}</p></item></terms>
  <screen><output>$ pactl list short sinks and so on</output></screen>
</page>
"""
ENGLISH = {
    "desc": "The description in the head.",
    "title": "Change the sound volume",
    "first": "Open the <gui>Activities</gui>\n   overview and <em>start</em> typing.",
    "second": "This step was left in English.",
    "third": "Turn the volume up or down.",
}
GERMAN = ENGLISH | {
    "title": "Die Lautstärke ändern",
    "first": "Öffnen Sie die <gui>Aktivitäten</gui>\n\t-Übersicht.",
    "third": "Stellen Sie sie lauter\u00a0: oder leiser.",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for locale, words in (("C", ENGLISH), ("de", GERMAN)):
        folder = tmp_path / "usr/share/help" / locale / "guide"
        folder.mkdir(parents=True)
        (folder / "sound.page").write_text(MALLARD.format(**words), encoding="utf-8")
        (folder / "legal.xml").write_text("<license/>")
    return tmp_path


def test_prose_in_order_without_credits_comments_and_code() -> None:
    assert gnome.page_paragraphs(MALLARD.format(**ENGLISH)) == [
        "Change the sound volume",
        "Open the Activities overview and start typing.",
        "This step was left in English.",
        "Ok",
        "Turn the volume up or down.",
    ]


def test_untranslated_and_short_paragraphs_are_dropped_and_no_break_spaces_kept(root: Path) -> None:
    corpus = gnome.read(root, ["de"])
    assert list(corpus) == ["en", "de"]
    assert [page.id for page in corpus["en"]] == [page.id for page in corpus["de"]] == ["guide/sound"]
    assert corpus["de"][0].paragraphs == (
        "Die Lautstärke ändern",
        "Öffnen Sie die Aktivitäten -Übersicht.",
        "Stellen Sie sie lauter\u00a0: oder leiser.",
    )
    assert "Ok" not in corpus["en"][0].paragraphs
    assert gnome.read(root)["de"] == corpus["de"]


def test_unknown_language_is_named(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"language 'dee': not in gnome-user-docs; did you mean \"de\"\?"):
        gnome.read(root, ["dee"])


def test_fetch_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CorpusUnavailable, match="apt-get is not installed here"):
        gnome.fetch(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir()), "a failed fetch must leave nothing behind"


def test_fetch_reports_what_apt_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in (("apt-get", "echo no such suite >&2; exit 100"), ("dpkg-deb", "exit 0")):
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    with pytest.raises(CorpusUnavailable, match=r"exit status 100: no such suite.*before that `apt-get update`"):
        gnome.fetch(tmp_path / "cache")


def test_a_command_that_hangs_is_killed_with_its_children() -> None:
    with pytest.raises(CorpusUnavailable, match=r"`sleeper` took longer than"):
        run_command("sleeper", ["sh", "-c", "sleep 60 & sleep 60"], timeout=0.2)


def test_fetch_once_is_atomic_and_does_nothing_twice(tmp_path: Path) -> None:
    target, calls = tmp_path / "cache" / "it", []

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise CorpusUnavailable("interrupted")

    def fill(folder: Path) -> None:
        calls.append(folder)
        (folder / "whole").write_text("")

    with pytest.raises(CorpusUnavailable):
        fetch_once(target, fail)
    assert not target.exists()
    assert fetch_once(target, fill) == fetch_once(target, fill) == target
    assert len(calls) == 1
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert [path.name for path in target.parent.iterdir()] == ["it"]


def test_fetch_once_keeps_what_another_process_has_finished_first(tmp_path: Path) -> None:
    target = tmp_path / "it"

    def overtaken(folder: Path) -> None:
        (folder / "ours").write_text("")
        target.mkdir()
        (target / "theirs").write_text("")

    fetch_once(target, overtaken)
    assert [path.name for path in target.iterdir()] == ["theirs"]


@pytest.fixture(scope="module")
def real_root(request: pytest.FixtureRequest) -> Path:
    """The package, from pytest's cache or fetched; skips, with the reason, where it cannot be fetched."""
    with pytest.MonkeyPatch.context() as patch:
        # Shorter than the test's own limit, so that a network that hangs is a skip.
        patch.setattr(debian, "_UPDATE_TIMEOUT", 45)
        patch.setattr(debian, "_DOWNLOAD_TIMEOUT", 45)
        try:
            return gnome.fetch(Path(request.config.cache.mkdir("corpus")))
        except CorpusUnavailable as problem:
            pytest.skip(f"gnome-user-docs cannot be fetched here: {problem}")


@pytest.mark.timeout(120)
def test_the_real_package_has_translations_only_and_enough(real_root: Path) -> None:
    corpus = gnome.read(real_root, [*sources.SEEN_LANGUAGES, *sources.UNSEEN_LANGUAGES])
    parts = pages.split(corpus)
    english = {paragraph for page in corpus["en"] for paragraph in page.paragraphs}
    held_out_ids = {page.id for found in parts.held_out.values() for page in found}
    for language, found in parts.training.items():
        assert not held_out_ids & {page.id for page in found}
        if language != "en":
            assert not english & {paragraph for page in found for paragraph in page.paragraphs}, language
    for language, amount in pages.stats(corpus).items():
        assert amount.bytes > 250_000, (language, amount)
        # Untranslated text would be English by its commonest words; a few names of programs may contain one.
        words = " ".join(page.text for page in corpus[language]).split()
        assert language == "en" or words.count("the") < 1e-3 * len(words), language


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [4, pytest.param(None, marks=pytest.mark.nightly)])
def test_every_locale_round_trips_through_a_tokenizer_that_has_not_seen_it(real_root: Path, number: int | None) -> None:
    """Some of the 42 locales, drawn anew in every run, or all."""
    locales = gnome.locales(real_root)
    assert len(locales) > 40
    corpus = gnome.read(real_root, random.Random(SEED).sample(locales, number) if number else None)
    small = tokenizer.train({"en": [page.text for page in corpus["en"]]}, 600)
    for language, found in corpus.items():
        texts = [page.text for page in found[:20]]
        assert [small.decode(ids) for ids in tokenizer.encode(small, texts)] == texts, f"{language}, seed {SEED}"
