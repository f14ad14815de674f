"""A small multilingual text without apt: the message catalogues of Django's wheel (98 locales, BSD-3-Clause).

    root = fetch(cache)                # an installed Django, or its wheel through pip
    corpus = read(root, ["de", "ko"])  # the English messages come along as "en"

Much less and much choppier than `gnome`: 6 to 31 kB a language, sentences of a user interface with their
`%(placeholders)s` kept as they are. It shows that training works; it does not tell which method is better.
"""

import importlib.metadata
import importlib.util
import struct
from collections.abc import Sequence
from pathlib import Path

from bucketmoo_ds.apps.corpus import wheels
from bucketmoo_ds.apps.corpus.fetching import CorpusUnavailable, fetch_once
from bucketmoo_ds.apps.corpus.pages import ENGLISH, Corpus, Page, check_languages

PACKAGE = "Django"
LICENCE = "BSD-3-Clause"

# Characters of the English message, so that the choice is the same in every language.
MIN_MESSAGE_CHARACTERS = 25
MESSAGES_A_PAGE = 16


def fetch(cache: Path) -> Path:
    """Find an installed Django, or download and unpack its wheel below `cache`; a second call downloads nothing.

    Returns:
        Folder that holds the package `django`.

    Raises:
        CorpusUnavailable: pip is missing, fails or takes too long.
    """
    installed = importlib.util.find_spec("django")
    if installed is not None and installed.origin is not None:
        return Path(installed.origin).parent.parent
    return fetch_once(cache / "django", lambda folder: wheels.unpack([PACKAGE], folder))


def version(root: Path) -> str:
    """Version of the Django at `root`."""
    found = next(iter(importlib.metadata.distributions(name=PACKAGE, path=[str(root)])), None)
    if found is None:
        raise CorpusUnavailable(f"{root} holds no metadata of {PACKAGE}; remove the folder to fetch it again")
    return found.version


def locales(root: Path) -> list[str]:
    """Languages at `root`, sorted."""
    return sorted({catalogue.parts[-3] for catalogue in _catalogues(root)})


def read(root: Path, languages: Sequence[str] | None = None) -> Corpus:
    """Read translated messages.

    A page is a run of `MESSAGES_A_PAGE` messages of one application in alphabetical order of the English: similar
    messages share a page, so that holding out a page holds out its near-doubles too. A message with plural forms
    gives its last form. Messages whose translation equals the English one are dropped.

    Args:
        root: what `fetch` returned.
        languages: locale names, default all. English is always returned too, first.

    Raises:
        ConfigError: a language is not in Django.
    """
    available = locales(root)
    check_languages(languages, available, PACKAGE)

    translations: dict[tuple[str, str], dict[str, str]] = {}
    messages: dict[str, set[str]] = {}
    for path in _catalogues(root):
        application = f"{path.parents[3].name}/{path.stem}"
        catalogue = {k: v for k, v in parse_mo(path.read_bytes()).items() if len(k) >= MIN_MESSAGE_CHARACTERS}
        translations[path.parts[-3], application] = catalogue
        messages.setdefault(application, set()).update(catalogue)

    wanted = dict.fromkeys([ENGLISH, *(available if languages is None else languages)])
    corpus: Corpus = {language: [] for language in wanted}
    for application in sorted(messages):
        ordered = sorted(messages[application])
        for start in range(0, len(ordered), MESSAGES_A_PAGE):
            english = ordered[start : start + MESSAGES_A_PAGE]
            for language in wanted:
                translated = translations.get((language, application), {})
                found = english if language == ENGLISH else [translated.get(message, message) for message in english]
                paragraphs = tuple(
                    text for text, message in zip(found, english, strict=True) if language == ENGLISH or text != message
                )
                if paragraphs:
                    corpus[language].append(Page(f"{application}/{start // MESSAGES_A_PAGE:03}", language, paragraphs))
    return corpus


def _catalogues(root: Path) -> list[Path]:
    return sorted((root / "django").glob("**/locale/*/LC_MESSAGES/*.mo"))


def parse_mo(data: bytes) -> dict[str, str]:
    """Messages of a compiled catalogue (GNU gettext manual, "The Format of GNU MO Files"), white space folded.

    Context and plural of the original are cut off, the header (original `""`) and empty translations are left out.

    Raises:
        ValueError: `data` is not a catalogue.
    """
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(data[:4])
    if order is None:
        raise ValueError(f"not a compiled message catalogue: it starts with {data[:4]!r}")
    count, originals, translations = struct.unpack_from(f"{order}3I", data, 8)

    def string(table: int, index: int) -> str:
        length, offset = struct.unpack_from(f"{order}2I", data, table + 8 * index)
        return data[offset : offset + length].decode("utf-8")

    messages = {}
    for index in range(count):
        original = " ".join(string(originals, index).rpartition("\x04")[2].partition("\0")[0].split())
        translation = " ".join(string(translations, index).rpartition("\0")[2].split())
        if original and translation:
            messages[original] = translation
    return messages
