"""Real prose in 42 languages: the GNOME user guides of Debian's package `gnome-user-docs` (CC-BY-SA-3.0).

    root = fetch(cache)              # through the system's own apt sources and keys, without root
    corpus = read(root, ["de", "ko"])  # translated paragraphs; English, the original, comes along as "en"

The guides are Mallard XML, `usr/share/help/<locale>/<book>/<name>.page`. Translations are made message by message, so
a page not yet finished carries English paragraphs: `read` drops every paragraph that the English original also has.
"""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path

from bucketmoo_ds.apps.corpus import debian
from bucketmoo_ds.apps.corpus.fetching import CorpusUnavailable, fetch_once
from bucketmoo_ds.apps.corpus.pages import ENGLISH, Corpus, check_languages, translated

PACKAGE = "gnome-user-docs"
LICENCE = "CC-BY-SA-3.0"

_ENGLISH_LOCALE = "C"
_HELP = Path("usr/share/help")
_VERSION_FILE = "version.json"

# Some derivatives of Debian move the translations to other packages; a handful of locales is not this corpus.
_MIN_LOCALES = 20

# Mallard elements that hold one run of prose, and those whose content is no prose of the page: `info` has credits,
# licence and link titles, `comment` is the editors' own, `screen` and `code` blocks are the same in every language.
_PROSE = {"p", "title", "subtitle", "desc"}
_NOT_PROSE = {"info", "comment", "screen", "code"}
_XML_SPACE = re.compile(r"[ \t\r\n]+")


def fetch(cache: Path) -> Path:
    """Download and unpack the package below `cache`; a second call finds it there and does nothing.

    Uses the system's apt sources and keys, but lists, archives and caches of its own, so it needs no root and leaves
    the system's apt as it is.

    Returns:
        Folder with `usr/share/help` inside.

    Raises:
        CorpusUnavailable: apt or dpkg-deb is missing, fails or takes too long, or the package has no translations.
    """
    return fetch_once(cache / PACKAGE, _download_and_unpack)


def _download_and_unpack(folder: Path) -> None:
    found = debian.unpack([PACKAGE], folder)[PACKAGE]
    (folder / _VERSION_FILE).write_text(json.dumps({"package": PACKAGE, "version": found}), encoding="utf-8")
    if (count := len(locales(folder))) < _MIN_LOCALES:
        raise CorpusUnavailable(
            f"{PACKAGE} {found} has {count} locales here, expected at least {_MIN_LOCALES}, as Debian's has"
        )


def version(root: Path) -> str:
    """Version of the Debian package unpacked at `root`, e.g. `"43.0-2"`."""
    return str(json.loads((root / _VERSION_FILE).read_text(encoding="utf-8"))["version"])


def locales(root: Path) -> list[str]:
    """Languages at `root`, sorted; the original is called `"en"`."""
    names = {path.name for path in (root / _HELP).glob("*") if path.is_dir()}
    return sorted(ENGLISH if name == _ENGLISH_LOCALE else name for name in names)


def read(root: Path, languages: Sequence[str] | None = None) -> Corpus:
    """Read translated pages.

    Args:
        root: what `fetch` returned.
        languages: locale names, default all. English is always read and returned too, first.

    Returns:
        Pages sorted by id. Page ids are `<book>/<name>`, the same in all languages. Whitespace is folded; see
        `pages.translated` for what is left out.

    Raises:
        ConfigError: a language is not in the package.
    """
    available = locales(root)
    check_languages(languages, available, PACKAGE)
    original = dict(_read_locale(root, ENGLISH))
    return {
        language: translated(language, _read_locale(root, language), original)
        for language in dict.fromkeys([ENGLISH, *(available if languages is None else languages)])
    }


def _read_locale(root: Path, language: str) -> Iterator[tuple[str, list[str]]]:
    folder = root / _HELP / (_ENGLISH_LOCALE if language == ENGLISH else language)
    for path in sorted(folder.glob("*/*.page")):
        yield f"{path.parent.name}/{path.stem}", page_paragraphs(path.read_bytes())


def page_paragraphs(mallard: bytes | str) -> list[str]:
    """Prose of one Mallard page in reading order, XML whitespace folded to single spaces.

    No-break spaces stay: they are part of French and other texts. XML comments, credits, licence, editorial comments
    and blocks of code are left out.
    """
    found: list[str] = []
    _collect(ET.fromstring(mallard), found)
    return found


def _collect(element: ET.Element, found: list[str]) -> None:
    tag = element.tag.rpartition("}")[2]
    if tag in _NOT_PROSE:
        return
    if tag in _PROSE:
        if text := _XML_SPACE.sub(" ", "".join(element.itertext())).strip():
            found.append(text)
        return
    for child in element:
        _collect(child, found)
