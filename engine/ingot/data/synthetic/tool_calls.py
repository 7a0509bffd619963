"""`tool-calls`: what a person asks for in words -> one JSON tool call, or a refusal where no tool fits."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

from ingot.data.synthetic.patterns import ARGUMENTS, NO_TOOL, PATTERNS, TOOLS
from ingot.data.synthetic.values import fill

SIZES = {"train": 3000, "validation": 200, "test": 400}
REFUSAL = {"tool": None, "reason": "no matching tool"}


def answer(tool: str, values: dict[str, object]) -> str:
    """The JSON that the assistant writes for `tool` with the kinds of values in `values`."""
    if tool == NO_TOOL:
        return json.dumps(REFUSAL)
    arguments = {name: values[kind] for name, kind in zip(ARGUMENTS[tool], TOOLS[tool], strict=True)}
    return json.dumps({"tool": tool, "arguments": arguments}, ensure_ascii=False)


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Rows of `split`: every pattern about equally often within its tool, every tool equally often; no request twice."""
    rng = Random(f"tool-calls {split} 1")
    patterns = PATTERNS[split]
    names = list(patterns)
    seen: set[str] = set()
    number = 0
    while number < SIZES[split]:
        tool = names[number % len(names)]
        which = (number // len(names)) % len(patterns[tool])
        request, values = fill(rng, patterns[tool][which])
        if request in seen and "{" in patterns[tool][which]:
            continue
        seen.add(request)
        number += 1
        yield {
            "messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer(tool, values)}],
            "pattern": f"{split}/{tool}/{which}",
            "tool": tool,
        }
