"""The kit of pages: what is said is escaped, what a page lacks is an error, a page opens offline."""

import sys
from pathlib import Path

import pytest

from zipper import pages
from zipper.environment import MissingExtra

TEMPLATE = (
    '{% extends "page.html" %}{% block main %}<p>{{ said }}</p>{{ drawing | safe }}{% endblock %}'
)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    (tmp_path / "own.html").write_text(TEMPLATE)
    return tmp_path / "own.html"


def test_everything_is_escaped_but_drawings(template: Path) -> None:
    card = pages.Card("<a>", "<b>", "<c>", ["<d>", "<e>"])
    page = pages.render(
        template, title="<f>", about="<g>", cards=[card], said='"<h>"', drawing="<svg></svg>"
    )
    assert not [name for name in "abcdefgh" if f"<{name}>" in page.partition("<body>")[2]]
    assert all(f"&lt;{name}&gt;" in page for name in "abcdefgh")
    assert "&lt;d&gt;<br>&lt;e&gt;" in page
    assert "<svg></svg>" in page


def test_what_a_template_is_not_told_is_an_error(template: Path) -> None:
    with pytest.raises(Exception, match="'drawing' is undefined"):
        pages.render(template, title="", said="")


def test_a_page_is_written_whole_with_its_folder(template: Path, tmp_path: Path) -> None:
    pages.write(tmp_path / "new" / "one.html", template, title="one", said="1", drawing="")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["one.html"]
    page = (tmp_path / "new" / "one.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "<title>one</title>" in page
    assert not [word for word in ("http:", "https:", "src=", "href=", "@import") if word in page]


def test_without_jinja_one_sentence_says_what_to_install(
    template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtra, match="This needs jinja2"):
        pages.render(template, title="", said="", drawing="")


def test_curves_have_a_legend_where_lines_have_names_and_dots_where_a_run_was_resumed() -> None:
    steps = [2, 4, 6]
    named = pages.curves({"loss": {"text": (steps, [3.0, 2.0, 1.0])}}, resumed=[4])
    plain = pages.curves({"loss": {"": (steps, [3.0, 2.0, 1.0])}})
    assert ">text</text>" in named and ">text</text>" not in plain
    assert named.count("stroke-dasharray") > plain.count("stroke-dasharray")
    assert "at the end loss: text 1" in named and pages.INK not in named
