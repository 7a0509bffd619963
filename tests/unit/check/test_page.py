"""The gate's page: complete in itself, safe with any row, and its pictures are those of the figures."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from ingot.check import page
from ingot.check.verdict import Evidence, Report, Shown, Status, Verdict

EVIL = "</div></mark><script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp;"


def part(text: str, learned: bool = False, special: bool = False) -> dict[str, object]:
    return {"text": text, "trainable": learned, "special": special}


def made(*verdicts: Verdict, evidence: Evidence | None = None, word: str = "small") -> Report:
    return Report(word, word, list(verdicts), evidence or Evidence(), [word], {word: word}, 75.0)


class Page(HTMLParser):
    """Collects tags, attributes, and the text under each class."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "link", "input"):
            self._open.append(dict(attrs).get("class") or tag)
            self.text.setdefault(self._open[-1], []).append("")

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for name in set(self._open):
            self.text[name][-1] += data


def rich_report(word: str) -> Report:
    """Everything a page can show, with `word` wherever a user's text may come."""
    segments = [part(word), part(f"\n{word}\n", True), part(word, True, True), part(word, False, True)]
    evidence = Evidence([Shown(word, segments, 9, 4, word)], [0, 3, 9, 9], [[4, 2], [9]], 8)
    facts = {word: word, "list": [word], "nested": {word: {word: 1.5}}, "loss": 0.123456789}
    return made(
        *(Verdict(word, status, word, word, facts, 0.5) for status in Status),
        evidence=evidence,
        word=word,
    )


def test_users_text_is_never_markup():
    harmless, hostile = Page(page.render(rich_report("word"))), Page(page.render(rich_report(EVIL)))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert [sorted(attributes) for _, attributes in hostile.tags] == [sorted(a) for _, a in harmless.tags]
    assert EVIL in "".join(hostile.text["row"])
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in hostile.tags}


def test_nothing_is_loaded_from_elsewhere():
    html = page.render(rich_report("word"))
    for tag, attributes in Page(html).tags:
        assert tag not in ("link", "script", "img", "iframe"), tag
        assert not {"src", "href", "xlink:href"} & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert set(re.findall(r"url\(([^)]*)\)", html)) == {"#hatch"}
    assert "@import" not in html
    assert "//" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL).replace("<!doctype html>", "")


def test_rows_show_what_is_learned():
    segments = [
        part("<|user|>", False, True),
        part("two\nlines  and\ttab", False),
        part(" answer\n", True),
        part("<|end|>", True, True),
    ]
    shown = Page(page.render(made(evidence=Evidence([Shown("rows.jsonl:7", segments, 12, 5, "")]))))
    assert shown.text["row"] == ["<|user|>two↵\nlines  and\ttab answer↵\n<|end|>"]
    assert shown.text["learned"][1:] == [" answer↵\n"]  # the first of each is the legend's
    assert shown.text["learned special"][1:] == ["<|end|>"]
    assert shown.text["read special"][1:] == ["<|user|>"]
    assert shown.text["read"][1:] == ["two↵\nlines  and\ttab"]
    assert "12 tokens, 5 learned" in shown.text["head"][-1]  # the first is the page's


def test_what_cannot_be_seen_is_made_visible():
    segments = [part("a\x00b\x1b[31m\r\u202eright to left")]
    shown = Page(page.render(made(evidence=Evidence([Shown("r", segments, 1, 0)]))))
    assert shown.text["row"] == ["a\u2400b\u241b[31m\u240d\ufffdright to left"]


def test_every_end_has_its_word():
    shown = Page(page.render(rich_report("word")))
    assert shown.text["html"][0].count("→") == 3  # fixes of what failed, warns and is waived
    for status, symbol in page.SYMBOLS.items():
        assert shown.text[f"mark {status.name}"] == [f"{symbol} {status.value}"]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([Status.passed, Status.not_applicable], "Passed"),
        ([Status.passed, Status.waived], "Passed, 1 waived"),
        ([Status.failed, Status.waived], "1 proof failed"),
        ([Status.failed, Status.failed], "2 proofs failed"),
    ],
)
def test_headline(ends, expected):
    report = made(*(Verdict("x", status, "because") for status in ends))
    assert page.headline(report) == expected
    assert Page(page.render(report)).text["h1"] == [expected]


def test_without_evidence_there_are_no_pictures():
    shown = Page(page.render(made(Verdict("one-bos", Status.passed, "fine"))))
    assert "svg" not in {tag for tag, _ in shown.tags}
    assert "row" not in shown.text


def test_pictures_are_well_formed_and_of_the_figures():
    html = page.render(made(evidence=Evidence([], [0, 0, 5, 9, 100], [[3, 3], [8]], 8)))
    pictures = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)]
    assert len(pictures) == 2
    titles = [[element.text or "" for element in picture.iter("title")] for picture in pictures]
    assert sum(int(title.split(": ")[1].split()[0]) for title in titles[0]) == 5  # each row stands in one bar
    assert titles[1] == ["row of 3 tokens", "row of 3 tokens", "6 of 8 tokens used", "row of 8 tokens"]
    for picture in pictures:
        _, _, width, height = map(float, picture.attrib["viewBox"].split())
        for rect in picture.iter("rect"):
            x, y, w, h = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
            assert x >= 0 and x + w <= width and y >= 0 and y + h <= height and w > 0 and h > 0
    assert len([element for element in pictures[0].iter("rect") if element.attrib["class"] == "empty"]) == 1


@pytest.mark.parametrize("seed", range(6))
def test_histogram_counts_every_row_once(seed):
    draw = np.random.default_rng(seed)
    low, high = [(0, 3), (1, 2), (0, 5000), (900, 1000), (7, 8), (1, 40)][seed]
    values = draw.integers(low, high, 500)
    found = page.histogram(values.tolist())
    assert found is not None
    for bar in found["bars"]:
        inside = (values >= bar["first"]) & (values <= bar["last"])
        assert inside.sum() == bar["rows"] > 0
        assert bar["x"] >= 0 and bar["x"] + bar["width"] <= 1 + 1e-9 and 0 < bar["height"] <= 1
    assert sum(bar["rows"] for bar in found["bars"]) == 500
    assert max(bar["height"] for bar in found["bars"]) == 1
    assert len(found["bars"]) <= page.BINS
    p5, median = np.percentile(values, [5, 50])
    marked = {name: mark for mark in found["marks"] for name in mark["name"].split(", ")}
    for name, value in (("minimum", values.min()), ("5th percentile", p5), ("median", median)):
        mark = marked[name]
        assert mark["value"] == f"{value:,g}"
        bar = next(bar for bar in found["bars"] if bar["first"] <= np.floor(value) <= bar["last"])
        assert bar["x"] <= mark["x"] <= bar["x"] + bar["width"] * 1.5
    assert all(0 <= share <= 1 for _, share in [*found["x_ticks"], *found["y_ticks"]])
    assert found["zeros"] == (values == 0).sum()
    assert [bar["empty"] for bar in found["bars"]] == [
        bool(bar["first"] == 0 and found["zeros"]) for bar in found["bars"]
    ]


def test_histogram_of_one_value_and_of_nothing():
    found = page.histogram([1, 1, 1])
    assert found is not None
    assert [(bar["first"], bar["rows"]) for bar in found["bars"]] == [(1, 3)]
    assert [mark["name"] for mark in found["marks"]] == ["minimum, 5th percentile, median"]
    assert page.histogram([]) is None
    nothing_learned = page.histogram([0, 0])
    assert nothing_learned is not None and nothing_learned["bars"][0]["empty"]


def test_packing_is_drawn_to_scale():
    found = page.packing([[50, 30], [100], [10]], 100)
    assert found is not None
    assert [[(row["x"], row["width"]) for row in bar["rows"]] for bar in found["bars"]] == [
        [(0, 0.5), (0.5, 0.3)],
        [(0, 1)],
        [(0, 0.1)],
    ]
    assert found["limit"] == 1
    assert found["average"] == pytest.approx((0.8 + 1 + 0.1) / 3)
    assert found["emptiest"] == pytest.approx(0.1)
    assert found["rows"] == 4


def test_packing_beyond_the_limit_or_without_one():
    over = page.packing([[150], [75]], 100)  # a row longer than a microbatch stands alone
    assert over is not None
    assert over["bars"][0]["end"] == 1 and over["limit"] == pytest.approx(2 / 3)
    assert over["average"] == pytest.approx((1.5 + 0.75) / 2)
    roomy = page.packing([[25, 25], [40]], 100)
    assert roomy is not None
    assert roomy["limit"] == 1 and roomy["bars"][0]["end"] == 0.5
    free = page.packing([[3], [6]], 0)
    assert free is not None and free["capacity"] == 6 and free["limit"] == 1
    assert page.packing([], 100) is None


@pytest.mark.parametrize("extent", [(0, 1), (0, 7), (0, 100), (0, 12_345), (990, 1010), (5, 5), (0, 0)])
def test_ticks_are_few_and_inside(extent):
    low, high = extent
    found = page.ticks(low, high)
    assert 1 <= len(found) <= page.TICKS + 2
    assert all(low <= tick <= high for tick in found)
    assert found == sorted(set(found))
