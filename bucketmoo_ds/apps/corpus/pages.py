"""The common currency of all corpora: pages of paragraphs, one list of pages a language.

A page is the unit that is held out. Translations of one page share its id, so that holding out an id keeps every
translation of it away from training.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bucketmoo_ds.errors import ConfigError, did_you_mean

ENGLISH = "en"


@dataclass(frozen=True, slots=True)
class Page:
    """One document in one language.

    Attributes:
        id: name shared by all translations of the page, e.g. `"gnome-help/a11y-bouncekeys"`.
        language: locale name, e.g. `"de"` or `"pt_BR"`.
        paragraphs: text in reading order, none of them empty.
    """

    id: str
    language: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        """The paragraphs, one a line."""
        return "\n".join(self.paragraphs)


Corpus = dict[str, list[Page]]

# UTF-8 bytes. Below it are labels ("Note", "Bluetooth") and key names, not prose. Bytes, not characters, so that
# Chinese, Korean and Japanese, short in characters, do not lose whole sentences.
MIN_PARAGRAPH_BYTES = 20


def translated(
    language: str, pages: Iterable[tuple[str, Sequence[str]]], original: Mapping[str, Sequence[str]]
) -> list[Page]:
    """Returns the pages (id, paragraphs) of one language without what is no prose of it.

    Paragraphs shorter than `MIN_PARAGRAPH_BYTES` are dropped, in a translation also those that the English `original`
    has, which a translator has not come to yet; and pages that are left empty.
    """
    # Short English paragraphs count too: a short label in English is still no translation.
    english = set() if language == ENGLISH else {each for paragraphs in original.values() for each in paragraphs}
    return [
        Page(page_id, language, kept)
        for page_id, paragraphs in pages
        if (kept := tuple(p for p in paragraphs if len(p.encode()) >= MIN_PARAGRAPH_BYTES and p not in english))
    ]


@dataclass(frozen=True, slots=True)
class Split:
    """Training and held-out pages of the same languages; no page id is in both."""

    training: Corpus
    held_out: Corpus


def split(corpus: Corpus, held_out: float = 0.1, seed: int = 0) -> Split:
    """Hold out whole pages: the same page ids in every language.

    Whether a page is held out depends on its id and the seed alone, never on the other pages. Boilerplate that also
    stands in a training page of the same language (a help page opens with the same sentence as its neighbours) is
    dropped from the held-out page, so that no held-out paragraph has been trained on.

    Args:
        corpus: language -> pages.
        held_out: expected share of the pages, in [0, 1).
        seed: another seed holds out other pages.

    Raises:
        ConfigError: `held_out` is out of range, or a language ends with no training or no held-out text.
    """
    if not 0 <= held_out < 1:
        raise ConfigError(f"held_out = {held_out}: expected a share of the pages, 0 <= held_out < 1")
    result = Split({}, {})
    for language, pages in corpus.items():
        training = [page for page in pages if not _is_held_out(page.id, held_out, seed)]
        trained_on = {paragraph for page in training for paragraph in page.paragraphs}
        result.training[language] = training
        result.held_out[language] = [
            replace(page, paragraphs=new)
            for page in pages
            if _is_held_out(page.id, held_out, seed)
            and (new := tuple(paragraph for paragraph in page.paragraphs if paragraph not in trained_on))
        ]
        for part, found in (("training", training), ("held-out", result.held_out[language] or held_out == 0)):
            if not found:
                raise ConfigError(
                    f"held_out = {held_out}: language {language!r} with {len(pages)} pages is left without {part} "
                    "text; give it more pages, or change held_out or the seed"
                )
    return result


def _is_held_out(page_id: str, share: float, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed}:{page_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def texts(corpus: Corpus, languages: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Text of every page by language, for `packing.pack` and `tokenizer.train`; `languages` selects and orders."""
    return {language: [page.text for page in corpus[language]] for language in languages or corpus}


def check_languages(languages: Sequence[str] | None, available: Sequence[str], source: str) -> None:
    """Raise ConfigError for the first wanted language that `source` does not have."""
    for language in languages or ():
        if language not in available:
            raise ConfigError(
                f"language {language!r}: not in {source}{did_you_mean(language, available) or '.'} "
                f"It has: {' '.join(available)}"
            )


@dataclass(frozen=True, slots=True)
class LanguageStats:
    """Amount of text in one language; `bytes` counts the UTF-8 bytes of the paragraphs, without separators."""

    pages: int
    paragraphs: int
    bytes: int


def stats(corpus: Corpus) -> dict[str, LanguageStats]:
    """Pages, paragraphs and bytes of each language."""
    return {
        language: LanguageStats(
            pages=len(pages),
            paragraphs=sum(len(page.paragraphs) for page in pages),
            bytes=sum(len(paragraph.encode()) for page in pages for paragraph in page.paragraphs),
        )
        for language, pages in corpus.items()
    }


def fingerprint(corpus: Mapping[str, Sequence[Page]]) -> str:
    """SHA-256, as hex, of all text with its page ids and languages; independent of the order of the languages."""
    digest = hashlib.sha256()
    for language in sorted(corpus):
        for page in corpus[language]:
            for part in (language, page.id, *page.paragraphs):
                data = part.encode()
                digest.update(len(data).to_bytes(8, "big") + data)
            # A length no part can have closes the page, so that moving a paragraph to the next page is seen.
            digest.update(b"\xff" * 8)
    return digest.hexdigest()
