"""Every shipped recipe loads, round-trips, and says on its first lines what to expect of it."""

import re
from pathlib import Path

import pytest

from ingot.recipe_io import dump_recipe, load_recipe, parse_recipe_text

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
WANTED = ("command", "hardware", "time", "score")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_are_recipes() -> None:
    assert ROOT / "recipes" / "quickstart.yaml" in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_loads_and_round_trips(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe_text(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_first_lines_say_what_to_expect(path: Path) -> None:
    head = path.read_text(encoding="utf-8").splitlines()[: len(WANTED)]
    facts = dict(re.match(r"# (\w+): +(\S.*)", line).groups() for line in head)  # type: ignore[union-attr]
    assert tuple(facts) == WANTED
    assert name_of(path) in facts["command"]
    for name in ("time", "score"):
        # A figure as measured, or the admission that there is none; "(measured below)" is neither.
        assert re.search(r"\d", facts[name]) or facts[name].startswith("not measured"), f"{name}: {facts[name]}"


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
