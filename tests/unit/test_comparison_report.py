"""The report of a comparison: that everybody can read it, and that it says what was measured.

The rules are those of WCAG 2.2 that can be read off the page; axe-core in a browser asks for more, by hand.
"""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bakehouse import comparison, comparison_report
from bakehouse.comparison import Candidate, Comparison
from bakehouse.comparison_report import LETTERS, LINES, PALETTES, html, middle, ticks
from tests.support.comparisons import CANDIDATES, FOUR, SLOW, failed, run, sample

VOID = {"meta", "link", "br", "img", "hr", "input"}

ONE = sample(candidates=CANDIDATES[:1], runs=(run("bake", 1, 50.0),), method=())
TWO = sample(
    candidates=(Candidate(path="hybrid", making=()), CANDIDATES[2]),
    runs=(run("hybrid", 1, 50.0), failed("bootstrap", 1, "no"), run("bootstrap", 2, 0.0, SLOW)),
)
FAILED = sample(runs=(failed("bake", 1, "<script>alert(1)</script>"), failed("hybrid", 1, "no", FOUR)))
SAMPLES = {"all": sample(), "one path": ONE, "two paths": TWO, "failed": FAILED}


@dataclass
class Element:
    """An element of a page, with what is in it."""

    tag: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, *tags: str) -> list[Element]:
        """Return the elements with these tags, in their order."""
        return [found for child in self.children for found in child.with_own(*tags)]

    def with_own(self, *tags: str) -> list[Element]:
        return [*([self] if self.tag in tags or not tags else []), *self.all(*tags)]

    @property
    def words(self) -> str:
        return " ".join([self.text.strip(), *(child.words for child in self.children)]).strip()


class Page(HTMLParser):
    """Reads a page, and refuses one whose elements do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open = [Element("page", {})]
        self.feed(text)
        self.close()
        assert len(self.open) == 1, f"{self.open[-1].tag} is not closed"

    @property
    def root(self) -> Element:
        return self.open[0]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


@pytest.fixture(params=SAMPLES)
def made(request: pytest.FixtureRequest) -> Comparison:
    return SAMPLES[request.param]


@pytest.fixture
def text(made: Comparison) -> str:
    return html(made)


@pytest.fixture
def page(text: str) -> Element:
    return Page(text).root


def test_the_page_says_its_language_title_and_width(page: Element, text: str) -> None:
    assert text.startswith("<!DOCTYPE html>")
    assert [one.attributes["lang"] for one in page.all("html")] == ["en"]
    assert page.all("title")[0].words.startswith("slurm: ")
    assert any("width=device-width" in one.attributes.get("content", "") for one in page.all("meta"))
    assert len(page.all("main")) == 1


def test_headings_go_down_one_level_at_a_time(page: Element) -> None:
    levels = [int(one.tag[1]) for one in page.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(one.words for one in page.all("h1", "h2", "h3"))


def test_tables_have_captions_and_headers_with_a_scope(page: Element) -> None:
    tables = page.all("table")
    assert tables
    for table in tables:
        assert table.all("caption")[0].words
        assert all(one.attributes["scope"] in {"col", "row"} and one.words for one in table.all("th"))
        columns = len(table.all("thead")[0].all("th"))
        rows = table.all("tbody")[0].all("tr")
        assert rows
        assert all([cell.tag for cell in row.children] == ["th"] + ["td"] * (columns - 1) for row in rows)


def test_what_scrolls_can_be_reached_with_the_keyboard_and_has_a_name(page: Element) -> None:
    regions = [one for one in page.all("div") if one.attributes.get("class") == "wide"]
    assert len(regions) == len(page.all("table"))
    assert all(one.attributes["tabindex"] == "0" and one.attributes["aria-label"] for one in regions)


def test_every_picture_has_its_words(page: Element) -> None:
    ids = {one.attributes["id"]: one for one in page.all() if "id" in one.attributes}
    inner = {id(one) for svg in page.all("svg") for one in svg.all("svg")}
    pictures = [one for one in page.all("svg") if id(one) not in inner]
    assert pictures
    for svg in pictures:
        assert svg.attributes["role"] == "img"
        labels = [ids[name].words for name in svg.attributes.get("aria-labelledby", "").split()]
        assert svg.attributes.get("aria-label") or (len(labels) == 2 and all(labels))
    named = [one.attributes["id"] for one in page.all() if "id" in one.attributes]
    assert len(set(named)) == len(named)


def test_nothing_outside_of_the_page_is_needed(text: str, page: Element) -> None:
    assert not re.search(r"https?:|//|@import|url\(", text)
    assert not page.all("script", "link", "img", "iframe", "object")
    assert not {name for one in page.all() for name in one.attributes if name in {"src", "href"} or name[:2] == "on"}


def test_it_prints(text: str) -> None:
    assert "@media print" in text
    assert "@media screen and (prefers-color-scheme: dark)" in text, "dark is not for paper"


def test_bars_stay_within_the_chart(page: Element) -> None:
    for one in page.all("rect"):
        start, width = (float(one.attributes.get(name, "0").rstrip("%")) for name in ("x", "width"))
        assert start >= 0
        assert width > 0
        assert start + width <= 100.0001


def test_what_people_wrote_is_no_markup() -> None:
    text = html(FAILED)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "apt-get &lt;update&gt; &amp; more" in html(sample())


def test_it_says_what_was_found_what_failed_and_how_it_was_measured() -> None:
    page = Page(html(sample())).root
    words = re.sub(r"\s+", " ", page.words)
    for finding in comparison.findings(sample()):
        assert finding.text in words
    for said in ("These numbers are made up.", "run 1: set-up did not end within 600 s", "Example Processor 9000",
                 "20260102-0123456", "munge", "from 4 boots per rebuild", "emulated"):  # fmt: skip
        assert said in words
    losses = [one.words for one in page.all("li") if one.attributes.get("class") == "loses"]
    assert losses == [one.text for one in comparison.findings(sample()) if one.against_bake]


# Colours -------------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2.2."""
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    least, most = sorted([luminance(one), luminance(other)])
    return (most + 0.05) / (least + 0.05)


def test_contrast_is_computed_as_the_standard_says() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("name", PALETTES)
def test_colours_have_enough_contrast(name: str) -> None:
    palette = PALETTES[name]
    for ink in ("text", "quiet", "bad"):
        assert contrast(palette[ink], palette["page"]) >= 4.5
    for ink in ("rule", *LETTERS.values(), *(colour for colour, _ in LINES.values())):
        assert contrast(palette[ink], palette["page"]) >= 3
    for letter in LETTERS.values():
        assert contrast(palette["on"], palette[letter]) >= 4.5


def test_colours_are_not_all_that_tells_phases_and_paths_apart() -> None:
    assert len(set(LETTERS.values())) == len(comparison.PHASES)
    assert len({dashes for _, dashes in LINES.values()}) == len(comparison.PATHS)


def test_only_colours_of_the_palette_are_used() -> None:
    text = html(sample())
    assert set(re.findall(r"#[0-9a-f]{6}\b", text)) == {one for each in PALETTES.values() for one in each.values()}
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(PALETTES["light"])


# Drawing -------------------------------------------------------------------------------------------------------------


@given(st.floats(min_value=1e-3, max_value=1e7))
def test_marks_of_an_axis_are_few_and_lie_on_it(end: float) -> None:
    found = ticks(end)
    assert found[0].at == 0
    assert 2 <= len(found) <= comparison_report.MOST_TICKS + 1
    assert all(0 <= one.at <= 100.0001 for one in found)
    assert len({one.text for one in found}) == len(found)


def test_long_axes_are_in_minutes() -> None:
    assert [one.text for one in comparison_report.seconds_ticks(599)] == ["0 s", "200 s", "400 s"]
    assert [one.text for one in comparison_report.seconds_ticks(1800)] == ["0 min", "10 min", "20 min", "30 min"]


def test_the_middle_run_is_that_of_the_median() -> None:
    runs = [run("bake", number, seconds) for number, seconds in enumerate((5.0, 9.0, 7.0), 1)]
    assert middle([*runs, failed("bake", 4, "no")]) == runs[2]
    assert middle([failed("bake", 1, "no")]) == failed("bake", 1, "no")
    assert middle([]) is None


def test_the_plot_ends_behind_the_last_meeting_point() -> None:
    drawn = comparison_report.plot(sample(), comparison.answers(sample()))
    assert drawn is not None
    assert (drawn.boots, [one.path for one in drawn.lines]) == (12, ["bake", "hybrid", "bootstrap"])
    assert [one.text for one in drawn.crossings][-1] == "bake pays off against hybrid from 6 boots per rebuild"
    assert all(0 <= at <= 100 for line in drawn.lines for at in (line.start, line.end))
    assert comparison_report.plot(ONE, comparison.answers(ONE)) is None


# On a terminal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_it_is_shown_on_a_terminal(name: str) -> None:
    output = io.StringIO()
    comparison_report.show(Console(file=output, width=160), SAMPLES[name])
    shown = output.getvalue()
    for finding in comparison.findings(SAMPLES[name]):
        assert finding.text in shown
    for one in SAMPLES[name].runs:
        assert one.failure in shown
    assert "2 cores, 24 GiB, Linux 6.12.1, QEMU 10.0.2, emulation" in shown
