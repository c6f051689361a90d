"""The page holds what it was given, escaped, and loads nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from emendo.data import Probe, Record
from emendo.errors import StorageError
from emendo.report import plots
from emendo.report.html import render_report, write_report
from evaluate.samples import edit, evaluation, history, rows

NASTY = '<script>alert("x")</script> & $5 {{ 7 * 7 }}'
INFO = {
    "title": "A report",
    "command": "emendo demo --out runs/demo",
    "seed": 0,
    "versions": {"torch": "2.13.0", "emendo": "0.1.0"},
    "seconds": 12.34567,
}
VOID = {"meta", "br", "input", "col"}


class Balanced(HTMLParser):
    """Fails on a tag that is not closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> str:
    """The page's text."""
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    return parser.text


@cache
def full(prompt: str = "The capital of Bade is") -> str:
    return render_report(
        info={**INFO, "note": prompt},
        evaluation=evaluation(prompt=prompt, text_after=prompt),
        edit=edit(prompt, prompt),
        rows=rows(prompt, prompt),
        norms={prompt: 0.01},
        history=history(),
    )


def test_the_page_holds_what_it_was_given() -> None:
    text = read(full())
    for wanted in (
        "A report",
        "emendo demo --out runs/demo",
        "2.13.0",
        "versions: torch",
        "12.35",
        "0.500",  # edit success
        "0.000 to 1.000",  # its interval
        "one at a time",  # the protocol
        "0.125 s",
        "The capital of Bade is",
        "Edited prompt",
        "Near neighbour",
        "75%",
        "0.1% → 90%",
    ):
        assert wanted in text, wanted


def test_nothing_is_loaded_from_anywhere() -> None:
    page = full()
    assert "//" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"\bsrc=|@import|url\((?!#)|<link|<iframe|<img", page)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert page.count("<script>") == 1


def test_everything_is_escaped() -> None:
    page = full(NASTY)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "{{ 7 * 7 }}" in read(page)
    assert page.count("<script>") == 1


class Structure(HTMLParser):
    """The tags of a page with their attributes, and the markup that is no tag."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[object] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        links = [value for name, value in attrs if name in ("href", "src", "style") or name.startswith("on")]
        self.found.append((tag, [name for name, _ in attrs], links))

    def handle_comment(self, data: str) -> None:
        self.found.append("comment")  # matplotlib's, with the text of a label

    handle_decl = handle_pi = unknown_decl = handle_comment


def structure(text: str) -> list[object]:
    """The structure of a page in which every text that data can bring is this one."""
    found = evaluation(prompt=text, answer=text, text_before=text, text_after=text, other=text)
    record = Record(
        text, text, text, text, "id" + text, (text,), (Probe(text, text),), (Probe(text, text),), text
    )
    found = replace(
        found,
        results=tuple(replace(result, record=record) for result in found.results),
        protocol=dict.fromkeys(found.protocol, text),
    )
    page = render_report(
        info={"title": text, "command": text, "model": text, "b": {"c": text}, "d": [text]},
        evaluation=found,
        edit=edit(text, text),
        rows=[replace(row, target=text, answer=text) for row in rows(text, text)],
        norms={text: 0.01},
        history=history(),
    )
    parser = Structure()
    parser.feed(page)
    return [one for one in parser.found if not (isinstance(one, tuple) and one[0] in SHAPES)]


SHAPES = ("path", "use", "defs", "clippath", "rect", "g")  # how a plot draws the letters of a text


HOSTILE = (
    NASTY,
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</td></table></script><script>alert(1)</script>",
    "<!-- ",
    "]]><![CDATA[",
    "javascript:alert(1)",
    "&lt;b&gt; &#60;b&#62;",
    "{% include 'report.html.j2' %}{{ info }}",
    "</style><style>*{background:url(https://x.org)}",
)


@pytest.mark.slow
def test_no_text_adds_to_the_structure_of_a_page() -> None:
    assert structure(" ".join(HOSTILE)) == structure("word")


def test_plots_take_the_pages_colour() -> None:
    page = full()
    assert "currentColor" in page
    assert page.count("<svg") == 6


@pytest.mark.parametrize(
    "part",
    [
        {},
        {"evaluation": evaluation()},
        {"evaluation": evaluation(generated=False)},
        {"rows": rows()},
        {"edit": edit(), "rows": rows(), "norms": {"a": 0.1}},
        {"history": history()},
    ],
)
def test_what_is_not_given_is_left_out(part: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "render", lambda figure, image: b"<svg></svg>")
    page = render_report(info={"model": "tiny"}, **part)  # type: ignore[arg-type]
    text = read(page)
    assert "None" not in text
    assert ("Before and after" in text) == ("rows" in part)
    assert ("Every fact" in text) == ("evaluation" in part)
    assert ("Training" in text) == ("history" in part)


def test_the_file_is_the_page(tmp_path: Path) -> None:
    write_report(tmp_path / "runs" / "report.html", info=INFO)
    assert (tmp_path / "runs" / "report.html").read_text(encoding="utf-8") == render_report(info=INFO)


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(tmp_path / "file" / "report.html", info=INFO)
