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

from bucketmoo_ds.apps.corpus.fetching import CorpusUnavailable, fetch_once, require_programs, run_command
from bucketmoo_ds.apps.corpus.pages import ENGLISH, Corpus, Page, check_languages

PACKAGE = "gnome-user-docs"
LICENCE = "CC-BY-SA-3.0"

_ENGLISH_LOCALE = "C"
_HELP = Path("usr/share/help")
_VERSION_FILE = "version.json"

# Seconds. A cold `apt-get update` moves about 10 MB, the package is 8.5 MB.
_UPDATE_TIMEOUT = 300
_DOWNLOAD_TIMEOUT = 300
_UNPACK_TIMEOUT = 120

# Some derivatives of Debian move the translations to other packages; a handful of locales is not this corpus.
_MIN_LOCALES = 20

# UTF-8 bytes. Below it are labels ("Note", "Bluetooth") and key names, not prose. Bytes, not characters, so that
# Chinese, Korean and Japanese, short in characters, do not lose whole sentences.
MIN_PARAGRAPH_BYTES = 20

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
    require_programs("apt-get", "dpkg-deb")
    work = folder.with_name("apt")
    for part in ("lists/partial", "archives/partial", "state"):
        (work / part).mkdir(parents=True)
    config = work / "apt.conf"
    config.write_text(_APT_CONFIG.format(work=work), encoding="utf-8")
    apt = ["apt-get", "-c", str(config), "--quiet", "--yes"]
    env = {"LC_ALL": "C.UTF-8"}
    update_problem = ""
    try:
        run_command("apt-get update", [*apt, "update"], _UPDATE_TIMEOUT, env=env)
    except CorpusUnavailable as problem:
        # A third-party source that is down fails the update; the package may be there all the same.
        update_problem = f"; before that {problem}"
    try:
        run_command("apt-get download", [*apt, "download", PACKAGE], _DOWNLOAD_TIMEOUT, cwd=work, env=env)
    except CorpusUnavailable as problem:
        raise CorpusUnavailable(f"{PACKAGE}: {problem}{update_problem}") from problem

    archives = sorted(work.glob(f"{PACKAGE}_*.deb"))
    if len(archives) != 1:
        raise CorpusUnavailable(f"{PACKAGE}: apt-get download left {[a.name for a in archives]}, expected one .deb")
    run_command("dpkg-deb -x", ["dpkg-deb", "-x", str(archives[0]), str(folder)], _UNPACK_TIMEOUT)
    found = run_command("dpkg-deb -f", ["dpkg-deb", "-f", str(archives[0]), "Version"], _UNPACK_TIMEOUT).strip()
    (folder / _VERSION_FILE).write_text(json.dumps({"package": PACKAGE, "version": found}), encoding="utf-8")
    if (count := len(locales(folder))) < _MIN_LOCALES:
        raise CorpusUnavailable(
            f"{PACKAGE} {found} has {count} locales here, expected at least {_MIN_LOCALES}, as Debian's has"
        )


# Dropping to the user _apt, as apt does under root, would lock it out of a cache below /root. The hooks of the system
# (clean-up, refresh of software centres) write to the system, so they are cleared.
_APT_CONFIG = """\
Dir::State "{work}/state";
Dir::State::lists "{work}/lists";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "{work}";
Dir::Cache::archives "{work}/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Log "{work}";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
APT::Update::Error-Mode "any";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets::deb::DEP-11;
"""


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
        Pages sorted by id. Page ids are `<book>/<name>`, the same in all languages. Whitespace is folded; paragraphs
        shorter than `MIN_PARAGRAPH_BYTES`, and in a translation those equal to an English one, are dropped, and pages
        left empty with them.

    Raises:
        ConfigError: a language is not in the package.
    """
    available = locales(root)
    check_languages(languages, available, PACKAGE)
    # Short English paragraphs count too: a short label in English is still no translation.
    original = {paragraph for _, paragraphs in _read_locale(root, ENGLISH) for paragraph in paragraphs}
    wanted = dict.fromkeys([ENGLISH, *(available if languages is None else languages)])
    corpus: Corpus = {}
    for language in wanted:
        corpus[language] = [
            Page(page_id, language, kept)
            for page_id, paragraphs in _read_locale(root, language)
            if (
                kept := tuple(
                    paragraph
                    for paragraph in paragraphs
                    if len(paragraph.encode()) >= MIN_PARAGRAPH_BYTES
                    and (language == ENGLISH or paragraph not in original)
                )
            )
        ]
    return corpus


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
