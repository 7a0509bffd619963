"""Proof that a served model answers as it was measured: rows with stored answers are sent through the endpoint."""

import asyncio
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ingot.serving.deployments import Deployed, Deployments
from ingot.serving.routing import Routing

AT_ONCE = 8
TOLERANCE = 1e-4  # of numbers with a fraction
SHOWN = 3
log = logging.getLogger("ingot.serve")


@dataclass(frozen=True)
class Stored:
    """A row of input columns and what was answered: the columns in `expected` are compared. `where` names the row."""

    where: str
    row: dict[str, Any]
    expected: dict[str, Any]
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Replayed:
    """How many rows were sent, and what was wrong with some: the row's name and a place, never a part of a text."""

    rows: int
    wrong: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """For people."""
        if not self.wrong:
            return f"replay: {self.rows} stored answers came out equal"
        shown = "; ".join(self.wrong[:SHOWN]) + ("; ..." if len(self.wrong) > SHOWN else "")
        return f"replay: {len(self.wrong)} of {self.rows} rows were not answered as stored: {shown}"


async def replay(routing: Routing, deployed: Deployed, rows: Sequence[Stored]) -> Replayed:
    """Ask `deployed` every row through /invocations, a few at a time."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def ask(stored: Stored) -> str:
        async with turns:
            body = {"dataframe_records": [stored.row]} | ({"params": stored.params} if stored.params else {})
            status, found = await routing.ask("/invocations", body, meant=deployed)
        if status != 200:
            kind = ((found or {}).get("error") or {}).get("type", "no answer")
            return f"row {stored.where}: answered {status} ({kind})"
        problem = difference(stored.expected, found["predictions"][0])
        return problem and f"row {stored.where}: {problem}"

    found = await asyncio.gather(*map(ask, rows))
    return Replayed(len(rows), tuple(problem for problem in found if problem))


async def prove(routing: Routing, deployments: Deployments, rows: Mapping[Deployed, Sequence[Stored]]) -> None:
    """Let requests reach every model of `deployments` whose stored rows come out equal, or that has none to show."""
    for deployed, version in deployments.each():
        name = f"{deployed.name} {version}".strip()
        report = await replay(routing, deployed, rows.get(deployed, ()))
        if report.rows:
            (log.error if report.wrong else log.info)("%s: %s", name, report.sentence)
        deployments.hold(deployed, report.sentence if report.wrong else "")


def difference(expected: Any, found: Any, place: str = "") -> str:
    """Where `found` is not what was stored, without a word of either; empty where it is."""
    here = place or "the answer"
    if isinstance(expected, dict) and isinstance(found, dict):
        for key, value in expected.items():
            problem = difference(value, found[key], f"{place}.{key}".lstrip(".")) if key in found else f"no {key}"
            if problem:
                return problem
        return ""
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return f"{here} has {len(found)} entries, stored were {len(expected)}"
        found_in = (difference(a, b, f"{here}[{at}]") for at, (a, b) in enumerate(zip(expected, found, strict=True)))
        return next(filter(None, found_in), "")
    if isinstance(expected, str) and isinstance(found, str):
        pairs = enumerate(zip(expected, found, strict=False))
        at = next((at for at, (a, b) in pairs if a != b), min(len(expected), len(found)))
        return "" if expected == found else f"{here} differs from character {at + 1} on"
    if isinstance(expected, float) and isinstance(found, int | float):
        close = math.isclose(expected, found, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        return "" if close else f"{here} is another number, by {abs(expected - found):.2g}"
    return "" if json.dumps(expected) == json.dumps(found) else f"{here} is another value"
