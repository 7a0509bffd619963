"""Every shipped recipe loads, round-trips, and says on its first lines what to expect of it."""

import re
from pathlib import Path

import pytest

from ingot.recipe_io import dump_recipe, load_recipe, parse_recipe_text

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))
TASKS = [path for path in SHIPPED if path.parent.name == "tasks"]  # what is asked, without a model
RECIPES = [path for path in SHIPPED if path not in TASKS]
WANTED = ("command", "hardware", "time", "score")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_are_recipes() -> None:
    assert ROOT / "recipes" / "quickstart.yaml" in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_loads_and_round_trips(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe_text(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_first_lines_say_what_to_expect(path: Path) -> None:
    head = path.read_text(encoding="utf-8").splitlines()[: len(WANTED)]
    facts = dict(re.match(r"# (\w+): +(\S.*)", line).groups() for line in head)  # type: ignore[union-attr]
    assert tuple(facts) == WANTED
    assert name_of(path) in facts["command"]
    for name in ("time", "score"):
        # A figure as measured, or the admission that there is none; "(measured below)" is neither.
        assert re.search(r"\d", facts[name]) or facts[name].startswith("not measured"), f"{name}: {facts[name]}"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_what_a_recipe_runs_is_packaged(path: Path) -> None:
    command = path.read_text(encoding="utf-8").splitlines()[0].split()
    assert load_recipe(path).package.enabled == ("run" in command), command  # `ingot finetune` packages nothing


@pytest.mark.parametrize("path", TASKS, ids=name_of)
def test_task_file_loads_and_asks(path: Path, request: pytest.FixtureRequest) -> None:
    from ingot.data.splits import scan
    from ingot.evaluation.definition import as_recipe, load_definition
    from ingot.evaluation.prompted import DefinedTask, describe
    from ingot.recipe import Model

    made = load_definition(path)
    assert made.task == path.stem
    if "shared/" in path.read_text(encoding="utf-8"):
        request.getfixturevalue("shared_dir")
    if made.prompted:
        rows = sum(map(len, DefinedTask(made, path.parent).windows()))
    else:
        recipe = as_recipe(made, Model(source="ingot://nano"))
        rows = scan(recipe, path.parent).report.counts["test"]
    assert rows >= 400
    assert describe(made, path.parent, 2).count("\n--- ") >= 2


# What a recipe names that is another recipe's output, or on a hub that no test asks.
STAND_INS = {
    "recipes/pretrain/nano.yaml": ["model.source=ingot://nano"],
    "recipes/chat-completion/qwen3.yaml": ["model.source=ingot://nano"],
    # A student that is its teacher has nothing to learn.
    "recipes/distillation/distillation.yaml": ["objective.teacher=ingot://nano", "model.initialization=random"],
}


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_the_trust_gate_raises_no_false_alarm(path: Path, request: pytest.FixtureRequest) -> None:
    from ingot import verbs

    if "shared/" in path.read_text(encoding="utf-8"):
        request.getfixturevalue("shared_dir")
    recipe = load_recipe(path, STAND_INS.get(name_of(path), []))
    report = verbs.check(recipe, home=path.parent)
    assert [(verdict.name, verdict.because) for verdict in report.failures] == []
