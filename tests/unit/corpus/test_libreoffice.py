"""LibreOffice's help: what of a page is text, and which paragraphs of a translation count."""

from pathlib import Path

from bucketmoo_ds.apps.corpus import libreoffice

PAGE = """<html><head><title>Not text</title></head><body><p>menu of the site, no text</p>
<h1 id="hd_id1"><a name="x"></a>{title}</h1>
<p id="par_id2" class="paragraph">{text} <img src="a.png"/><span hidden="true" id="MAC1" class="MAC">Cmd</span>
<span hidden="true" id="default1"><b>Ctrl</b>-S</span>,<br>now.</p>
<div><p id="par_id3">{second}</p></div>
<p id="bm_id4"></p></body></html>"""


def write(root: Path, language: str, **texts: str) -> None:
    path = root / "usr/share/libreoffice/help" / language / "text/shared/page.html"
    path.parent.mkdir(parents=True)
    path.write_text(PAGE.format(**texts), encoding="utf-8")


def test_paragraphs_of_a_page() -> None:
    found = libreoffice.page_paragraphs(PAGE.format(title="A &amp; B", text="Save  with", second="Then go on."))
    assert found == ["A & B", "Save with Ctrl-S, now.", "Then go on."]


def test_what_is_not_translated_is_dropped(tmp_path: Path) -> None:
    long = "a sentence of more than twenty bytes"
    write(tmp_path, "en-US", title="A long enough English title", text="Press the keys", second=f"Second: {long}")
    write(tmp_path, "pt-BR", title="Um título bastante longo", text="Prima as teclas", second=f"Second: {long}")
    corpus = libreoffice.read(tmp_path, ["pt_BR"])
    (english,), (portuguese,) = corpus["en"], corpus["pt_BR"]
    assert english.id == portuguese.id == "shared/page"
    assert len(english.paragraphs) == 3
    assert portuguese.paragraphs == ("Um título bastante longo", "Prima as teclas Ctrl-S, now.")
