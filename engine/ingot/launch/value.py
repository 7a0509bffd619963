"""Who this process is among the ranks of a job: the one value that every launcher's variables turn into."""

from collections.abc import Mapping
from dataclasses import dataclass

from ingot.errors import IngotError


@dataclass(frozen=True)
class Ranks:
    """This process among `world` processes; `local` counts within its node.

    `launcher` is what started the ranks ("" for a single process). `job` names the job such that a restart of it has
    the same name. `master` and `port` say where rank 0 listens; None: as the environment has it.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1
    nodes: int = 1
    launcher: str = ""
    job: str | None = None
    master: str | None = None
    port: int | None = None

    @property
    def main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0


def shown(env: Mapping[str, str], *names: str) -> str:
    """`NAME=value` of those of `names` that are set, for messages."""
    return ", ".join(f"{name}={env[name]}" for name in names if name in env)


def number(env: Mapping[str, str], name: str) -> int:
    """A variable as an integer. Raises IngotError when it is none."""
    try:
        return int(env[name])
    except ValueError:
        raise IngotError(f"the environment has {name}={env[name]!r}, which is no integer; unset or mend it") from None


def complete(env: Mapping[str, str], needed: tuple[str, ...], optional: tuple[str, ...], fix: str) -> bool:
    """Whether a launcher's variables are there: all of `needed`, or none of both.

    Raises IngotError for half a set.
    """
    present = [name for name in (*needed, *optional) if name in env]
    missing = [name for name in needed if name not in env]
    if present and missing:
        raise IngotError(f"the environment has {shown(env, *present)} but not {' and '.join(missing)}; {fix}")
    return bool(present)


def within(env: Mapping[str, str], rank: str, world: str, fix: str) -> tuple[int, int]:
    """(rank, world) from the variables of these names. Raises IngotError for a rank outside of the world."""
    mine, all_of_them = number(env, rank), number(env, world)
    if not 0 <= mine < all_of_them:
        raise IngotError(f"the environment has {shown(env, rank, world)}: the rank is outside of the world; {fix}")
    return mine, all_of_them


def master_of(env: Mapping[str, str]) -> tuple[str | None, int | None]:
    """MASTER_ADDR and MASTER_PORT, each None when it is not set."""
    return env.get("MASTER_ADDR"), number(env, "MASTER_PORT") if "MASTER_PORT" in env else None
