"""Options for endpoints and judges that `ingot evaluate`, `ingot compare` and `ingot batch` share, and how a preference
is told.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

KeyEnv = Annotated[
    str | None,
    typer.Option(help="Environment variable with the endpoint's key. None: OPENAI_API_KEY.", show_default=False),
]
AtOnce = Annotated[
    int | None, typer.Option(help="Requests at once to an endpoint. None: 8.", min=1, max=256, show_default=False)
]
AllowHttp = Annotated[
    bool, typer.Option("--allow-http", help="Send texts, but no key, over plain http to another machine.")
]
JudgeNames = Annotated[
    list[str] | None,
    typer.Option("--judge", help="http(s)://HOST/v1#MODEL that grades written answers; several may be named."),
]
JudgeKey = Annotated[
    str | None,
    typer.Option(help="Environment variable with the judges' key. None: OPENAI_API_KEY.", show_default=False),
]
Rubric = Annotated[
    str | None,
    typer.Option(
        help="What to judge by: quality, coherence, fluency, groundedness, relevance, similarity, or a text. None: as "
        "the task file says, or quality.",
        show_default=False,
    ),
]


def with_preferences(plain: list[dict[str, Any]], told: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Comparisons as plain values, each with what judges said of it."""
    return [comparison | {"judged": it} for comparison, it in zip(plain, told, strict=True)]


def preference_text(it: dict[str, Any], names: Sequence[str]) -> str:
    """What judges said of one task, as a line: `names` are the first model's and the other's."""
    from ingot.evaluation.report import with_interval

    if "missing" in it:
        return "not judged"  # the warning says why
    rate = with_interval(it["win_rate"], it["low"], it["high"], 3)
    counts = f"{it['wins']:,} better, {it['ties']:,} ties, {it['losses']:,} worse"
    steady = f"{it['position_consistent']:.0%} of verdicts the same in both orders, {it['unreadable']:,} unreadable"
    return f"judges prefer {names[1]} to {names[0]}: {rate} ({counts}; {steady})"
