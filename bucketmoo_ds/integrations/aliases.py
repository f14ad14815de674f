"""Other spellings of a language: ISO 639-1, ISO 639-3, the older codes of 639-2, and the English name, with a script or
a region behind it or not (`de`, `deu`, `ger`, `German`, `deu_Latn`, `de-DE`). A small table; anything else is told."""

from __future__ import annotations

from collections.abc import Sequence

_TABLE = """
af afr afrikaans;am amh amharic;ar ara arb arabic;az aze azerbaijani;be bel belarusian;bg bul bulgarian;
bn ben bengali;bs bos bosnian;ca cat catalan;cs ces cze czech;cy cym wel welsh;da dan danish;de deu ger german;
el ell gre greek;en eng english;es spa spanish;et est estonian;eu eus baq basque;fa fas per persian;fi fin finnish;
fr fra fre french;ga gle irish;gl glg galician;gu guj gujarati;ha hau hausa;he heb hebrew;hi hin hindi;hr hrv croatian;
hu hun hungarian;hy hye arm armenian;id ind indonesian;ig ibo igbo;is isl ice icelandic;it ita italian;ja jpn japanese;
ka kat geo georgian;kk kaz kazakh;km khm khmer;kn kan kannada;ko kor korean;lo lao;lt lit lithuanian;lv lav latvian;
mk mkd mac macedonian;ml mal malayalam;mn mon mongolian;mr mar marathi;ms msa may malay;mt mlt maltese;
my mya bur burmese;ne nep nepali;nl nld dut dutch;no nor norwegian;pa pan punjabi;pl pol polish;pt por portuguese;
ro ron rum romanian;ru rus russian;si sin sinhala;sk slk slo slovak;sl slv slovenian;so som somali;sq sqi alb albanian;
sr srp serbian;sv swe swedish;sw swa swahili;ta tam tamil;te tel telugu;th tha thai;tl tgl tagalog;tr tur turkish;
uk ukr ukrainian;ur urd urdu;uz uzb uzbek;vi vie vietnamese;xh xho xhosa;yo yor yoruba;zh zho chi chinese;zu zul zulu
"""
_CODES = {word: group.split()[0] for group in _TABLE.split(";") for word in group.split()}


def meant(value: str, languages: Sequence[str]) -> list[str]:
    """Returns the languages of a run that a value may be another spelling of. A script or region that only one of the
    two names is no difference."""
    code, rest = _parts(value)
    if code is None:
        return []
    return [
        name
        for name, (other, its_rest) in zip(languages, map(_parts, languages), strict=True)
        if other == code and (rest == its_rest or not rest or not its_rest)
    ]


def _parts(value: str) -> tuple[str | None, str]:
    head, _, rest = value.strip().lower().replace("-", "_").partition("_")
    return _CODES.get(head), rest
