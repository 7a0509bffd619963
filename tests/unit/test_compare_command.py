"""`ingot compare` and `ingot.compare`: what is shown, what is refused, and how it ends for a pipeline."""

import json
from pathlib import Path
from typing import Any

import pytest
from scripted import Questions, Scripted, evaluated, right
from typer.testing import CliRunner

import ingot as sdk
from ingot.cli import app
from ingot.errors import IngotError, RecipeError
from ingot.evaluation.compare import Comparison, NotComparable, load_comparison


def ingot(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": "80"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models that are wrong on every so many rows."""
    folder = tmp_path_factory.mktemp("models")

    def measure(name: str, share: int, rows: int = 120, groups: int | None = None, version: int = 1) -> None:
        def answer(prompt: str) -> str:
            number = int(prompt.split()[1])
            return right(number) if number % share else "neither"

        task = Questions(rows, metrics=("exact_match", "chrf"))
        task.version = version
        task.slices = lambda number: {"language": "de" if number % 4 else "en", "rare": str(number < 5)}
        if groups:
            task.group = lambda number: f"passage {number * groups // rows}"
        evaluated(task, Scripted(answer), folder / name, name=name)

    measure("low", 2)
    measure("high", 6)
    measure("other", 7)
    measure("few", 3, rows=100)
    measure("grouped", 2, groups=6)
    measure("newer", 2, version=2)
    return folder


@pytest.fixture(autouse=True)
def here(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places)


def test_a_model_that_got_worse_ends_with_3_on_request() -> None:
    assert ingot("high", "low").exit_code == 0
    for more in ((), ("--json",)):
        worse = ingot("high", "low", "--fail-if-worse", *more)
        assert worse.exit_code == 3
        assert worse.stderr.splitlines()[0] == (
            "worse: low: questions exact_match: -0.333 [-0.417, -0.250], adjusted p < 0.001"
        )
    assert json.loads(worse.stdout)[0]["names"] == ["high", "low"]
    assert ingot("low", "high", "--fail-if-worse").exit_code == 0
    assert ingot("low", "low/../high", "--fail-if-worse", "--slices").exit_code == 0
    assert "where language = de" in ingot("high", "low", "--fail-if-worse", "--slice", "language").stderr
    assert ingot("low", "newer", "--fail-if-worse").exit_code == 2


def test_alpha_decides_what_is_shown() -> None:
    [one, other] = json.loads(ingot("low", "few", "--rows", "common", "--json").stdout)[0]["differences"]
    p = max(one["p_adjusted"], other["p_adjusted"])
    assert one["p_adjusted"] != other["p_adjusted"]
    for alpha, better in ((p * 1.01, 2), (p * 0.99, 1)):
        shown = ingot("low", "few", "--rows", "common", "--alpha", alpha, "--out", "shown").stdout
        assert shown.count("▲ ") == better + 1  # and the line that explains the sign
        scores = json.loads(Path("shown/report.json").read_text())["scores"]
        assert sum(it["changes"]["few"]["sign"] for it in scores) == better


def test_rows_of_one_side_alone_are_left_out_and_counted() -> None:
    refused = ingot("low", "few")
    assert refused.exit_code == 2
    assert "20 rows of low are not among those of few, the first is q:100" in refused.stderr
    assert "--rows common" in refused.stderr
    done = ingot("low", "few", "--rows", "common", "--out", "left")
    note = "questions: 100 rows that both have; 20 of low and 0 of few are left out"
    assert note in done.stdout
    assert note in Path("left/report.md").read_text()
    assert json.loads(Path("left/comparison.json").read_text())["left_out"] == {"questions": [20, 0]}


def test_every_pair_is_written() -> None:
    told = json.loads(ingot("low", "high", "other", "--json", "--out", "three").stdout)
    kept = json.loads(Path("three/comparison.json").read_text())
    assert [it["names"] for it in kept["pairs"]] == [["low", "high"], ["low", "other"]]
    assert kept["pairs"] == told
    assert {name: it for name, it in kept.items() if name != "pairs"} == told[0]  # as a file of two
    assert load_comparison(Path("three")) == Comparison.from_dict(told[0])


def test_groups_and_small_slices_are_told() -> None:
    done = ingot("grouped", "high", "--slices", "--out", "sliced")
    assert "questions: 120 rows of 6 groups: whole groups are resampled, not rows; McNemar's test" in done.stdout
    assert "so few groups (under 10) make intervals too narrow" in done.stdout
    assert "left out: rare = True (5)" in done.stdout
    assert "adjusted for 2 tests of whole tasks, and for 14 of slices among themselves" in done.stdout
    assert "[+0.317, +0.350]" in done.stdout  # whole also at 80 columns
    record = json.loads(Path("sliced/report.json").read_text())
    part = next(it for it in record["slices"] if (it["slice"], it["metric"]) == ("language = en", "exact_match"))
    assert part["changes"]["high"]["p"] == pytest.approx(0.025, rel=0.02)
    assert part["changes"]["high"]["detectable"] > 0
    one = json.loads(ingot("low", "high", "--slice", "language", "--json").stdout)[0]["differences"]
    assert {it["slice"] for it in one} == {None, "language = de", "language = en"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--alpha", 2], "--alpha = 2.0: must lie between 0 and 1"),
        (["--confidence", 0.3], "--confidence = 0.3: must lie between 0.5 and 1"),
        (["--rows", "commn"], "--rows = 'commn': did you mean 'common'?"),
        (["--slice", "langauge"], "--slice = 'langauge': no row has it: did you mean 'language'?"),
        (["--slice", "language", "--slices"], "--slices compares every field; name one of the two"),
    ],
)
def test_wrong_input_is_told_in_a_line(arguments: list[object], told: str) -> None:
    refused = ingot("low", "high", "--out", "none", *arguments)
    assert refused.exit_code == 2
    assert told in refused.stderr
    assert not Path("none").exists()


def test_python_has_what_the_command_line_has(places: Path) -> None:
    found = sdk.compare("low", Path("high"), "other", slices="all", alpha=0.01, confidence=0.9)
    assert [it.names for it in found] == [("low", "high"), ("low", "other")]
    assert {(it.alpha, it.confidence) for it in found} == {(0.01, 0.9)}
    arguments = ("low", "high", "other", "--slices", "--alpha", 0.01, "--confidence", 0.9, "--json")
    assert json.loads(ingot(*arguments).stdout) == json.loads(json.dumps([it.as_dict() for it in found]))
    wide, narrow = (it.of("questions")["chrf"].paired for it in (sdk.compare("low", "high")[0], found[0]))
    assert wide.high - wide.low > narrow.high - narrow.low
    with pytest.raises(NotComparable, match="version"):
        sdk.compare("low", "newer")
    with pytest.raises(RecipeError, match="--rows"):
        sdk.compare("low", "high", rows="both")  # type: ignore[arg-type]
    with pytest.raises(IngotError, match="holds no evaluation"):
        sdk.compare("low", "nowhere")
