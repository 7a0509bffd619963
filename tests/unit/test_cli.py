"""The command line itself: help, schema, inspect, runs. Nothing here trains."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ingot.cli import app
from ingot.recipe import Recipe
from ingot.recipe_io import json_schema, load_recipe

ROOT = Path(__file__).resolve().parents[2]
VERBS = "run finetune evaluate compare package batch serve conform inspect schema runs cache check consolidate".split()
GROUPS = "keys models".split()
RECIPES = sorted(set((ROOT / "recipes").rglob("*.yaml")) - set((ROOT / "recipes").glob("tasks/*")))


def ingot(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_help_lists_every_verb():
    shown = ingot("--help").stdout
    assert all(f" {verb} " in shown for verb in [*VERBS, *GROUPS])
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_examples(verb):
    result = ingot(verb, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"ingot {verb}" in result.stdout.split("Example")[1]


@pytest.mark.parametrize("verb", ["run", "finetune", "evaluate", "package", "serve", "batch", "conform"])
def test_verb_without_its_argument_names_it(verb):
    result = ingot(verb)
    assert result.exit_code == 2
    assert "Missing argument" in result.stderr


def test_unknown_verb_and_option():
    result = ingot("tune")
    assert result.exit_code == 2
    assert "tune" in result.stderr
    result = ingot("run", "recipe.yaml", "--sumary", "x")
    assert result.exit_code == 2
    assert "--summary" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "field", "fix"),
    [
        ("serve m --port 99999", "--port = '99999'", "65535"),
        ("serve m --deadline soon", "--deadline = 'soon'", "valid number"),
        ("serve m --log-format xml", "--log-format = 'xml'", "'text', 'json'"),
        ("batch m in.jsonl out --bucket-rows 0", "--bucket-rows = '0'", "greater than or equal to 1"),
        ("conform m --timeout 0", "--timeout = '0'", "greater than or equal to 1"),
        ("models promote", "Missing argument 'MODEL'", "ingot models promote --help"),
        ("--verbos run", "No such option: --verbos", "ingot --help"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: str, field: str, fix: str) -> None:
    result = ingot(*arguments.split())
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith(f"error: {field}")
    assert fix in line
    assert not result.stdout


def keys_fit(schema: dict[str, Any], values: dict[str, Any], definitions: dict[str, Any], at: str = "") -> list[str]:
    """Keys of `values` that the schema does not know, and required ones that are missing."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "properties" not in schema:
        return []
    wrong = [f"{at}{key}" for key in values if key not in schema["properties"]]
    wrong += [f"{at}{key} missing" for key in schema.get("required", []) if key not in values]
    for key, value in values.items():
        if isinstance(value, dict) and key in schema["properties"]:
            wrong += keys_fit(schema["properties"][key], value, definitions, f"{at}{key}.")
    return wrong


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_schema_fits_every_shipped_recipe(path):
    schema = json.loads(ingot("schema").stdout)
    assert schema == json_schema()
    values = load_recipe(path).model_dump(mode="json", exclude_defaults=True)
    assert keys_fit(schema, values, schema["$defs"]) == []
    assert keys_fit(schema, values | {"modell": {}}, schema["$defs"]) == ["modell"]
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft202012Validator(schema)
    checker.check_schema(schema)
    checker.validate(values)


def test_schema_describes_every_field():
    schema = json.loads(ingot("schema").stdout)
    sections = [schema, *schema["$defs"].values()]
    bare = [
        name
        for section in sections
        for name, field in section.get("properties", {}).items()
        if "description" not in field and "$ref" not in field and "name" not in field
    ]
    assert bare == []
    assert set(Recipe.model_fields) == set(schema["properties"])


@pytest.fixture
def recipe_file(tmp_path: Path, make_tokenizer: Any) -> Path:
    """Inspecting needs a tokenizer and a configuration, no weights."""
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Thank you"}]
    (tmp_path / "rows.jsonl").write_text(
        (json.dumps({"messages": turns}) + "\n") * 1
        + "".join(
            json.dumps({"messages": [{"role": "user", "content": f"Hello {n}"}, turns[1]]}) + "\n" for n in range(19)
        )
    )
    path = tmp_path / "recipe.yaml"
    path.write_text("name: look\nmodel: {source: model}\ndata: {train: rows.jsonl}\n")
    return path


def test_inspect_as_json(recipe_file):
    result = ingot("inspect", recipe_file, "--json", "--rows", 2)
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    assert len(shown["rows"]) == 2
    for row in shown["rows"]:
        learned = "".join(segment["text"] for segment in row["segments"] if segment["trainable"])
        assert learned == "Thank you<|im_end|>"
        assert 0 < row["trainable"] < row["tokens"]
    assert shown["data"]["counts"] == {"train": 17, "validation": 1, "test": 2}
    assert shown["truncation"]["truncated"] == 0


def test_inspect_in_colour(recipe_file, monkeypatch):
    from rich.console import Console

    from ingot import cli

    console = Console(force_terminal=True, color_system="standard", width=100, record=True)
    monkeypatch.setattr(cli, "out", console)
    result = ingot("inspect", recipe_file, "--part", "test", "--rows", 1)
    assert result.exit_code == 0, result.stderr
    styled = console.export_text(styles=True)
    assert "\x1b[1;32mThank you\x1b[0m" in styled  # learned: bold green
    assert "\x1b[1;7;32m<|im_end|>" in styled  # the learned stop token: reversed
    assert "\x1b[2m" in styled  # what is only read: dimmed
    assert "test: 2 of 2 rows usable" in " ".join(result.stdout.split()) or "rows usable" in styled


def test_inspect_of_an_unknown_part_names_the_parts(recipe_file):
    result = ingot("inspect", recipe_file, "--part", "dev")
    assert result.exit_code == 2
    assert "validation" in result.stderr


def test_the_cache_is_listed_and_cleared(tmp_path, monkeypatch):
    monkeypatch.setenv("INGOT_CACHE", str(tmp_path))
    assert "nothing is cached" in ingot("cache").stdout
    for name in ("rows.jsonl-0123", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "facts.json").write_text('{"rows": 1234}')
    (tmp_path / "rows.jsonl-0123" / "train.arrow").write_bytes(b"0" * 2_000_000)
    shown = ingot("cache").stdout
    assert "rows.jsonl-0123  1,234  2.0" in " ".join(shown.split("\n")).replace("   ", "  ")
    [entry] = json.loads(ingot("cache", "--json").stdout)["entries"]
    assert (entry["name"], entry["rows"], entry["bytes"]) == ("rows.jsonl-0123", 1234, 2_000_014)
    assert "2.0 MB freed" in ingot("cache", tmp_path, "--clear").stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]  # what is no entry is not touched


@pytest.mark.parametrize("verb", ["run", "finetune"])
def test_flags_for_a_look_inside_are_settings(verb, recipe_file, monkeypatch):
    from ingot import verbs

    seen = []

    def stop(recipe, **options):
        seen.append(recipe.diagnose.model_dump())
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, verb, stop)
    ingot(verb, recipe_file, "--profile", 3, "--memory-snapshot")
    ingot(verb, recipe_file)
    assert seen == [
        {"profile_steps": 3, "memory_snapshot": True},
        {"profile_steps": 0, "memory_snapshot": False},
    ]


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ((), ["package", "package-quantized"]),
        (("--form", "adapter", "--form", "merged"), ["package-adapter", "package"]),
    ],
)
def test_packaging_names_every_package(tmp_path, monkeypatch, asked, made):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"home": str(tmp_path)}))
    forms = "{forms: [merged, quantized]}"
    (folder / "resolved.yaml").write_text(f"name: a\nmodel: {{source: b}}\ndata: {{train: c}}\npackage: {forms}\n")
    monkeypatch.setattr("ingot.verbs.package", lambda run, **what: folder / made[0])
    shown = ingot("package", folder, *asked)
    assert [line.rpartition("/")[2] for line in shown.stdout.splitlines()[:-1]] == made
    found = json.loads(ingot("package", folder, *asked, "--json").stdout)
    assert found["package"] == str(folder / made[0])
    assert list(found["forms"].values()) == [str(folder / name) for name in made]
