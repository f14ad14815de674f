"""Where the quickstart's text comes from: Debian's GNOME guides, Django's messages, or a folder of the user's."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bucketmoo_ds.apps.corpus import django, folder, gnome
from bucketmoo_ds.apps.corpus.fetching import CorpusUnavailable
from bucketmoo_ds.apps.corpus.pages import Corpus, fingerprint

log = logging.getLogger(__name__)

# The languages with most text in the GNOME guides, in Latin, Cyrillic and Hangul. The unseen ones are for measuring
# what training on the seen ones does to their relatives: pl to cs, uk to ru, sv to de.
SEEN_LANGUAGES = ("de", "fr", "es", "cs", "ru", "ko", "hu", "pt_BR")
UNSEEN_LANGUAGES = ("pl", "uk", "sv")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a report says about the text behind its numbers.

    Attributes:
        source: `"gnome-user-docs"`, `"Django"` or the user's folder.
        version: of the package; empty for a folder.
        licence: SPDX identifier; empty for a folder, whose licence is the user's business.
        fingerprint: SHA-256 of the text itself.
    """

    source: str
    version: str
    licence: str
    fingerprint: str


def quickstart_corpus(
    data: str | Path | None, cache: str | Path, languages: Sequence[str] | None = None
) -> tuple[Corpus, Provenance]:
    """Text in many languages, with its provenance.

    Args:
        data: folder of text by language (see `folder`), or None for text from a package: the GNOME guides, and where
            apt cannot deliver them the messages of Django, with a warning in the log.
        cache: folder where a downloaded package is kept.
        languages: which to read, default all there are. The packages add English ("en") unasked.

    Raises:
        ConfigError: a language or the folder does not exist.
        CorpusUnavailable: no package could be fetched; the message has the reason of each.
    """
    if data is not None:
        corpus = folder.read(Path(data), languages)
        return corpus, Provenance(str(data), version="", licence="", fingerprint=fingerprint(corpus))
    try:
        root = gnome.fetch(Path(cache))
    except CorpusUnavailable as no_gnome:
        log.warning("No text from %s (%s). Using the much smaller messages of Django.", gnome.PACKAGE, no_gnome)
        try:
            root = django.fetch(Path(cache))
        except CorpusUnavailable as no_django:
            raise CorpusUnavailable(
                f"no text to train on: {no_gnome}; {no_django}. Name a folder of your own with `data`"
            ) from no_django
        return _described(django.PACKAGE, django.version(root), django.LICENCE, django.read(root, languages))
    return _described(gnome.PACKAGE, gnome.version(root), gnome.LICENCE, gnome.read(root, languages))


def _described(source: str, version: str, licence: str, corpus: Corpus) -> tuple[Corpus, Provenance]:
    return corpus, Provenance(source, version, licence, fingerprint(corpus))
