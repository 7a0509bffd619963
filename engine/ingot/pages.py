"""Self-contained HTML pages: nothing is loaded from elsewhere and what comes from data is escaped. Owns jinja2."""

import base64
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# What a browser would drop or obey is drawn as a picture of it (Unicode's block of control pictures).
VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
# Marks that turn the direction of text around would reorder the page: texts are shown in the order of their characters.
VISIBLE |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)


def render(template: Path, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """The page that `template` makes of `values`; floats it is not told to format are places in pictures."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,  # rows, names and reasons are users' data
        undefined=StrictUndefined,
        finalize=lambda value: f"{value:.2f}" if isinstance(value, float) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"commas": "{:,}".format, "duration": duration, **filters}
    return environment.get_template(template.name).render(**values)


def inlined(path: Path) -> tuple[str, str]:
    """A style or script of ours, to stand in a page unescaped, and the source by which the page's policy allows it."""
    text = path.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return text, f"'sha256-{digest}'"


def visible(text: str) -> str:
    """`text`, what cannot be seen in it made visible."""
    return text.translate(VISIBLE)


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"
