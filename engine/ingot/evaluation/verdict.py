"""The verdict of a promotion policy: conditions with what was found, the evidence they rest on, and its file."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ingot.errors import IngotError
from ingot.evaluation import page_input
from ingot.evaluation.metrics import METRICS
from ingot.evaluation.result import write_text
from ingot.recipe_evaluate import Promotion

FILE = "verdict.json"
FORMAT = 1
HOLDS, BROKEN, TOO_FEW, UNDEFINED = "holds", "does not hold", "not enough rows", "undefined on these rows"


@dataclass(frozen=True)
class Condition:
    """A rule on all rows of its task, or on those of `slice` (`language = de`), in the metric's own unit.

    `measured`: tuned minus base, or for at_least the tuned model's score; its interval has the level 1 - 2 alpha. They
    are None where nothing was measured. `limit`: what the interval's lower end (where lower is better: its upper end)
    has to pass. `state`: HOLDS, BROKEN, TOO_FEW or UNDEFINED. `decides`: False for a slice of too few rows, which is
    only named. `groups`: of rows that depend on each other, None where none do.
    """

    task: str
    metric: str
    require: str
    limit: float
    n: int
    state: str
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    slice: str | None = None
    decides: bool = True
    groups: int | None = None

    @property
    def wanted(self) -> str:
        """`json_exact_match of test, language = de: difference above 0.02`."""
        better = METRICS[self.metric].higher_is_better
        if self.require == "at_least":
            words = "at least" if better else "at most"
        else:
            words = "difference above" if better else "difference below"
        where = f"{self.task}, {self.slice}" if self.slice else self.task
        return f"{self.metric} of {where}: {words} {self.limit:z.6g}"

    @property
    def interval(self) -> str:
        """`+0.061 [+0.032, +0.090]`; empty where nothing was measured."""
        if self.measured is None or self.low is None or self.high is None:
            return ""
        sign, decimals = "-" if self.require == "at_least" else "+", METRICS[self.metric].decimals
        value, low, high = (f"{it:{sign}z.{decimals}f}" for it in (self.measured, self.low, self.high))
        return f"{value} [{low}, {high}]"

    @property
    def rows(self) -> str:
        """`300 rows`, with the number of groups where rows depend on each other."""
        shown = f"{self.n:,} {'row' if self.n == 1 else 'rows'}"
        return shown if self.groups is None else f"{shown} in {self.groups:,} groups"

    @property
    def found(self) -> str:
        """`+0.061 [+0.032, +0.090] on 300 rows`."""
        return f"{self.interval} on {self.rows}" if self.interval else self.rows


@dataclass(frozen=True)
class Verdict:
    """Whether the policy is met, and on which evidence.

    `model`: the tuned model's fingerprint. `evidence`: file below the evaluation's folder -> SHA-256. `policy`: as the
    recipe has it.
    """

    granted: bool
    sentence: str
    alpha: float
    conditions: list[Condition]
    policy: dict[str, Any]
    model: str
    evidence: dict[str, str]

    @property
    def digest(self) -> str:
        """Hash of all that is said here, 16 hex digits: what a run and a package name it by."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def table(self) -> list[dict[str, str]]:
        """A row a condition, for people."""
        return [
            {
                "condition": it.wanted,
                "measured": it.interval,
                "rows": it.rows.removesuffix(" rows"),
                "verdict": it.state,
            }
            for it in self.conditions
        ]

    def save(self, folder: Path) -> None:
        """Write `verdict.json` to `folder` in one step."""
        content = {"format": FORMAT, **self.as_dict()}
        write_text(folder / FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def for_page(self, override: str = "") -> page_input.Promotion:
        """As the report shows it; `override`: who lets the model pass in spite of it, in a sentence."""
        shown = [
            page_input.Condition(it.state == HOLDS, f"{it.wanted}; {it.found}; {it.state}") for it in self.conditions
        ]
        return page_input.Promotion(self.granted, f"{self.sentence} {override}".rstrip(), shown)


def load_verdict(folder: Path) -> Verdict | None:
    """Read `verdict.json`; None where there is none. Raises IngotError where it is damaged."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("it is of another format")
        return Verdict(**{**content, "conditions": [Condition(**it) for it in content["conditions"]]})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IngotError(f"{path} is damaged ({error}); evaluate again") from error


def evidence_of(folder: Path, policy: Promotion) -> dict[str, str]:
    """File below `folder` -> SHA-256, of those evaluations of `base` and `tuned` that decide `policy`. What is missing
    is left out.
    """
    compared = any(rule.require != "at_least" for rule in policy.rules)
    tasks = dict.fromkeys(rule.task for rule in policy.rules)
    found = {}
    for model in ("base", "tuned") if compared else ("tuned",):
        for name in (f"{model}/{task}.{kind}" for task in tasks for kind in ("json", "parquet")):
            if (folder / name).is_file():
                with (folder / name).open("rb") as file:
                    found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
