"""Shows rows as the model will see them: what is learned, what is only read, and every special token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ingot.data.encoded import IGNORE, Encoded
from ingot.data.turns import Tokenizer
from ingot.model.inputs import special_ids

LISTED_LABELS = 20
BETWEEN_PARTS = "- - -"  # of two answers, or source and target
# (learned, special) -> style. Learned special tokens stand out most: the stop token is what people come to look for.
STYLES = {
    (True, False): "bold green",
    (True, True): "bold reverse green",
    (False, False): "dim",
    (False, True): "dim cyan",
}


@dataclass(frozen=True)
class Segment:
    """A stretch of tokens of one kind and the text they stand for."""

    text: str
    trainable: bool
    special: bool


def render(encoded_rows: Sequence[Encoded], tokenizer: Tokenizer, console: Console) -> None:
    """Print a panel for each row, the legend, and the counts of all."""
    console.print(_legend())
    for row in encoded_rows:
        console.print(_panel(row, tokenizer))
    console.print(_counts(encoded_rows))


def as_dict(encoded_rows: Sequence[Encoded], tokenizer: Tokenizer) -> dict[str, Any]:
    """The same as plain values for `--json`."""
    rows = [
        {
            "where": row.where,
            "tokens": len(row.ids),
            "trainable": sum(row.trainable),
            "labels": None if row.labels is None else list(row.labels),
            "parts": list(row.parts),
            "segments": [vars(segment) for segment in segments(row, tokenizer)],
        }
        for row in encoded_rows
    ]
    tokens, trainable = _totals(encoded_rows)
    return {"rows": rows, "tokens": tokens, "trainable": trainable}


def segments(row: Encoded, tokenizer: Tokenizer) -> list[Segment]:
    """`row` cut where the mask or the kind of token changes; the texts together are the decoded row."""
    specials = special_ids(tokenizer)
    kinds = [(learned, token in specials) for token, learned in zip(row.ids, row.trainable, strict=True)]
    parts: list[Segment] = []
    end, shown = 0, ""
    for (learned, special), group in groupby(kinds):
        end += len(list(group))
        # Decoded from the start every time: decoders join bytes and drop the blank before a first word.
        text = tokenizer.decode(row.ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parts.append(Segment(text[len(shown) :], learned, special))
        shown = text
    return parts


def _parts(row: Encoded) -> list[Encoded]:
    """The sequences that a row consists of: two answers, source and target, or one."""
    ends = [*accumulate(row.parts)] or [len(row.ids)]
    cuts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return [replace(row, ids=row.ids[cut], trainable=row.trainable[cut], parts=()) for cut in cuts]


def _panel(row: Encoded, tokenizer: Tokenizer) -> Panel:
    body = Text(overflow="fold")
    for place, part in enumerate(_parts(row)):
        if place:
            body.append(f"\n{BETWEEN_PARTS}\n", style="dim")
        for segment in segments(part, tokenizer):
            style = STYLES[(segment.trainable, segment.special)]
            for number, line in enumerate(segment.text.split("\n")):
                if number:
                    body.append("↵\n", style="dim" if not segment.trainable else "green")
                body.append(line, style=style)
    body.rstrip()  # a last line break has no line to begin
    learned = sum(row.trainable)
    title = Text(row.where or "row", style="bold")
    if row.terms is not None and not row.parts:  # a pair counts the terms of its first answer
        subtitle = f"{len(row.ids)} tokens, {row.terms} of {learned} hidden, others in every epoch"
    elif row.labels is None:
        subtitle = f"{len(row.ids)} tokens, {learned} learned ({_percent(learned, len(row.ids))})"
    else:
        subtitle = f"{len(row.ids)} tokens, {_labels(row.labels)}"
    style = "red" if row.labels is None and not learned else "blue"
    return Panel(body, title=title, title_align="left", subtitle=subtitle, subtitle_align="right", border_style=style)


def _legend() -> Text:
    return Text.assemble(
        ("learned", STYLES[(True, False)]),
        "  ",
        ("learned special token", STYLES[(True, True)]),
        "  ",
        ("read only", STYLES[(False, False)]),
        "  ",
        ("special token", STYLES[(False, True)]),
        ("   ↵ line break", "dim"),
    )


def _counts(rows: Sequence[Encoded]) -> Table:
    tokens, trainable = _totals(rows)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("rows", f"{len(rows):,}")
    table.add_row("tokens", f"{tokens:,}")
    table.add_row("longest row", f"{max((len(row.ids) for row in rows), default=0):,}")
    if any(row.labels is not None for row in rows):
        seen = {label for row in rows for label in row.labels or () if label != IGNORE}
        table.add_row("labels seen", f"{len(seen):,}")
    else:
        table.add_row("learned", f"{trainable:,} ({_percent(trainable, tokens)})")
    return table


def _labels(labels: Sequence[int]) -> str:
    shown = [str(label) for label in labels if label != IGNORE]
    more = " ..." if len(shown) > LISTED_LABELS else ""
    return f"class {shown[0]}" if len(labels) == 1 else f"labels {' '.join(shown[:LISTED_LABELS])}{more}"


def _totals(rows: Sequence[Encoded]) -> tuple[int, int]:
    return sum(len(row.ids) for row in rows), sum(sum(row.trainable) for row in rows)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"
