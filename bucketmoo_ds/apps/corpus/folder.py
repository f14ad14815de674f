"""Text of the user's own: a folder with text files of each language.

    FOLDER/de/letters.txt, FOLDER/de/2023/news.txt    each file is a page; files of one name correspond across languages
    FOLDER/de.txt                                     split into pages of about 2,000 characters

Both forms may stand side by side, for different languages. Paragraphs are separated by blank lines.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from bucketmoo_ds.apps.corpus.pages import Corpus, Page, check_languages
from bucketmoo_ds.errors import ConfigError

PAGE_CHARACTERS = 2000

_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")


def locales(folder: Path) -> list[str]:
    """Languages for which `folder` has text files, sorted.

    Raises:
        ConfigError: no such folder, no language in it, or a language in both forms.
    """
    if not folder.is_dir():
        raise ConfigError(f"data = {str(folder)!r}: no such folder")
    nested = {path.name for path in folder.iterdir() if path.is_dir() and any(path.rglob("*.txt"))}
    single = {path.stem for path in folder.glob("*.txt")}
    if both := sorted(nested & single):
        raise ConfigError(f"data = {str(folder)!r}: {both[0]!r} is there as a folder and as a file; keep one of them")
    if not nested | single:
        raise ConfigError(
            f"data = {str(folder)!r}: holds no text; expected LANGUAGE/*.txt or LANGUAGE.txt, such as de/news.txt"
        )
    return sorted(nested | single)


def read(folder: Path, languages: Sequence[str] | None = None) -> Corpus:
    """Read a folder of text by language.

    Args:
        folder: see the module's own text.
        languages: names as in the folder, default all.

    Returns:
        Pages sorted by id. Line breaks inside a paragraph stay.

    Raises:
        ConfigError: the folder or a language is missing, a language has no text, or a file is not UTF-8.
    """
    available = locales(folder)
    check_languages(languages, available, str(folder))
    corpus: Corpus = {}
    for language in available if languages is None else dict.fromkeys(languages):
        single = folder / f"{language}.txt"
        corpus[language] = (
            _split_file(single, language) if single.is_file() else _read_files(folder / language, language)
        )
        if not corpus[language]:
            raise ConfigError(f"data = {str(folder)!r}: the files of language {language!r} are empty")
    return corpus


def _read_files(folder: Path, language: str) -> list[Page]:
    pages = []
    for path in sorted(folder.rglob("*.txt")):
        if paragraphs := _paragraphs(path):
            pages.append(Page(path.relative_to(folder).with_suffix("").as_posix(), language, tuple(paragraphs)))
    return pages


def _split_file(path: Path, language: str) -> list[Page]:
    pages: list[Page] = []
    page: list[str] = []
    for piece in [piece for paragraph in _paragraphs(path) for piece in _shorten(paragraph)]:
        if page and sum(map(len, page)) + len(piece) > PAGE_CHARACTERS:
            pages.append(Page(f"part-{len(pages):06}", language, tuple(page)))
            page = []
        page.append(piece)
    if page:
        pages.append(Page(f"part-{len(pages):06}", language, tuple(page)))
    return pages


def _shorten(paragraph: str) -> list[str]:
    """Cut a paragraph longer than a page at its line ends: many corpora have one sentence a line and no blank line."""
    return [paragraph] if len(paragraph) <= PAGE_CHARACTERS else [line for line in paragraph.splitlines() if line]


def _paragraphs(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"data: {path} is not UTF-8 text (byte {error.start}); convert it") from error
    return [paragraph.strip() for paragraph in _BLANK_LINES.split(text) if paragraph.strip()]
