"""Which rank does the job wait for, and where: beats of the ranks -> a sentence with rank, step and collective."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ingot.recipe import Parallel

# Within a step, phases follow in this order; forward and backward take turns, a microbatch at a time.
ORDER = {
    "start": 0,
    "data": 1,
    "forward": 2,
    "backward": 2,
    "communication": 3,
    "step": 4,
    "validation": 5,
    "evaluation": 6,
}
LAST = 7  # checkpoint, and what a later loop may add
SHOWN_RANKS = 8
BEAT_BYTES = 1024
_SPECIAL = re.compile(r"[^ !#-\[\]-~]+")  # what JSON writes longer


@dataclass(frozen=True)
class Beat:
    """What a rank says about itself. `beats` is another number in each. `for_s`: seconds it has been in `phase`.

    `machine` is the same for processes that can see each other; `born` tells a process from a later one of its pid.
    `left` is why it ended, when it ended by itself.
    """

    rank: int
    host: str
    machine: str
    pid: int
    born: str
    beats: int = 0
    step: int = 0
    phase: str = "start"
    for_s: float = 0.0
    left: str = ""

    @property
    def place(self) -> tuple[int, int]:
        """How far it has come."""
        return self.step, ORDER.get(self.phase, LAST)

    @property
    def name(self) -> str:
        """`rank 1 (node worker-3, pid 812)`."""
        return f"rank {self.rank} (node {self.host}, pid {self.pid})"

    def to_bytes(self) -> bytes:
        """One padded line, always as long: written over the line before, it takes no new place on a full disk."""
        spare = BEAT_BYTES - 1 - len(json.dumps(vars(self) | {"left": ""}))
        left = _SPECIAL.sub(" ", self.left.replace('"', "'"))[: max(0, spare)]
        return json.dumps(vars(self) | {"left": left}).ljust(BEAT_BYTES - 1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, line: bytes) -> "Beat | None":
        """None for a line that was read while it was being written."""
        try:
            return cls(**json.loads(line))
        except (ValueError, TypeError):
            return None


@dataclass(frozen=True)
class Lost:
    """A rank that the others wait for, and what is known of it."""

    rank: int
    text: str


def collectives(section: Parallel, *, cuda: bool) -> dict[str, str]:
    """Phase -> the collective that a rank may wait for in it. Phases that are left out wait for nobody."""
    strategy = section.strategy
    sharded = strategy in ("fsdp", "hsdp", "zero3")
    words = {
        "start": "start (first exchange of parameters)",
        "communication": "sum of the losses (all-reduce)",
        "validation": "sum of the validation loss (all-reduce)",
        "evaluation": "sharing of answers (all-gather)",
        "checkpoint": "agreement on the checkpoint (all-gather)",
    }
    if strategy != "none":
        words["backward"] = (
            f"gradient reduction ({'reduce-scatter' if sharded or strategy == 'zero2' else 'all-reduce'})"
        )
    if sharded:
        words["forward"] = "gathering of parameters (all-gather)"
        words["step"] = "gradient's norm (all-reduce)"
    if strategy in ("zero1", "zero2"):
        words["step"] = "gathering of updated parameters (all-gather)"
    if section.context > 1:
        words["forward"] = "exchange around attention (all-to-all)"
    if section.tensor > 1:
        words["forward"] = "exchange inside a layer (all-reduce)"
    if section.context > 1 or section.tensor > 1:
        words.setdefault("backward", words["forward"])
    if cuda and "backward" in words:
        # Launched work runs behind the host, which waits where it first needs a number.
        words["communication"] = f"{words['backward']} or the {words['communication']}"
    return words


def stalled(beats: Iterable[Beat], timeout_s: float, words: Mapping[str, str]) -> list[Lost]:
    """Ranks that have been in one place for `timeout_s` while others wait for them as long.

    Ranks that all stand in one place may all be at work (a long validation): that alone is no reason.
    """
    still = [beat for beat in beats if beat.for_s >= timeout_s and not beat.left]
    waiting = [beat for beat in still if beat.phase in words]
    busy = [beat for beat in still if beat.phase not in words]
    if not waiting:
        return []
    last = max(beat.place for beat in waiting)
    behind = busy or [beat for beat in waiting if beat.place < last]
    return [Lost(b.rank, f'{b.name} has been in step {b.step}, "{b.phase}", for {b.for_s:.0f} s') for b in behind]


def all_stuck(beats: list[Beat], world: int, timeout_s: float) -> bool:
    """Whether all ranks wait for a sum that takes no time by itself: no rank is behind, the network is."""
    return len(beats) == world and all(beat.phase == "communication" and beat.for_s >= timeout_s for beat in beats)


def died(beat: Beat) -> Lost:
    """A process that is gone."""
    return Lost(beat.rank, f'{beat.name} died in step {beat.step}, "{beat.phase}"')


def silent(rank: int, beat: Beat | None, seconds: float) -> Lost:
    """A rank that nobody hears of: its node is gone, or its process is stopped."""
    if beat is None:
        return Lost(rank, f"rank {rank} has shown no sign of life for {seconds:.0f} s")
    text = f'{beat.name} has shown no sign of life for {seconds:.0f} s; it was in step {beat.step}, "{beat.phase}"'
    return Lost(rank, text)


def left(beat: Beat) -> Lost:
    """A rank that ended with an error of its own."""
    return Lost(beat.rank, f'{beat.name} ended in step {beat.step}, "{beat.phase}": {beat.left}')


def story(lost: list[Lost], beats: Iterable[Beat], words: Mapping[str, str], advice: str) -> str:
    """The whole message: who is lost, and where the others wait."""
    gone = {found.rank for found in lost}
    groups: dict[tuple[int, str], list[int]] = {}
    for beat in beats:
        if beat.rank not in gone and not beat.left:
            groups.setdefault((beat.step, beat.phase), []).append(beat.rank)
    it = "it" if len(lost) == 1 else "them"
    parts = [_shown([found.text for found in lost], "; ")]
    for (step, phase), ranks in sorted(groups.items()):
        if phase in words:
            verb = "waits" if len(ranks) == 1 else "wait"
            parts.append(f'{_listed(ranks)} {verb} for {it} in the {words[phase]} of step {step} ("{phase}")')
        else:
            parts.append(f'{_listed(ranks)} {"is" if len(ranks) == 1 else "are"} in step {step}, "{phase}"')
    return f"{'; '.join(parts)}. {advice}".strip()


def stuck_story(beats: list[Beat], words: Mapping[str, str], advice: str) -> str:
    """The message when no rank is behind the others."""
    beat = max(beats, key=lambda beat: beat.for_s)
    return (
        f"all {len(beats)} ranks have been in the {words.get(beat.phase, beat.phase)} of step {beat.step} "
        f'("{beat.phase}") for {beat.for_s:.0f} s, and none is behind: '
        f"the network between their nodes does not carry it. {advice}"
    ).strip()


def _shown(texts: list[str], between: str) -> str:
    more = len(texts) - SHOWN_RANKS
    return between.join(texts[:SHOWN_RANKS]) + (f"{between}and {more} more" if more > 0 else "")


def _listed(ranks: list[int]) -> str:
    """`rank 0`, `ranks 0, 2 and 3`, `56 ranks (0, 2, 3, ...)`."""
    ranks = sorted(ranks)
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > SHOWN_RANKS:
        return f"{len(ranks)} ranks ({', '.join(map(str, ranks[:3]))}, ...)"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
