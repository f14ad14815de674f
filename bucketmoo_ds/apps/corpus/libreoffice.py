"""Translated manuals of some length in 35 languages: LibreOffice's help, Debian's `libreoffice-help-<lang>` (MPL-2.0).

    root = fetch(cache, ["de", "ko"])      # English, the original, comes along as "en"
    corpus = read(root, ["de", "ko"])

Pages are HTML, `usr/share/libreoffice/help/<lang>/text/<module>/<name>.html`, the same names in all languages.
Translations are made paragraph by paragraph: what still stands in English is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

from bucketmoo_ds.apps.corpus import debian
from bucketmoo_ds.apps.corpus.fetching import fetch_once
from bucketmoo_ds.apps.corpus.pages import ENGLISH, Corpus, translated

NAME = "libreoffice-help"
LICENCE = "MPL-2.0"

_ENGLISH_PACKAGE = "en-us"
_ENGLISH_FOLDER = "en-US"
_VERSION_FILE = "version.json"
_SPACE = re.compile(r"\s+")
# The page's own text stands in elements of these kinds that have an id of the translators' (par_id..., hd_id...).
_BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6"}
_VOID = {"br", "hr", "img", "input", "link", "meta", "base"}


def fetch(cache: Path, languages: Sequence[str]) -> Path:
    """Downloads and unpacks the packages of some languages below `cache`; a second call for them does nothing.

    Raises:
        CorpusUnavailable: apt or dpkg-deb is missing, fails or takes too long.
    """
    wanted = sorted({language for language in languages if language != ENGLISH})

    def fill(folder: Path) -> None:
        packages = [f"{NAME}-{language.lower().replace('_', '-')}" for language in (_ENGLISH_PACKAGE, *wanted)]
        versions = debian.unpack(packages, folder)
        (folder / _VERSION_FILE).write_text(json.dumps(versions), encoding="utf-8")

    return fetch_once(cache / f"{NAME}-{'-'.join(wanted)}", fill)


def version(root: Path) -> str:
    """Version of the packages unpacked at `root`."""
    return ", ".join(sorted(set(json.loads((root / _VERSION_FILE).read_text(encoding="utf-8")).values())))


def read(root: Path, languages: Sequence[str]) -> Corpus:
    """Returns the translated pages of some languages, sorted by id, and the English ones first; see
    `pages.translated` for what is left out."""
    original = dict(_read_language(root, ENGLISH))
    return {
        language: translated(language, _read_language(root, language), original)
        for language in dict.fromkeys([ENGLISH, *languages])
    }


def _read_language(root: Path, language: str) -> Iterator[tuple[str, list[str]]]:
    name = _ENGLISH_FOLDER if language == ENGLISH else language.replace("_", "-")
    folder = root / "usr/share/libreoffice/help" / name / "text"
    for path in sorted(folder.rglob("*.html")):
        yield str(path.relative_to(folder).with_suffix("")), page_paragraphs(path.read_text(encoding="utf-8"))


def page_paragraphs(html: str) -> list[str]:
    """Returns the paragraphs of one page in reading order, white space folded to single spaces.

    Variants for another operating system, which the page hides until it knows the reader's, are left out.
    """
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.paragraphs


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._text: list[str] | None = None  # of the paragraph that is being read
        self._hidden: list[bool] = []  # of the elements inside of it, outermost first

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if self._text is None:
            if tag in _BLOCKS and str(given.get("id", "")).startswith(("par_", "hd_")):
                self._text, self._hidden = [], []
        elif tag in _VOID:
            self._text.append(" ")
        else:
            other_system = "hidden" in given and not str(given.get("id", "")).startswith("default")
            self._hidden.append(other_system or any(self._hidden))

    def handle_endtag(self, tag: str) -> None:
        if self._text is None or tag in _VOID:
            return
        if self._hidden:
            self._hidden.pop()
            return
        if text := _SPACE.sub(" ", "".join(self._text)).strip():
            self.paragraphs.append(text)
        self._text = None

    def handle_data(self, data: str) -> None:
        if self._text is not None and not any(self._hidden):
            self._text.append(data)
