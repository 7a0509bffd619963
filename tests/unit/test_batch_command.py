"""`ingot batch` on the command line and `ingot.batch`: whole batches, going on, and everything that is refused."""

import csv
import json
import re
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_endpoint import FakeServer, text
from typer.testing import CliRunner

import ingot
from ingot import batches
from ingot.batches import Options
from ingot.cli import app
from ingot.errors import DataError, FieldError, NotPromoted
from ingot.model.runtime import Runtime

ROWS = [{"id": f"r{n}", "review": f"Hello {n}{' and more' * (n % 3)}", "stars": n, "é": "ü"} for n in range(10)]


def run(*arguments: object, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["batch", *map(str, arguments)], env={"COLUMNS": "200"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    return done


def records(folder: str) -> list[dict[str, Any]]:
    parts = sorted(Path(folder).glob("part-*.jsonl"))
    return [json.loads(line) for path in parts for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


COMMON = ("--map", "input_string=review", "--param", "max_tokens=3")


def test_a_batch_is_answered_and_told(model_folder: Path) -> None:
    done = run(model_folder, "rows.jsonl", "out", *COMMON, "--keep", "stars", "--keep", "note=é", "--bucket-rows", 4)
    assert "10 of 10 rows answered" in done.stdout
    assert "batch: done" in done.stderr
    wanted = Runtime.load(model_folder, "cpu").answer(
        [{"input_string": row["review"]} for row in ROWS], {"max_tokens": 3}
    )
    assert records("out") == [
        {"id": row["id"], "stars": row["stars"], "note": "ü", **answer}
        for row, answer in zip(ROWS, wanted, strict=True)
    ]
    told = json.loads(run(model_folder, "rows.jsonl", "other", *COMMON, "--max-rows", 7, "--json").stdout)
    assert (told["status"], told["rows"], told["answers"], told["errors"]) == ("finished", 7, 7, 0)
    assert told["tokens"]["output"] <= 21
    assert told == json.loads(Path("other/summary.json").read_text())
    assert [row["output_string"] for row in records("other")] == [one["output_string"] for one in wanted[:7]]


def test_the_same_command_goes_on_and_others_are_refused_with_what_changed(model_folder: Path, rows: Path) -> None:
    arguments = (model_folder, "rows.jsonl", "out", *COMMON, "--bucket-rows", 4, "--json")
    run(*arguments)
    before = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("part-*")}
    Path("out/part-00001.jsonl").unlink()
    assert json.loads(run(*arguments).stdout)["rows_from_before"] == 6
    after = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("part-*")}
    assert [name for name in before if before[name] != after[name]] == ["part-00001.jsonl"]
    for more, told in {
        ("--param", "seed=3"): '--param was {"max_tokens": 3}, now {"max_tokens": 3, "seed": 3}',
        ("--limit", "5"): "(--max-rows was null, now 5)",
        ("--keep", "stars"): "--keep was {}, now",
        ("--id-column", "id"): '--id-column was null, now "id"',
        ("--bucket-rows", "5"): "--bucket-rows was 4, now 5",
        ("--format", "csv"): '--format was "jsonl", now "csv"',
    }.items():
        assert told in run(*arguments, *more, code=2).stderr
    rows.write_text(rows.read_text(encoding="utf-8") + '{"review": "one more"}\n', encoding="utf-8")
    assert "INPUT: rows.jsonl changed" in run(*arguments, code=2).stderr


def test_another_model_is_not_gone_on_with(model_folder: Path, tmp_path: Path) -> None:
    run(model_folder, "rows.jsonl", "out", *COMMON, "--limit", 2)
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    run(other, "rows.jsonl", "out", *COMMON, "--limit", 2)  # the same weights elsewhere
    config = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    assert "MODEL was" in run(other, "rows.jsonl", "out", *COMMON, "--limit", 2, code=2).stderr


@pytest.mark.parametrize("name", ["parquet", "csv"])
def test_other_formats_hold_the_same(model_folder: Path, name: str) -> None:
    run(model_folder, "rows.jsonl", "lines", *COMMON, "--keep", "stars", "--keep", "é")
    run(model_folder, "rows.jsonl", "out", *COMMON, "--keep", "stars", "--keep", "é", "--format", name)
    [part] = Path("out").glob("part-*")
    if name == "csv":
        with part.open(encoding="utf-8", newline="") as file:
            found: list[dict[str, Any]] = [row | {"stars": int(row["stars"])} for row in csv.DictReader(file)]
    else:
        found = pq.read_table(part).to_pylist()
    assert found == records("lines")


def test_csv_and_parquet_are_read(model_folder: Path, rows: Path) -> None:
    run(model_folder, "rows.jsonl", "lines", *COMMON, "--keep", "review", "--format", "csv")
    [part] = Path("lines").glob("part-*.csv")
    again = Path("copy")
    again.mkdir()
    shutil.copy(part, again / "a.csv")
    run(model_folder, "copy", "out", "--map", "input_string=review", "--param", "max_tokens=3")
    with part.open(encoding="utf-8", newline="") as file:
        wanted = [(row["id"], row["output_string"]) for row in csv.DictReader(file)]
    assert [(row["id"], row["output_string"]) for row in records("out")] == wanted


def test_a_batch_file_is_answered_in_its_own_form(model_folder: Path) -> None:
    body = {"model": "gpt-x", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
    lines = [{"custom_id": f"c{n}", "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(3)]
    lines[1]["body"] = body | {"temperature": -1}
    Path("requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "--name gpt-x" in run(model_folder, "requests.jsonl", "out", code=2).stderr
    done = run(model_folder, "requests.jsonl", "out", "--name", "gpt-x", "--max-errors", 1)
    assert "1 rows failed" in done.stderr
    assert [(one["custom_id"], one["response"]["status_code"]) for one in records("out")] == [("c0", 200), ("c2", 200)]
    [error] = [json.loads(line) for line in Path("out/errors.jsonl").read_text().splitlines()]
    assert (error["custom_id"], error["response"]["body"]["error"]["param"]) == ("c1", "temperature")
    for option in (("--param", "seed=1"), ("--format", "csv"), ("--keep", "url"), ("--map", "text=url")):
        assert (
            f"{option[0]} = " in run(model_folder, "requests.jsonl", "new", "--name", "gpt-x", *option, code=2).stderr
        )


def test_too_many_errors_end_with_a_code_of_their_own(model_folder: Path) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": null}\n{"prompt": "b"}\n{"prompt": 5}\n')
    done = run(model_folder, "rows.jsonl", "out", "--param", "max_tokens=2", "--json", code=4)
    assert "2 of 4 rows failed, and --max-errors allows 0" in done.stderr
    assert json.loads(done.stdout)["status"] == "stopped"
    assert [row["id"] for row in records("out")] == ["rows.jsonl:1", "rows.jsonl:3"]
    run(model_folder, "rows.jsonl", "out", "--param", "max_tokens=2", "--max-errors", "50%")


def test_a_dry_run_answers_three_rows_and_writes_nothing(model_folder: Path) -> None:
    told = json.loads(run(model_folder, "rows.jsonl", "out", *COMMON, "--dry-run", "--json").stdout)
    assert (told["rows"], told["files"], told["form"]) == (10, 1, "rows")
    assert [one["id"] for one in told["tried"]] == ["r0", "r1", "r2"]
    assert all(isinstance(one["answer"]["output_string"], str) for one in told["tried"])
    assert not Path("out").exists()


@pytest.mark.parametrize(("more", "half"), [(["--json"], "\ud83d"), ([], "\ufffd")])
def test_a_dry_run_shows_whatever_stands_in_ids(model_folder: Path, more: list[str], half: str) -> None:
    rows = pa.table({"id": [date(2026, 3, 1)], "input_string": ["Hello"]})
    pq.write_table(rows, "days.parquet")
    options = ["--param", "max_tokens=2", "--dry-run", *more]
    assert json.loads(run(model_folder, "days.parquet", "out", *options).stdout)["tried"][0]["id"] == "2026-03-01"
    Path("half.jsonl").write_text('{"id": "\\ud83d", "input_string": "Hello"}')
    told = json.loads(run(model_folder, "half.jsonl", "out", *options).stdout)
    assert told["tried"][0]["id"] == half


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "rows.jsonl:1: column = 'input_string'.* but id, review, stars, é"),
        (("--map", "text=nothing"), "rows.jsonl:1: column = 'nothing'"),
        (("--map", "label=review"), "--map = 'label=review': the model reads"),
        (("--map", "review"), "--map = 'review': write NAME=VALUE"),
        ((*COMMON, "--keep", "output_string=stars"), "--keep input_output_string=stars"),
        ((*COMMON, "--keep", "id"), "--keep = 'id'"),
        ((*COMMON, "--format", "xml"), "--format = 'xml': write one of jsonl, parquet, csv"),
        ((*COMMON, "--max-errors", "many"), "--max-errors = 'many'"),
        ((*COMMON, "--param", "max_token=3"), "--param = 'max_token=3'.*did you mean max_tokens"),
        ((*COMMON, "--param", "temperature=-2"), "--param = 'temperature=-2'"),
        ((*COMMON, "--key-env", "KEY"), "is no endpoint"),
        ((*COMMON, "--name", "other"), "--name = 'other': goes with OpenAI batch files"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    model_folder: Path, arguments: tuple[str, ...], told: str
) -> None:
    done = run(model_folder, "rows.jsonl", "out", *arguments, code=2)
    assert not Path("out").exists()
    assert done.stderr.count("error:") == 1
    assert re.search(told, done.stderr), done.stderr


def test_folders_are_checked(model_folder: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        ingot.batch(model_folder, "empty", "out")
    Path("used").mkdir()
    Path("used/notes.txt").write_text("mine")
    with pytest.raises(FieldError, match="holds other files and no batch"):
        ingot.batch(model_folder, "rows.jsonl", "used")
    assert sorted(path.name for path in Path().iterdir()) == ["empty", "rows.jsonl", "used"]
    options = Options(mapping={"input_string": "review"}, limit=1)
    ingot.batch(model_folder, "**/*.jsonl", "out", options)
    with pytest.raises(FieldError, match="holds all files that INPUT matches"):
        ingot.batch(model_folder, "out/part-00000.jsonl", "out", options)


def test_a_glob_that_reaches_its_output_goes_on(model_folder: Path) -> None:
    options = Options(mapping={"input_string": "review"}, params={"max_tokens": 2}, bucket_rows=4)
    whole = ingot.batch(model_folder, "**/*", "out", options)
    Path("out/part-00001.jsonl").unlink()
    again = ingot.batch(model_folder, "**/*", "out", options)
    assert (whole["rows"], again["rows"], again["rows_from_before"]) == (10, 10, 6)
    assert [row["id"] for row in records("out")] == [row["id"] for row in ROWS]


def test_a_model_that_cannot_be_read_is_told_in_one_line(model_folder: Path) -> None:
    weights = Path(model_folder, "model.safetensors").read_bytes()
    config = json.loads(Path(model_folder, "config.json").read_text())
    wider = json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]})
    for number, (file, content, told) in enumerate(
        [
            ("model.safetensors", weights[:-100], "the weights cannot be read"),
            ("config.json", wider.encode(), "in other shapes than config.json says"),
            ("config.json", b"{", "config.json is not JSON"),
            ("ingot.json", b"{", "ingot.json is no JSON object"),
        ]
    ):
        shutil.copytree(model_folder, f"model-{number}")
        Path(f"model-{number}", file).write_bytes(content)
        assert told in run(f"model-{number}", "rows.jsonl", "out", *COMMON, code=2).stderr
        assert not Path("out").exists()


def test_an_input_without_rows_is_a_finished_batch(model_folder: Path) -> None:
    Path("none.jsonl").write_text("")
    found = ingot.batch(model_folder, "none.jsonl", "out")
    assert (found["status"], found["rows"], found["parts"]) == ("finished", 0, 0)


def test_an_endpoint_answers_a_batch() -> None:
    with FakeServer(lambda path, body: text(body["messages"][0]["content"].upper())) as server:
        address = f"{server.url}#tiny"
        told = json.loads(run(address, "rows.jsonl", "out", *COMMON, "--at-once", 2, "--json").stdout)
        assert (told["answers"], told["tokens"]["input"]) == (10, 70)
        assert server.most_at_once <= 2
        assert server.asked[0][1]["max_tokens"] == 3
    assert [row["output_string"] for row in records("out")] == [row["review"].upper() for row in ROWS]  # type: ignore[attr-defined]


def test_a_model_that_was_not_promoted_answers_nothing(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(target: Path, override: str | None) -> None:
        asked.append((target, override))
        raise NotPromoted("evaluate.promotion is not met")

    monkeypatch.setattr(batches, "require_promotion", refuse)
    assert "is not met" in run(model_folder, "rows.jsonl", "out", *COMMON, "--override", "Ann: why", code=3).stderr
    assert asked == [(model_folder, "Ann: why")]
    assert not Path("out").exists()


def test_repeated_ids_are_told_and_refused_in_batch_files(model_folder: Path, rows: Path) -> None:
    rows.write_text("".join(json.dumps(row | {"id": "same"}) + "\n" for row in ROWS[:3]))
    done = run(model_folder, "rows.jsonl", "out", *COMMON)
    assert "2 rows have the id of an earlier one, the first at rows.jsonl:2" in done.stderr
    assert json.loads(Path("out/summary.json").read_text())["repeated_ids"] == 2
    assert len(records("out")) == 3
    body = {"model": model_folder.name, "prompt": "Hello", "max_tokens": 2}
    line = {"custom_id": "same", "method": "POST", "url": "/v1/completions", "body": body}
    rows.write_text(2 * (json.dumps(line) + "\n"))
    told = run(model_folder, "rows.jsonl", "other", code=2).stderr
    assert "rows.jsonl:2" in told
    assert "custom_id" in told
    assert not Path("other").exists()
