"""mkdocs hook: the tables of metrics.md, written at every build from the table of metrics.

A line `<!-- metrics: KIND -->` of that page becomes the table of the metrics of that kind of rows.
"""

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from ingot.evaluation.metrics import DEFAULTS, METRICS, OF_TASK
from ingot.evaluation.vocabulary import ALIASES, ALIASES_OF_TASK


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Called by mkdocs: put the tables into metrics.md."""
    if page.file.src_uri != "metrics.md":
        return markdown
    return re.sub(r"^<!-- metrics: (\S+) -->$", lambda found: table(found[1]), markdown, flags=re.MULTILINE)


def table(kind: str) -> str:
    """The metrics of one kind of rows: names, definitions, how to read them."""
    own = ALIASES_OF_TASK.get(kind, {})
    lines = ["| metric | other names | definition | options |", "|---|---|---|---|"]
    for name in OF_TASK[kind]:
        metric = METRICS[name]
        others = [alias for alias, ours in (ALIASES | own).items() if ours == name and alias not in OF_TASK[kind]]
        shown = f"`{name}`" + (" (default)" if name in DEFAULTS.get(kind, ()) else "")
        better = "" if metric.higher_is_better else "; lower is better"
        cells = [shown, _names(others), f"{metric.doc}{better}", _names(metric.options)]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _names(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)
