"""What is wrong with a promotion policy is told before anything is trained."""

from dataclasses import replace
from typing import Any

import pytest

from ingot.errors import RecipeError
from ingot.evaluation.policy import Measured, check_policy
from ingot.recipe_evaluate import Promotion
from ingot.recipe_io import parse_recipe

OWN = Measured("test", "chat-completion", 300, ("json_exact_match", "json_argument_f1"))
OTHER = Measured("letters", "perplexity", 500, ("bits_per_byte",), ("language", "length"))
PARTS = Measured("parts", "text-generation", 500, ("exact_match@first", "exact_match@last"))
VALID: dict[str, Any] = {"metric": "json_exact_match"}


def checked(rule: dict[str, Any], alpha: float = 0.025) -> list[str]:
    return check_policy(Promotion(rules=[VALID, VALID | rule], alpha=alpha), [OWN, OTHER, PARTS])


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"task": "leters"}, "rules[1].task = 'leters': it is not measured: did you mean 'letters'?"),
        ({"metric": "json_exact"}, "rules[1].metric = 'json_exact': did you mean 'json_exact_match'?"),
        ({"metric": "acc"}, "rules[1].metric = 'acc': chat-completion has "),
        (
            {"metric": "rougeL"},
            "is not measured on test (json_exact_match, json_argument_f1 are); name it in evaluate.m",
        ),
        (
            {"metric": "bits_per_byte", "task": "letters", "slices": ["langauge"]},
            "no row of letters has it: did you mean",
        ),
        ({"metric": "perplexity", "task": "letters"}, "name it in its file's metrics"),
        ({"metric": "exact_match@frist", "task": "parts"}, "is not measured on parts"),
        ({"min_rows": 301}, "rules[1].min_rows = 301: test has 300 rows, so the rule can never hold"),
        ({"margin": 2}, "rules[1].margin = 2.0: json_exact_match is a share between 0 and 1"),
        ({"require": "at_least", "value": 80}, "rules[1].value = 80.0: json_exact_match is a share between 0 and 1"),
        ({"require": "at_least", "value": 0.99}, "300 rows show no more than 0.9874, all of them right"),
    ],
)
def test_a_rule_that_can_never_hold_is_refused(rule: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        checked(rule)
    assert "evaluate.promotion.rules[1]." in str(refused.value)
    assert said in str(refused.value)


def test_rows_of_too_few_groups_are_refused() -> None:
    few = Measured("test", "chat-completion", 300, OWN.metrics, None, 19)
    with pytest.raises(RecipeError, match="rows are in 19 groups, and fewer than 20 decide nothing"):
        check_policy(Promotion(rules=[VALID]), [few])
    check_policy(Promotion(rules=[VALID]), [replace(few, groups=20)])


def test_rules_that_can_hold_are_not_refused() -> None:
    checked({"require": "at_least", "value": 0.987})
    checked({"metric": "JSON_exact_match"})
    checked({"metric": "exact_match@last", "task": "parts"})
    checked({"metric": "bits_per_byte", "task": "letters", "require": "at_least", "value": 3, "slices": ["language"]})


def test_what_the_rows_can_hardly_show_is_said() -> None:
    """300 rows, models disagreeing on 10 %: 5.1 points, as the note on the paired test has it."""
    better, stricter = checked({"margin": 0.02})
    assert better.endswith("on 300 rows: a gain of less than 5.1 points will often go unseen")
    assert "less than 5.1 points beyond the margin of 2 will often go unseen" in stricter
    assert "loses nothing will often fail a margin of 5 points" in checked({"require": "not_worse", "margin": 0.05})[1]
    assert len(checked({"require": "not_worse", "margin": 0.06})) == 1
    assert "less than 7.1 points" in checked({}, alpha=0.001)[0]
    few = Measured("test", "chat-completion", 3, OWN.metrics)
    [note] = check_policy(Promotion(rules=[VALID | {"min_rows": 3}]), [few])
    assert "so few rows show no difference that is likely" in note


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"rules": [VALID | {"require": "not_worse"}]}, "margin must be above 0"),
        ({"rules": [VALID | {"require": "at_least"}]}, "value is missing"),
        ({"rules": [VALID | {"require": "at_least", "value": 1, "margin": 1}]}, "at_least has value, remove it"),
        ({"rules": [VALID | {"value": 1}]}, "better has margin, remove it"),
        ({"rules": []}, "evaluate.promotion.rules = []"),
        ({"rules": [VALID | {"margin": -0.1}]}, "evaluate.promotion.rules[0].margin = -0.1"),
        ({"rules": [VALID], "alpha": 0.5}, "evaluate.promotion.alpha = 0.5"),
        ({"rules": [VALID], "alpha": 0.004}, "evaluate.bootstrap_samples = 1000 are too few to tell"),
        ({"rules": [VALID | {"requires": "better"}]}, "did you mean 'require'?"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(evaluate: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(
            {"name": "x", "model": {"source": "m"}, "data": {"train": "t"}, "evaluate": {"promotion": evaluate}}
        )
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"evaluate": {"base": False}}, "evaluate.base = False: leaves evaluate.promotion.rules[0] nothing to compare"),
        ({"evaluate": {"enabled": False}}, "evaluate.enabled = False: leaves evaluate.promotion undecided"),
    ],
)
def test_a_policy_without_its_evaluation_is_refused(sections: dict[str, Any], said: str) -> None:
    values: dict[str, Any] = {"name": "x", "model": {"source": "m"}, "data": {"train": "t"}}
    values["evaluate"] = {"promotion": {"rules": [VALID]}} | sections["evaluate"]
    with pytest.raises(RecipeError) as refused:
        parse_recipe(values)
    assert said in str(refused.value)
    values["evaluate"]["promotion"]["rules"] = [VALID | {"require": "at_least", "value": 0.5}]
    parse_recipe(values | {"package": {"enabled": False}, "serve": {"enabled": False}})
