"""The evaluation's report: its answer, its pictures' numbers, that texts stay texts, and how a browser shows it."""

import base64
import json
import random
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingot.comparing import changes_of
from ingot.errors import IngotError
from ingot.evaluation import page, page_flips, page_pictures, page_words
from ingot.evaluation.compare import ALL_SLICES, compare
from ingot.evaluation.metrics import METRICS, statistic_of
from ingot.evaluation.page_input import Change, Condition, Overlap, Promotion, change
from ingot.evaluation.result import Evaluation, Score, load_evaluations
from ingot.evaluation.samples import Item, Sample, write_samples
from ingot.evaluation.statistics import Paired, interval

EVIL = "</dd></div></template><script>document.title = 'owned'</script><img src=x onerror=alert(1)>\"&amp;"
LONG = "W" * 4_000
ODD = [EVIL, LONG, "مرحبا، كيف حالك؟", "👩‍👩‍👧‍👦 🎉 日本語", "", "a\x00b\u202ec", "caf\ud83d"]
LABELS = ["arrival", "lost", "rate"]
Evaluations = dict[str, dict[str, Evaluation]]


def keep(folder: Path, task: str, kind: str, rows: Sequence[Sample], metrics: Sequence[str], **about: Any) -> None:
    """Write one model's folder as an evaluation leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    answers, references = [row.prediction for row in rows], [row.references for row in rows]
    found = {name: METRICS[name].compute(answers, references) for name in metrics}
    samples = [
        replace(row, numbers={name: it.rows[place].tolist() for name, it in found.items()})
        for place, row in enumerate(rows)
    ]
    scores = {
        name: Score(it.value(), *interval(it, 100, 0.95), len(rows), METRICS[name].higher_is_better)
        for name, it in found.items()
    }
    write_samples(folder / f"{task}.parquet", samples, {})
    asked = {"task": task, "kind": kind, "version": "3", "documents": "f00d", "max_new_tokens": 32}
    about = {"model": {"source": f"models/{folder.name}", "dtype": "float32"}, **about}
    Evaluation(folder.name, task, kind, asked, about, scores, samples, found, 4.0).write_scores(folder)


def row(number: int, prompt: str, right: str, said: str, **facts: Any) -> Sample:
    document = Item("", prompt, [right]).digest()
    return Sample(f"rows.jsonl:{number}", document, prompt, [right], facts.pop("output", {}), said, {}, **facts)


def written(folder: Path, skill: float, n: int = 60) -> None:
    """Texts, the first of them as odd as texts can be; a row's luck is the same for all models."""
    draw, rows = random.Random(0), []
    for number in range(n):
        right = " ".join(draw.choices(["alpha", "beta", "gamma", "delta"], k=draw.randint(2, 9)))
        said = right if draw.random() < skill else f"{right.split()[0]} and more"
        prompt = ODD[number] if number < len(ODD) else f"Say number {number}: {right}"
        said = ODD[number] if number < len(ODD) and folder.name == "tuned" else said
        slices = {"language": "de" if number % 3 else "en"}
        rows.append(row(number, prompt, right, said, slices=slices, n_output_tokens=len(said.split()), seconds=0.1))
    keep(folder, "say", "text-generation", rows, ["exact_match", "rougeL", "bleu"])


def classified(folder: Path, skill: float, n: int = 90) -> None:
    draw, rows = random.Random(1), []
    for number in range(n):
        right, luck = draw.choice(LABELS), draw.random()
        said = right if luck < skill else LABELS[(LABELS.index(right) + 1) % 3]
        sure = 0.4 + 0.59 * draw.random()
        shares = [sure if label == said else (1 - sure) / 2 for label in LABELS]
        rows.append(row(number, f"Where is card {number}?", right, said, output={"probabilities": shares}))
    keep(folder, "intents", "text-classification", rows, ["accuracy", "f1_macro"])


def one(metric: str, value: float, sign: int, task: str = "say", model: str = "tuned", **more: Any) -> Change:
    return Change(task, metric, model, value, value - 0.02, value + 0.02, 0.0001 if sign else 0.4, sign, 60, **more)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Evaluations:
    root = tmp_path_factory.mktemp("models")
    for name, skill in (("base", 0.3), ("tuned", 0.8)):
        written(root / name, skill)
        classified(root / name, skill)
    return {name: load_evaluations(root / name) for name in ("base", "tuned")}


CHANGES = [one("exact_match", 0.5, 1), one("bleu", 12.0, 1), one("accuracy", -0.1, -1, "intents")]
PROMOTION = Promotion(False, f"no: {EVIL}", [Condition(True, "gains"), Condition(False, f"slice {EVIL}")])


@pytest.fixture(scope="module")
def folder(models: Evaluations, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it."""
    place = tmp_path_factory.mktemp("report")
    scores = {"tuned": {"bleu": models["tuned"]["say"].scores["bleu"]}}
    overlap = Overlap("say", 60, {"exact": 3, "13-gram": 5}, scores, CHANGES[:2])
    page.write_report(place, CHANGES, models, f"Title {EVIL}", PROMOTION, {"say": overlap})
    return place


# --- the answer ---


def answer_of(models: Evaluations, *changes: Change) -> str:
    view = page.view_of(changes, {name: {"say": it["say"]} for name, it in models.items()}, "t", None, {})
    return view["answers"][0]


def test_the_answer_has_the_figures(models: Evaluations) -> None:
    better = answer_of(models, one("exact_match", 0.96, 1))
    assert better == (
        "tuned is better than base on exact_match: +0.960 [+0.940, +0.980] on 60 rows, p < 0.001; nothing got worse."
    )
    both = answer_of(models, one("exact_match", 0.96, 1), one("rougeL", 0.3, 1), one("bleu", -3.0, -1))
    assert "p < 0.001, and on 1 more metric; worse on bleu: -3.0 [-3.0, -3.0] on 60 rows" in both
    assert answer_of(models, one("bleu", -3.0, -1)).startswith("tuned is worse than base on bleu: -3.0")


def test_no_difference_says_what_could_have_been_seen(models: Evaluations) -> None:
    unclear = answer_of(models, one("exact_match", 0.01, 0, detectable=0.0612))
    assert unclear == (
        "Between base and tuned there is no difference that 60 rows could show; these see 6.1 points or more."
    )
    assert "none at all" in answer_of(models, one("exact_match", 0.01, 0, detectable=float("inf")))


def test_better_is_less_where_lower_is_better() -> None:
    found = Paired(-0.2, -0.3, -0.1, 0.002, None, 50)
    assert change("t", "perplexity", "m", found, higher_is_better=False).sign == 1
    assert change("t", "accuracy", "m", found, higher_is_better=True).sign == -1
    assert change("t", "accuracy", "m", replace(found, mcnemar_p=0.2), higher_is_better=True).sign == 0


def test_one_model_alone_is_reported(models: Evaluations, tmp_path: Path) -> None:
    path = page.write_report(tmp_path, [], {"tuned": models["tuned"]}, "alone")
    html = path.read_text(encoding="utf-8")
    assert "accuracy on 90 rows of intents: tuned 0." in html.replace("\xa0", " ")
    assert 'id="flips"' not in html and 'id="differences"' not in html
    with pytest.raises(IngotError, match="no evaluation to report on"):
        page.write_report(tmp_path, [], {"tuned": {}}, "nothing")


# --- what changed row by row ---


def test_rows_are_sorted_into_what_became_of_them(models: Evaluations) -> None:
    base, tuned = models["base"]["intents"], models["tuned"]["intents"]
    found = page_flips.contest(base, tuned)
    assert found is not None and found.metric == "accuracy"
    right = [[it.prediction in it.references for it in side.samples] for side in (base, tuned)]
    names = {(False, True): "better", (True, False): "broke", (True, True): "right", (False, False): "wrong"}
    assert found.states == [names[pair] for pair in zip(*right, strict=True)]
    assert page_flips.contest(base, replace(tuned, asked={"documents": "beef"})) is None


def test_a_document_got_better_when_its_loss_fell(models: Evaluations) -> None:
    def likelihoods(*sums: float) -> Evaluation:
        rows = np.asarray([[total, 10.0] for total in sums])
        score = Score(1.0, 1.0, 1.0, len(sums), higher_is_better=False)
        return Evaluation(
            "m", "lm", "language-modeling", {}, {}, {"loss": score}, [], {"loss": statistic_of("loss", rows)}
        )

    found = page_flips.contest(likelihoods(20, 20, 20), likelihoods(10, 30, 20))
    assert found is not None and found.states == ["better", "broke", "same"]
    assert found.after.tolist() == [1.0, 3.0, 2.0]
    assert found.counts() == {"better": 1, "broke": 1, "same": 1}


def test_what_changed_is_shown_first_and_everything_has_its_share(models: Evaluations) -> None:
    found = [page_flips.contest(models["base"][task], models["tuned"][task]) for task in ("intents", "say")]
    contests = [it for it in found if it is not None]
    picked = page_flips.chosen(contests, 20)
    assert len(set(picked)) == 20
    assert {contests[number].states[place] for number, place in picked} == {"better", "broke"}
    assert {number for number, _ in picked} == {0, 1}
    everything = page_flips.chosen(contests, 1_000)
    assert len(everything) == len(set(everything)) == 150


def test_rows_of_other_documents_are_no_pair(models: Evaluations) -> None:
    base, tuned = models["base"]["say"], models["tuned"]["say"]
    found = page_flips.contest(base, replace(tuned, samples=list(tuned.samples)[::-1]))
    assert found is not None
    with pytest.raises(IngotError, match=r"row \d+ of say is .* evaluate again"):
        page_flips.cards([found])


def test_words_that_the_other_answer_lacks_are_marked() -> None:
    a, b = page_flips.different_words("the quick fox", "the slow fox, too")
    assert a == [("the", False), (" ", False), ("quick", True), (" ", False), ("fox", False)]
    assert ("slow", True) in b and (", too", True) in b
    assert "".join(text for text, _ in b) == "the slow fox, too"
    assert page_flips.different_words("one", "two") == ([("one", False)], [("two", False)])  # all: nothing is marked
    assert page_flips.different_words('{"to": "Porto"}', "a, b, c, d") == (
        [('{"to": "Porto"}', False)],
        [("a, b, c, d", False)],
    )
    assert page_flips.different_words("same", "same")[0] == [("same", False)]
    assert page_flips.different_words("", "x y") == ([], [("x y", False)])


def test_a_long_text_keeps_its_end() -> None:
    short = page_flips.shortened("a" * 5_000 + "question?")
    assert short.endswith("question?") and "3,409 characters left out" in short and len(short) < 1_700


# --- pictures ---


def test_a_forest_keeps_scales_apart() -> None:
    shown = [
        page_pictures.Interval("accuracy", "shares", 0.1, 0.05, 0.15, 1, "+0.1"),
        page_pictures.Interval("bleu", "bleu", -7.0, -9.0, 2.0, 0, "-7"),
    ]
    shares, bleu = page_pictures.forest(shown)
    for panel, drawn in ((shares, shown[0]), (bleu, shown[1])):
        [line] = panel["rows"]
        assert 0 <= line["low"] <= line["at"] <= line["high"] <= 100
        assert (line["low"] > panel["zero"]) == (drawn.low > 0)
        unit = (line["high"] - line["low"]) / (drawn.high - drawn.low)
        assert line["at"] - panel["zero"] == pytest.approx(unit * drawn.value)
        assert all(place - panel["zero"] == pytest.approx(unit * float(text)) for text, place in panel["ticks"])
    assert page_pictures.forest([replace(shown[0], value=0.0, low=0.0, high=0.0)])[0]["zero"] == 50


def test_reliability_is_of_the_rows() -> None:
    draw = np.random.default_rng(0)
    sure, right = draw.uniform(0, 1, 500), draw.random(500) < 0.5
    bins = page_pictures.reliability([*sure, 1.0], [*right, True])
    assert sum(it.n for it in bins) == 501
    gap = 0.0
    for it in bins:
        inside = [
            (c, r)
            for c, r in zip([*sure, 1.0], [*right, True], strict=True)
            if it.low <= c < it.high or c == it.high == 1
        ]
        assert it.n == len(inside) and it.accuracy == pytest.approx(np.mean([r for _, r in inside]))
        gap += abs(sum(c for c, _ in inside) - sum(r for _, r in inside))
    assert page_pictures.calibration_error(bins) == pytest.approx(gap / 501)


def test_many_classes_become_a_list() -> None:
    few = page_pictures.confusion(Counter({("a", "a"): 8, ("a", "b"): 2, ("b", "a"): 1}))
    assert [(it["real"], it["said"], it["n"], it["share"]) for it in few["cells"]] == [
        ("a", "a", 8, 0.8), ("a", "b", 2, 0.2), ("b", "a", 1, 1.0)
    ]  # fmt: skip
    assert few["n_mistakes"] == 3 and few["mistakes"][0]["n"] == 2
    many = page_pictures.confusion(Counter({(f"c{i}", f"c{(i * 7) % 25}"): i + 1 for i in range(25)}))
    assert many["cells"] == [] and len(many["mistakes"]) == page_pictures.MAX_CONFUSIONS
    assert [it["n"] for it in many["mistakes"]] == sorted((it["n"] for it in many["mistakes"]), reverse=True)


def test_a_histogram_counts_every_row_and_survives_a_runaway() -> None:
    found = page_pictures.histogram({"a": [*range(1, 100)] * 3, "b": [5] * 200 + [100_000]})
    assert found is not None
    rows = [int(bar["title"].split(": ")[1].split()[0].replace(",", "")) for bar in found["bars"]]
    series = [bar["series"] for bar in found["bars"]]
    assert [sum(n for n, it in zip(rows, series, strict=True) if it == place) for place in (0, 1)] == [297, 201]
    assert max(bar["height"] for bar in found["bars"]) == 100
    assert len({bar["x"] for bar in found["bars"] if bar["series"] == 0}) > 10  # not all pressed into one
    assert found["bars"][-1]["title"].endswith("to 100,000")
    assert page_pictures.histogram({"a": []}) is None


# --- the files ---


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_is_loaded_and_no_text_is_markup(folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    found = Tags(html).found
    for tag, attributes in found:
        assert tag not in ("link", "img", "iframe", "object", "base", "form"), tag
        assert not {"src", "xlink:href", "style", "action"} & attributes.keys(), tag
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")], tag
    assert [tag for tag, _ in found].count("script") == 1
    policy = next(it["content"] or "" for tag, it in found if it.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    levels = [int(tag[1]) for tag, _ in found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(levels))


def test_texts_of_rows_stand_in_the_page_alone(folder: Path) -> None:
    assert "Say number 30" in (folder / "report.html").read_text(encoding="utf-8")
    for name in ("report.md", "report.json"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "Say number" not in text and "Where is card" not in text
        assert "accuracy" in text


def test_json_and_markdown_hold_the_same_facts(folder: Path, models: Evaluations) -> None:
    record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "NaN" not in (folder / "report.json").read_text(encoding="utf-8")
    scores = {(it["task"], it["metric"]): it for it in record["scores"]}
    for task, metric in (("say", "bleu"), ("intents", "accuracy")):
        for name, tasks in models.items():
            assert scores[task, metric]["scores"][name]["value"] == tasks[task].scores[metric].value
    assert scores["say", "bleu"]["changes"]["tuned"]["value"] == 12.0
    assert {it["slice"] for it in record["slices"]} == {"language = de", "language = en"}
    assert all(sum(it["rows"].values()) == n for it, n in zip(record["flips"], (90, 60), strict=True))
    assert record["answers"][0].split(":")[0] in text and "Not promoted" in text
    assert {it["name"] for it in record["settings"]} == {"model.source"}
    assert "+12.0 [+12.0, +12.0]" in text and "| base | tuned |" in text
    assert not re.search(r"(?<!\\)<", text)
    assert page_words.escaped("a_b _c_ [x](y) | `d`\n#") == r"a_b \_c\_ [x]\(y) \| \`d\` #"


def test_the_slice_is_of_its_rows(models: Evaluations) -> None:
    view = page.view_of([], models, "t", None, {})
    line = next(it for it in view["rows"][1]["slices"] if (it.slice, it.metric) == ("language = en", "exact_match"))
    rows = [it for it in models["tuned"]["say"].samples if it.slices["language"] == "en"]
    assert line.n == len(rows) == 20
    assert line.scores["tuned"].value == np.mean([it.numbers["exact_match"][0] for it in rows])
    assert page_words.scored(line, "tuned") == f"{line.scores['tuned'].value:.3f}"


def test_slices_that_no_column_names_stand_where_they_were_compared(models: Evaluations, tmp_path: Path) -> None:
    sides = [{"intents": models[name]["intents"]} for name in ("base", "tuned")]
    found = compare(*sides, samples=100, confidence=0.95, slices=ALL_SLICES)
    labels = {it.slice: it for it in found.differences if it.slice and it.metric == "accuracy"}
    assert {f"label = {name}" for name in LABELS} < set(labels)
    shown = page.view_of(changes_of([found]), {"base": sides[0], "tuned": sides[1]}, "t", None, {})["rows"][0]["slices"]
    for line in (it for it in shown if it.metric == "accuracy" and it.slice in labels):
        change = line.changes["tuned"]
        assert (line.n, change.n) == (labels[line.slice].paired.n,) * 2
        values = [line.scores[name].value for name in ("base", "tuned")]
        assert change.value == pytest.approx(values[1] - values[0])
        assert (change.p, change.detectable) == (labels[line.slice].p_adjusted, labels[line.slice].detectable)
    assert len({line.slice for line in shown}) == len({it.slice for it in found.differences if it.slice})
    page.write_report(tmp_path, [], models, "t", notes=["120 rows of 6 groups <i>"])
    assert "120 rows of 6 groups &lt;i&gt;" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "- 120 rows of 6 groups" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["notes"] == ["120 rows of 6 groups <i>"]


def test_a_large_set_makes_no_large_page(tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        rows = [
            row(n, f"{n} " + "long prompt " * 400, "yes", "yes" if (n + len(name)) % 3 else "no") for n in range(1_500)
        ]
        keep(tmp_path / name, "big", "text-generation", rows, ["exact_match"])
    models = {name: load_evaluations(tmp_path / name) for name in ("base", "tuned")}
    html = page.write_report(tmp_path / "report", [], models, "big").read_text(encoding="utf-8")
    shown = html.count("<article")
    assert page.STATIC_ROWS < shown < 1_500 and len(html) < 3_000_000
    assert f"This page holds {shown:,} of 1,500 rows" in html and "big.parquet" in html
    assert html.index("<template") > 0 and html[: html.index("<template")].count("<article") == page.STATIC_ROWS


def test_the_three_files_are_logged(folder: Path) -> None:
    logged: list[tuple[str, str | None]] = []

    class Recording:
        def artifact(self, path: Path, folder: str | None = None) -> None:
            assert path.is_file()
            logged.append((path.name, folder))

    page.log_report(Recording(), folder)  # type: ignore[arg-type]
    assert logged == [(name, "report") for name in page.FILES]


# --- in a browser ---


class Browser:
    """Chromium by the WebDriver protocol; scripts given to `run` are not held back by the page's policy."""

    def __init__(self, port: int, arguments: Sequence[str]) -> None:
        self._root = f"http://127.0.0.1:{port}"
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]}
        logs = {"browser": "ALL"}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        found = self._call("/session", {"capabilities": {"alwaysMatch": wanted}})
        self._root += f"/session/{found['sessionId']}"

    def _call(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)["value"]

    def open(self, url: str, width: int) -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._call("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})
        self._call("/url", {"url": "about:blank"})  # another part of the same page would not load it again
        self._call("/url", {"url": url})

    def run(self, script: str) -> Any:
        return self._call("/execute/sync", {"script": script, "args": []})

    def complaints(self) -> list[str]:
        return [line["message"] for line in self._call("/se/log", {"type": "browser"})]

    def picture(self) -> bytes:
        return base64.b64decode(self._call("/screenshot"))

    def close(self) -> None:
        self._call("", method="DELETE")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no Chromium with its driver on this machine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        shown = Browser(port, [f"--user-data-dir={tmp_path_factory.mktemp('profile')}"])
        yield shown
        shown.close()
    finally:
        process.terminate()
        process.wait(10)


VISIBLE = "return [...document.querySelectorAll('.flip')].filter((it) => !it.hidden)"


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_is_drawn(browser: Browser, folder: Path, width: int) -> None:
    from PIL import Image

    browser.open((folder / "report.html").as_uri(), width)
    assert browser.run("return innerWidth") == width
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []
    assert browser.run("return document.title") == f"Title {EVIL}"
    colours = Image.open(BytesIO(browser.picture())).convert("RGB").getcolors(1 << 24)
    assert colours is not None and len(colours) > 50
    # Every row, not only those of the first page.
    browser.run("for (const it of document.querySelectorAll('.flip')) it.hidden = false")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return document.querySelectorAll('.flip img, .flip script').length") == 0


def test_rows_are_filtered_by_what_the_address_says(browser: Browser, folder: Path) -> None:
    address = (folder / "report.html").as_uri()
    record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    broke = sum(it["rows"]["broke"] for it in record["flips"])
    assert broke > 0
    browser.open(f"{address}#flips=broke", 1280)
    assert browser.run(f"{VISIBLE}.map((it) => it.dataset.state)") == ["broke"] * min(10, broke)
    assert browser.run("return document.getElementById('flip-said').textContent").endswith(f"of {broke}")
    browser.open(f"{address}#flips=all&contest=1&slice=0&q=NUMBER+30", 1280)
    assert browser.run(f"{VISIBLE}.length") == 0  # row 30 is of the other slice
    browser.open(f"{address}#flips=all&contest=1&slice=1&q=NUMBER+30", 1280)
    assert browser.run(f"{VISIBLE}.map((it) => it.querySelector('h3').textContent)") == ["rows.jsonl:30"]
    assert browser.complaints() == []


def test_buttons_filter_turn_pages_and_change_the_address(browser: Browser, folder: Path) -> None:
    browser.open((folder / "report.html").as_uri(), 390)
    first = browser.run(f"{VISIBLE}.map((it) => it.textContent)")
    assert len(first) == 10
    browser.run("document.getElementById('flip-next').click()")
    second = browser.run(f"{VISIBLE}.map((it) => it.textContent)")
    assert len(second) == 10 and not set(first) & set(second)
    browser.run("document.querySelector('button[data-state=right]').click()")
    assert set(browser.run(f"{VISIBLE}.map((it) => it.dataset.state)")) == {"right"}
    assert browser.run("return location.hash") == "#flips=right"
    assert browser.run("return document.querySelector('[aria-pressed=true]').dataset.state") == "right"
    browser.run("const q = document.getElementById('flip-q'); q.value = 'no such'; q.dispatchEvent(new Event('input'))")
    assert browser.run(f"{VISIBLE}.length") == 0
    assert browser.run("return document.getElementById('flip-said').textContent") == "No row here is like that"
    assert browser.complaints() == []
