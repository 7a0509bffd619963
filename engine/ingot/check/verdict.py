"""What the trust gate finds: a verdict for each proof, and the rows and packs that people want to look at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a proof ended. `warned`: people should know, and it stops nothing. `waived`: it failed, and the recipe names
    it in `check.waive`.
    """

    passed = "passed"
    failed = "failed"
    warned = "warning"
    waived = "waived"
    not_applicable = "not applicable"


@dataclass(frozen=True)
class Verdict:
    """One proof. `because`: one sentence with the figures that decided. `fix`: what to change; empty unless it
    failed or warns.

    `facts` are plain values for scripts.
    """

    name: str
    status: Status
    because: str
    fix: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_failure(self) -> bool:
        """Whether it stops a run."""
        return self.status is Status.failed


@dataclass(frozen=True)
class Shown:
    """A sampled row for people: `segments` as `ingot.data.inspect.segments` cuts it; `label` as text, if it has one."""

    where: str
    segments: list[dict[str, Any]]
    tokens: int
    trainable: int
    label: str = ""


@dataclass(frozen=True)
class Evidence:
    """What the verdicts were drawn from. `trainable` [rows]: trainable tokens of each examined row.

    `packs`: for each pack of the first steps the lengths of its rows in tokens; `pack_tokens`: how much one may hold.
    """

    rows: list[Shown] = field(default_factory=list)
    trainable: list[int] = field(default_factory=list)
    packs: list[list[int]] = field(default_factory=list)
    pack_tokens: int = 0


@dataclass(frozen=True)
class Report:
    """All of one check. `sampled`: what was examined out of how much, with the seed, one sentence each."""

    recipe: str
    recipe_hash: str
    verdicts: list[Verdict]
    evidence: Evidence
    sampled: list[str]
    versions: dict[str, str]
    seconds: float

    @property
    def failures(self) -> list[Verdict]:
        """The proofs that stop a run."""
        return [verdict for verdict in self.verdicts if verdict.is_failure]

    @property
    def passed(self) -> bool:
        """Whether nothing stops a run."""
        return not self.failures
