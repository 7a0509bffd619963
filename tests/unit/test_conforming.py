"""`ingot conform`: what is asked, where results are kept, how it ends; and, slowly, every target that installs here."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ingot import conforming, registering
from ingot.cli import app
from ingot.conformance import targets
from ingot.conformance.case import Case, Unavailable
from ingot.conformance.targets import TARGETS
from ingot.errors import DataError, PackageError
from ingot.model.runtime import Runtime
from ingot.packaging.bundle import add_file, package_model

CACHE = os.environ.get("INGOT_CACHE")  # before the tests' own


def good(case: Case) -> Iterator[Any]:
    yield "form", case.expected


def bad(case: Case) -> Iterator[Any]:
    yield "<form>", [dict.fromkeys(record, "other") for record in case.expected]


def absent(case: Case) -> Iterator[Any]:
    raise Unavailable("nobody <b>installed</b> it")
    yield


def writing(case: Case) -> Iterator[Any]:
    (case.package / "README.md").write_text("written")
    yield "form", case.expected


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in {"good": good, "bad": bad, "absent": absent, "writing": writing}.items():
        monkeypatch.setattr(targets, name, function, raising=False)
        monkeypatch.setitem(TARGETS, name, f"ingot.conformance.targets:{name}")


@pytest.fixture
def package(head_folder: Path, tmp_path: Path) -> Path:
    return packaged(head_folder, tmp_path / "package", "text-classification", {"text": "Hello!"})


def packaged(folder: Path, out: Path, task: str, example: dict[str, str]) -> Path:
    answer = Runtime.load(folder).answer([example])[0]
    package_model(folder, out, name="tiny", task=task, example_input=example, metadata={}, license=None)
    add_file(out, "verification.json", {"answer": answer})
    return out


def ingot(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["conform", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_results_are_kept_beside_the_package(package: Path, planted: None) -> None:
    assert ingot(package, "-t", "good", "-t", "absent").exit_code == 0
    assert ingot(package, "-t", "bad").exit_code == 1
    kept = json.loads(package.with_name("package.conformance.json").read_text())
    assert [(it["target"], it["state"]) for it in kept["results"]] == [
        ("good", "passed"),
        ("absent", "skipped"),
        ("bad", "failed"),
    ]
    assert not (package / "package.conformance.json").exists()
    assert (kept["passed"], kept["sentence"]) == (False, "1 of 2 targets that ran passed, 1 skipped")
    assert ingot(package, "-t", "absent").exit_code == 1  # nothing ran: nothing is proved


def test_the_kept_verdict_is_over_all_results(package: Path, planted: None, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert ingot(package, "-t", "bad").exit_code == 1
    again = ingot(package, "-t", "good", "--rows", rows)
    assert again.exit_code == 0  # of what it was asked
    kept = json.loads(package.with_name("package.conformance.json").read_text())
    assert (kept["passed"], kept["sentence"]) == (False, "1 of 2 targets that ran passed, 0 skipped")
    assert {it["target"]: it["rows"] for it in kept["results"]} == {"bad": 1, "good": 3}
    assert all(it["at"] and it["versions"]["torch"] for it in kept["results"])
    assert not {"at", "rows", "versions"} & set(kept)


def test_results_of_other_files_are_forgotten(package: Path, planted: None, head_folder: Path) -> None:
    ingot(package, "-t", "bad")
    packaged(head_folder, package, "text-classification", {"text": "Another"})
    ingot(package, "-t", "good")
    kept = json.loads(package.with_name("package.conformance.json").read_text())
    assert [it["target"] for it in kept["results"]] == ["good"]


@pytest.mark.parametrize("damage", ['{"manifest": ', "[]", "{}", '{"manifest": "a", "results": [{"target": "good"}]}'])
def test_kept_results_that_are_damaged_are_one_line(
    package: Path, planted: None, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    kept = package.with_name("package.conformance.json")
    kept.write_text(damage)
    asked: list[Case] = []
    monkeypatch.setattr(targets, "good", asked.append)
    refused = ingot(package, "-t", "good")
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1 and not asked
    assert f"results = '{kept}': is not what `ingot conform` keeps there" in refused.stderr
    assert kept.read_text() == damage


def test_a_package_that_changed_is_refused_before_and_after(package: Path, planted: None) -> None:
    with pytest.raises(PackageError, match="changed after packaging"):
        conforming.run(str(package), ["writing"])
    refused = ingot(package, "-t", "good")
    assert refused.exit_code == 1 and "README.md changed" in refused.stderr


def test_further_rows_are_asked(package: Path, planted: None, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n{"text": "two"}\n')
    found = json.loads(ingot(package, "-t", "good", "--rows", rows, "--json").stdout)
    assert (found["results"][0]["rows"], found["passed"]) == (3, True)
    rows.write_text('{"text": "one"}\n' * 21)
    assert "write at most 20" in ingot(package, "-t", "good", "--rows", rows).stderr
    rows.write_text('{"text": "one"}\nno json\n')
    refused = ingot(package, "-t", "good", "--rows", rows)
    assert refused.exit_code == 2 and f"{rows}:2" in refused.stderr


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"foo": "one"}', "the model does not answer this row: unknown column 'foo'; the model takes text"),
        ('{"text": ""}', "the model does not answer this row: text"),
        ('{"text": 5}', "column 'text' holds no text: write a string, or leave the column out"),
        ('{"text": "one", "more": null}', "column 'more' holds no text"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(package: Path, planted: None, tmp_path: Path, row: str, said: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n\n' + row + "\n")
    refused = ingot(package, "-t", "good", "--rows", rows)
    assert refused.exit_code == 2
    assert f"--rows = '{rows}:3': {said}" in refused.stderr.rstrip("\n").split("\n")[-1]


def test_rows_are_cut_at_line_feeds_alone(tmp_path: Path) -> None:
    rows, texts = tmp_path / "rows.jsonl", ["a\u2028b", "a\u2029b", "a\x85b"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    rows.write_bytes("\r\n".join([*lines, "", ""]).encode())
    assert [row["text"] for row in conforming.read_rows(rows).values()] == texts


def test_targets_are_told_where_the_runtime_cuts(
    head_folder: Path, tmp_path: Path, planted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = json.loads((head_folder / "ingot.json").read_text()) | {"max_tokens": 8}
    (head_folder / "ingot.json").write_text(json.dumps(about))
    place = packaged(head_folder, tmp_path / "package", "text-classification", {"text": "Hello!"})
    asked: list[Case] = []
    monkeypatch.setattr(targets, "good", lambda case: [asked.append(case), good(case)][1])
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_string": "a row"}')  # another name of the column
    conforming.run(str(place), ["good"], rows_file=rows)
    assert asked[0].about["longest"] == 8
    assert asked[0].rows == [{"text": "Hello!"}, {"text": "a row"}]


def test_a_run_is_asked_its_test_rows(package: Path, planted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [{"text": "a test row"}]

    def stored(run: object) -> Any:
        if not asked:
            raise DataError("data.test", "rows.jsonl", "is gone")
        return asked

    monkeypatch.setattr(conforming, "package_of", lambda path: (path, object()))
    monkeypatch.setattr(conforming, "requests_of", stored)
    assert conforming.run(str(package), ["good"]).results[0].rows == 2
    asked.clear()
    assert conforming.run(str(package), ["good"]).results[0].rows == 1


def test_an_answer_from_another_device_is_not_compared(package: Path) -> None:
    proof = json.loads((package / "verification.json").read_text())
    assert conforming.run(str(package), ["runtime"]).results[0].state == "passed"
    add_file(package, "verification.json", proof | {"device": "cuda"})
    [found] = conforming.run(str(package), ["runtime"]).results
    assert found.state == "skipped" and "computed on cuda" in found.reason


def test_the_page_escapes_what_targets_say(package: Path, planted: None, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    ingot(package, "-t", "absent", "-t", "bad", "-t", "good", "--report", page)
    text = page.read_text()
    assert "nobody &lt;b&gt;installed&lt;/b&gt; it" in text and "<form>" not in text
    assert "1 of 2 targets that ran passed, 1 skipped" in text


def test_wrong_arguments_are_one_line(package: Path, tmp_path: Path) -> None:
    unknown = ingot(package, "-t", "pyfunk")
    assert unknown.exit_code == 2 and "did you mean 'pyfunc'?" in unknown.stderr
    nowhere = ingot(tmp_path / "nothing", "-t", "pyfunc")
    assert nowhere.exit_code == 2 and "no MLmodel" in nowhere.stderr
    assert "does not exist" in ingot(package, "-t", "pyfunc", "--report", tmp_path / "no" / "page.html").stderr


@pytest.mark.filterwarnings("ignore")  # of mlflow, about its own databases
def test_a_registered_version_is_tagged(
    package: Path, planted: None, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    registry = registering.open_registry()
    registering.register(registry, package)
    assert ingot("models:/tiny/latest", "-t", "good", "-t", "absent").exit_code == 0
    for unknown in ("models:/nope/1", "models:/tiny/7", "models:/tiny@nobody"):
        refused = ingot(unknown, "-t", "good")
        assert refused.exit_code == 2 and unknown in refused.stderr
    said = registry.version("tiny").as_dict()["conformance"]
    assert said["good"].startswith("passed 20") and said["absent"].startswith("skipped")


def test_every_target_has_a_function() -> None:
    from ingot.registry import resolve

    assert all(callable(resolve(TARGETS, "--target", name)) for name in TARGETS)


@pytest.fixture
def kept_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments of other packages outlive this session: making one takes up to two minutes."""
    if CACHE is None:
        monkeypatch.delenv("INGOT_CACHE", raising=False)
    else:
        monkeypatch.setenv("INGOT_CACHE", CACHE)


REAL = "mlflow-serve mlflow-client openai-client batch azure-server mlserver spark_udf ray-serve".split()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", REAL)
def test_targets_that_install_here_answer_the_same(
    request: pytest.FixtureRequest, kept_environments: None, tmp_path: Path, target: str
) -> None:
    chat = target in ("openai-client", "mlflow-serve", "mlserver")
    folder = request.getfixturevalue("chat_folder" if chat else "head_folder")
    task, example = ("chat-completion", {"input_string": "Hello!"}) if chat else ("text-classification", {"text": "Hi"})
    place = packaged(folder, tmp_path / "package", task, example)
    [found] = conforming.run(str(place), [target]).results
    if found.state == "skipped":
        pytest.skip(found.reason)
    assert (found.state, found.reason) == ("passed", "")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_fresh_environment_made_from_the_packages_requirements_answers_the_same(
    package: Path, kept_environments: None
) -> None:
    [found] = conforming.run(str(package), ["pyfunc-env"], timeout_s=600).results
    if found.state == "skipped":
        pytest.skip(found.reason)
    assert (found.state, found.reason) == ("passed", "")
