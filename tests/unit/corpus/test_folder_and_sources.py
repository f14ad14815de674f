"""The user's folder, and which source the quickstart ends up with."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from bucketmoo_ds.apps.corpus import django, folder, gnome, sources
from bucketmoo_ds.apps.corpus.fetching import CorpusUnavailable
from bucketmoo_ds.apps.corpus.pages import Page, fingerprint
from bucketmoo_ds.errors import ConfigError


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_files_are_pages_and_blank_lines_separate_paragraphs(tmp_path: Path) -> None:
    write(tmp_path / "de/b/news.txt", "Erster\nAbsatz.\n\n \n\nZweiter Absatz.\n")
    write(tmp_path / "de/a.txt", "\ufeffGruß")
    write(tmp_path / "de/empty.txt", "\n \n")
    write(tmp_path / "de/picture.png", "no text")
    assert folder.read(tmp_path) == {
        "de": [Page("a", "de", ("Gruß",)), Page("b/news", "de", ("Erster\nAbsatz.", "Zweiter Absatz."))]
    }


@pytest.mark.parametrize("separator", ["\n\n", "\n"], ids=["blank lines", "a sentence a line"])
def test_one_file_is_split_into_pages_and_nothing_is_lost(tmp_path: Path, separator: str) -> None:
    sentences = [f"Sentence {number}: {'x' * (number * 37 % 300)}." for number in range(200)]
    write(tmp_path / "en.txt", separator.join(sentences))
    pages = folder.read(tmp_path)["en"]
    assert [paragraph for page in pages for paragraph in page.paragraphs] == sentences
    assert len({page.id for page in pages}) == len(pages) > 10
    assert all(1600 < sum(map(len, page.paragraphs)) <= 2000 for page in pages[:-1])


def test_errors_name_the_folder_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        folder.read(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no text; expected"):
        folder.read(tmp_path)
    write(tmp_path / "fr.txt", " \n")
    with pytest.raises(ConfigError, match="language 'fr' are empty"):
        folder.read(tmp_path)
    with pytest.raises(ConfigError, match=r'language \'fra\'.*did you mean "fr"\?'):
        folder.read(tmp_path, ["fra"])
    (tmp_path / "ru.txt").write_bytes("да".encode("cp1251"))
    with pytest.raises(ConfigError, match=r"ru\.txt is not UTF-8 text \(byte 0\)"):
        folder.read(tmp_path, ["ru"])
    write(tmp_path / "fr/a.txt", "oui")
    with pytest.raises(ConfigError, match="'fr' is there as a folder and as a file"):
        folder.read(tmp_path)


def test_a_folder_of_the_user_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "de.txt", "Guten Tag")
    corpus, provenance = sources.quickstart_corpus(tmp_path, tmp_path / "cache")
    assert list(corpus) == ["de"]
    assert provenance == sources.Provenance(str(tmp_path), "", "", fingerprint(corpus))


def unavailable(name: str) -> Callable[[Path], Path]:
    def fetch(cache: Path) -> Path:
        raise CorpusUnavailable(f"{name} is down")

    return fetch


def test_django_stands_in_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in = {"en": [Page("a", "en", ("words",))]}
    monkeypatch.setattr(gnome, "fetch", unavailable("gnome"))
    monkeypatch.setattr(django, "fetch", lambda cache: cache)
    monkeypatch.setattr(django, "version", lambda root: "5.2")
    monkeypatch.setattr(django, "read", lambda root, languages: stand_in)
    with caplog.at_level(logging.WARNING):
        corpus, provenance = sources.quickstart_corpus(None, tmp_path)
    assert corpus is stand_in
    assert provenance == sources.Provenance("Django", "5.2", "BSD-3-Clause", fingerprint(stand_in))
    assert "gnome is down" in caplog.text and "Django" in caplog.text


def test_no_source_at_all_gives_all_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gnome, "fetch", unavailable("gnome"))
    monkeypatch.setattr(django, "fetch", unavailable("django"))
    with pytest.raises(CorpusUnavailable, match=r"gnome is down; django is down\. Name a folder"):
        sources.quickstart_corpus(None, tmp_path)
