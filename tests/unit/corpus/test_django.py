"""Django's catalogues: the .mo parser against Python's gettext, and pages that correspond across languages."""

import gettext
import io
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketmoo_ds.apps.corpus import django
from bucketmoo_ds.errors import ConfigError


def compile_mo(messages: dict[str, str], order: str = "<") -> bytes:
    """A .mo file with the messages and a header, sorted as the format wants it."""
    items = sorted({"": "Content-Type: text/plain; charset=UTF-8\n", **messages}.items())
    count, texts, tables = len(items), b"", ([], [])
    start = 28 + 16 * count
    for column, table in zip(zip(*items, strict=True), tables, strict=True):
        for text in column:
            table.append((len(text.encode()), start + len(texts)))
            texts += text.encode() + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    return head + b"".join(struct.pack(f"{order}2I", *entry) for table in tables for entry in table) + texts


# No NUL or EOT (they separate plurals and contexts) and no surrogates (not UTF-8).
words = st.text(st.characters(exclude_characters="\0\x04", codec="utf-8"), min_size=1)


@settings(deadline=None)
@given(messages=st.dictionaries(words, words), order=st.sampled_from("<>"))
def test_parser_agrees_with_gettext(messages: dict[str, str], order: str) -> None:
    data = compile_mo(messages, order)
    oracle = gettext.GNUTranslations(io.BytesIO(data))
    expected = {}
    for original in sorted(messages):
        folded, translated = " ".join(original.split()), " ".join(oracle.gettext(original).split())
        if folded and translated:
            expected[folded] = translated
    assert django.parse_mo(data) == expected


def test_contexts_and_plurals() -> None:
    parsed = django.parse_mo(compile_mo({"verb\x04one file": "eine Datei", "%d day\0%d days": "%d Tag\0%d Tage"}))
    assert parsed == {"one file": "eine Datei", "%d day": "%d Tage"}


def test_not_a_catalogue() -> None:
    with pytest.raises(ValueError, match="not a compiled message catalogue"):
        django.parse_mo(b"PK\x03\x04 and more")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    english = [f"The message with number {number:03} is long enough." for number in range(40)]
    german = {text: text.replace("The message", "Die Nachricht") for text in english} | {"Short": "Kurz"}
    german[english[3]] = english[3]
    french = {text: text.replace("The message", "Le message") for text in english[20:]}
    for language, messages in (("en", {}), ("de", german), ("fr", french)):
        folder = tmp_path / "django/conf/locale" / language / "LC_MESSAGES"
        folder.mkdir(parents=True)
        (folder / "django.mo").write_bytes(compile_mo(messages))
    return tmp_path


def test_pages_correspond_and_untranslated_messages_are_dropped(root: Path) -> None:
    corpus = django.read(root)
    assert {language: [len(page.paragraphs) for page in found] for language, found in corpus.items()} == {
        "en": [16, 16, 8],
        "de": [15, 16, 8],
        "fr": [12, 8],
    }
    assert corpus["fr"][0].id == corpus["de"][1].id == corpus["en"][1].id
    number = lambda text: text.split("number")[1].split()[0]  # noqa: E731
    assert {number(t) for t in corpus["fr"][0].paragraphs} < {number(t) for t in corpus["en"][1].paragraphs}
    assert not any("Kurz" in page.text or "The message" in page.text for page in corpus["de"])
    # The pages of a language do not depend on which others are read.
    assert django.read(root, ["fr"])["fr"] == corpus["fr"]


def test_unknown_language(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"language 'pt_Br': not in Django\. It has: de en fr"):
        django.read(root, ["pt_Br"])
