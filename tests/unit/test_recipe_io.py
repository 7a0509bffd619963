"""Reading, explaining, dumping and hashing recipes."""

import json
from pathlib import Path

import pytest

from ingot.errors import RecipeError
from ingot.recipe import Recipe
from ingot.recipe_io import (
    dump_recipe,
    flat_params,
    json_schema,
    load_recipe,
    parse_recipe,
    parse_recipe_text,
    recipe_hash,
)

BASE = "name: a\nmodel:\n  source: ingot://nano\ndata:\n  train: rows.jsonl\n"


def complaint(text: str, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse_recipe_text(text, overrides, source="r.yaml")
    return caught.value


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "0.0001", "1.0e-04"])
def test_floats_are_read_as_people_write_them(written: str) -> None:
    assert parse_recipe_text(BASE + f"optim: {{lr: {written}}}\n").optim.lr == 1e-4


@pytest.mark.parametrize("word", ["no", "on", "2024-01-01", "12:30", "0x1F", "1_000"])
def test_words_of_yaml_1_1_stay_text(word: str) -> None:
    assert parse_recipe_text(BASE + f"description: {word}\n").description == word


def test_leading_zero_is_decimal() -> None:
    assert parse_recipe_text(BASE + "train: {seed: 010}\n").train.seed == 10


def test_unknown_key_names_file_line_and_nearest() -> None:
    error = complaint(BASE + "optim:\n  weight_decay: 0.1\n  lrr: 3\n")
    assert (error.field, error.value, error.where) == ("optim.lrr", 3, "r.yaml:8")
    assert error.fix == "unknown field, did you mean 'lr'?"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("lr: 1", "optim.lr"),
        ("learning_rate: 1", "optim.lr"),
        ("optim: {seed: 1}", "train.seed"),
        ("modle: 1", "model"),
    ],
)
def test_unknown_key_elsewhere_is_found(written: str, meant: str) -> None:
    assert f"did you mean {meant!r}?" in complaint(BASE + written + "\n").fix


def test_typo_in_a_section_comes_before_the_section_it_leaves_missing() -> None:
    error = complaint(BASE.replace("model:", "modle:"))
    assert error.field == "modle"
    assert "also r.yaml: model = None: is missing" in str(error)


def test_all_problems_are_listed_in_the_order_of_the_file() -> None:
    message = str(complaint(BASE + "optim:\n  lr: fast\nadapter:\n  rank: 0\n  kind: loar\n"))
    assert message.startswith("r.yaml:7: optim.lr = 'fast'")
    assert message.index("r.yaml:9: adapter.rank = 0") < message.index("r.yaml:10: adapter.kind = 'loar'")


@pytest.mark.parametrize(
    ("section", "field", "fix"),
    [
        ("adapter: {rank: true}", "adapter.rank", "whole number"),
        ("adapter: {rank: '16'}", "adapter.rank", "whole number"),
        ("adapter: {rank: 1.5}", "adapter.rank", "whole number"),
        ("adapter: {targets: 3}", "adapter.targets", "'all-linear' or must be a list"),
        ("train: {group_by_length: 1}", "train.group_by_length", "boolean"),
        ("optim: {betas: [0.9]}", "optim.betas[1]", "missing"),
        ("optim: {lr: .nan}", "optim.lr", "finite"),
        ("optim: {lr: 1e999}", "optim.lr", "finite"),
        ("optim:", "optim", "section"),
        ("description: 12", "description", "put it in quotes"),
    ],
)
def test_wrong_types_are_refused(section: str, field: str, fix: str) -> None:
    error = complaint(BASE + section + "\n")
    assert error.field == field
    assert fix in error.fix
    assert error.where == "r.yaml:6"


def test_rule_over_several_fields_points_at_the_first() -> None:
    error = complaint(BASE + "train:\n  tokens_per_microbatch: 10\n")
    assert (error.field, error.value, error.where) == ("train.tokens_per_microbatch", 10, "r.yaml:7")
    assert error.fix.startswith("cannot hold one row")


@pytest.mark.parametrize(
    ("text", "fix", "where"),
    [
        ("", "is empty", ""),
        ("# nothing\n", "is empty", ""),
        ("- a\n- b\n", "must be a mapping", "r.yaml:1"),
        (BASE + "optim:\n\tlr: 1\n", "spaces, not tabs", "r.yaml:7"),
        (BASE + "name: b\n", "written twice (first in r.yaml:1)", "r.yaml:6"),
        (BASE + "optim: [1\n", "is not YAML", "r.yaml:7"),
        (BASE + "description: &x hi\nserve: {host: *x}\n", "aliases", "r.yaml:7"),
        (BASE + "description: !!python/name:os.system x\n", "tag", "r.yaml:6"),
    ],
    ids=["empty", "comments", "list", "tab", "twice", "syntax", "alias", "tag"],
)
def test_unusable_yaml_is_explained(text: str, fix: str, where: str) -> None:
    error = complaint(text)
    assert fix in error.fix
    assert error.where == where


def test_overrides_win_and_the_last_one_counts() -> None:
    recipe = parse_recipe_text(
        BASE, ["optim.lr=1e-4", "optim.lr=1e-3", "adapter.targets=[q_proj, v_proj]", "train.max_steps=null"]
    )
    assert recipe.optim.lr == 1e-3
    assert recipe.adapter.targets == ["q_proj", "v_proj"]
    assert recipe.train.max_steps is None


def test_override_opens_the_short_form_of_rows() -> None:
    recipe = parse_recipe_text(BASE, ["data.train.format=csv", "data.test.uri=t.csv", "data.columns.prompt=mr"])
    assert (recipe.data.train.uri, recipe.data.train.format) == ("rows.jsonl", "csv")
    assert recipe.data.test is not None
    assert recipe.data.columns == {"prompt": "mr"}


MIXTURE = BASE.replace("rows.jsonl", "[a.jsonl, {uri: b.jsonl, weight: 3}]")


def test_rows_may_be_a_mixture() -> None:
    recipe = parse_recipe_text(MIXTURE)
    assert [(source.uri, source.weight) for source in recipe.data.train] == [("a.jsonl", 1.0), ("b.jsonl", 3.0)]
    assert parse_recipe_text(dump_recipe(recipe)) == parse_recipe_text(dump_recipe(recipe, resolved=False)) == recipe
    assert '"weight": 3.0' in flat_params(recipe)["data.train"]


def test_overrides_reach_into_a_mixture_and_replace_it() -> None:
    recipe = parse_recipe_text(MIXTURE, ["data.train[1].weight=2", "data.train[0].format=csv"])
    assert [(source.uri, source.format, source.weight) for source in recipe.data.train] == [
        ("a.jsonl", "csv", 1.0),
        ("b.jsonl", "auto", 2.0),
    ]
    assert parse_recipe_text(MIXTURE, ["data.train=c.csv"]).data.train.uri == "c.csv"
    assert len(parse_recipe_text(BASE, ["data.train=[a, b, c]"]).data.train) == 3
    for override in ("data.train.weight=2", "data.train[2].weight=2"):
        error = complaint(MIXTURE, override)
        assert "data.train is a list of 2; name one of them, e.g. data.train[0]" in error.fix
        assert override in str(error)


@pytest.mark.parametrize(
    ("rows", "field", "fix", "where"),
    [
        ("\n  - a\n  - {uri: b, wieght: 2}", "data.train[1].wieght", "did you mean 'weight'?", "r.yaml:7"),
        ("\n  - a\n  - {uri: b, weight: 0}", "data.train[1].weight", "greater than 0", "r.yaml:7"),
        ("\n  - a\n  - {format: csv}", "data.train[1].uri", "is missing", "r.yaml:7"),
        ("\n  - {uri: b, format: cvs}", "data.train[0].format", "'csv'", "r.yaml:6"),
        ("\n  - a\n  - 3", "data.train[1]", "section", "r.yaml:7"),
        (" []", "data.train", "at least 1 item", "r.yaml:5"),
        (" {uri: b, formt: csv}", "data.train.formt", "did you mean 'format'?", "r.yaml:5"),
        (" 3", "data.train", "section", "r.yaml:5"),
    ],
)
def test_what_is_wrong_with_rows_is_said_of_the_source_alone(rows: str, field: str, fix: str, where: str) -> None:
    error = complaint(BASE.replace("train: rows.jsonl", f"train:{rows}"))
    assert (error.field, error.where) == (field, where)
    assert fix in error.fix
    assert "list" not in error.fix.lower() or rows == " []"
    assert "also" not in error.fix


@pytest.mark.parametrize(
    ("override", "field", "fix"),
    [
        ("optim.lrr=1", "optim.lrr", "did you mean 'lr'?"),
        ("optim.lr=", "optim.lr", "has no value"),
        ("optim.lr", "override", "write dotted.field=value"),
        ("=1", "override", "write dotted.field=value"),
        ("model.source.x=1", "model.source.x", "override it as a whole"),
        ("optim.lr=fast", "optim.lr", "valid number"),
    ],
)
def test_bad_overrides_name_themselves(override: str, field: str, fix: str) -> None:
    error = complaint(BASE, override)
    assert error.field == field
    assert fix in error.fix
    assert override in str(error)


def test_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "support.yaml").write_text(BASE)
    for wrong in ("chat/suport.yaml", "chta/support.yaml", "support.yaml"):
        with pytest.raises(RecipeError, match=r"did you mean '.*chat/support\.yaml'"):
            load_recipe(tmp_path / wrong)


def test_folder_and_binary_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"is a folder; name one recipe file in it: a\.yaml"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "a.yaml")


def test_byte_order_mark_is_looked_through(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_recipe(tmp_path / "a.yaml").name == "a"


@pytest.mark.parametrize("resolved", [True, False])
@pytest.mark.parametrize("text", ["1e-4", "no", "null", "010", "a\n  b: {c}\n", "über ✓", "- x", "#", "", "12:30", "~"])
def test_dump_round_trips(text: str, resolved: bool) -> None:
    values = {"data": {"train": "x", "prompt_template": "{prompt}", "columns": {"prompt": text}}, "description": text}
    recipe = parse_recipe({"name": "a", "model": {"source": "m"}} | values | {"optim": {"lr": 1e-5}})
    assert parse_recipe_text(dump_recipe(recipe, resolved)) == recipe


def test_resolved_dump_spells_defaults_out() -> None:
    recipe = parse_recipe_text(BASE)
    assert "weight_decay: 0.0" in dump_recipe(recipe)
    assert "weight_decay" not in dump_recipe(recipe, resolved=False)


def test_hash_sees_results_only() -> None:
    recipe = parse_recipe_text(BASE)
    same = parse_recipe_text(
        "data:\n  train: {format: auto, uri: rows.jsonl}\nmodel: {source: ingot://nano}\nname: b\noutput: elsewhere\n"
        "train: {epochs: 1}\ntrack: {enabled: false}\nserve: {port: 9}\n"
    )
    assert recipe_hash(same) == recipe_hash(recipe)
    assert len(recipe_hash(recipe)) == 64
    assert recipe_hash(parse_recipe_text(BASE, ["data.cache=/elsewhere"])) == recipe_hash(recipe)
    for override in ("optim.lr=1e-4", "train.seed=1", "data.train=other.jsonl", "evaluate.max_rows=10"):
        assert recipe_hash(parse_recipe_text(BASE, [override])) != recipe_hash(recipe)


def test_flat_params_are_strings_by_dotted_name() -> None:
    params = flat_params(parse_recipe_text(BASE, ["data.columns={prompt: mr}"]))
    assert params["optim.lr"] == "0.0002"
    assert params["optim.betas"] == "[0.9, 0.999]"
    assert params["data.columns.prompt"] == "mr"
    assert params["train.max_steps"] == "null"
    assert all(isinstance(value, str) for value in params.values())
    assert len(params) < 200


def test_schema_describes_the_file() -> None:
    schema = json_schema()
    assert schema["$id"] == "urn:ingot:recipe"
    assert schema["additionalProperties"] is False
    assert {"type": "string", "minLength": 1} in schema["$defs"]["Data"]["properties"]["train"]["anyOf"]
    jsonschema = pytest.importorskip("jsonschema")
    for rows, fits in (
        ("a", True), ({"uri": "a"}, True), (["a", {"uri": "b", "weight": 2}], True),
        ([], False), ([{"urii": "b"}], False), (["a", 3], False), (3, False),
    ):  # fmt: skip
        recipe = {"name": "a", "model": {"source": "m"}, "data": {"train": rows}}
        assert jsonschema.Draft202012Validator(schema).is_valid(recipe) == fits, rows
    assert schema["$defs"]["Optim"]["properties"]["lr"]["default"] == 2e-4
    assert set(schema["properties"]) == set(Recipe.model_fields)
    json.dumps(schema)


@pytest.mark.parametrize("values", [{"name": "a", "model": {"source": Path("m")}}, {"name": {1, 2}}])
def test_values_that_yaml_cannot_hold_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="plain values"):
        parse_recipe(values)
