"""`tool-preferences`: the requests of `tool-calls`, the right call as the chosen answer and a wrong one beside it."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

from ingot.data.synthetic import tool_calls
from ingot.data.synthetic.patterns import NO_TOOL
from ingot.data.synthetic.tool_calls import REFUSAL, SIZES

__all__ = ["SIZES", "rows"]


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Rows of `split`. The rejected answer refuses what a tool could do, calls where no tool fits, calls another tool,
    leaves an argument out, or takes one from another request.
    """
    rng = Random(f"tool-preferences {split} 1")
    found = list(tool_calls.rows(split))
    calls = [json.loads(row["messages"][1]["content"]) for row in found]
    by_tool: dict[str, list[dict[str, Any]]] = {}
    for row, call in zip(found, calls, strict=True):
        by_tool.setdefault(row["tool"], []).append(call)
    for row, call in zip(found, calls, strict=True):
        question, answer = row["messages"]
        wrong = _wrong(rng, row["tool"], call, by_tool)
        rejected = {"role": "assistant", "content": json.dumps(wrong, ensure_ascii=False)}
        yield {"prompt": [question], "chosen": [answer], "rejected": [rejected], "tool": row["tool"]}


def _wrong(rng: Random, tool: str, call: dict[str, Any], by_tool: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    others = [name for name in by_tool if name not in (tool, NO_TOOL)]
    if tool == NO_TOOL:
        return rng.choice(by_tool[rng.choice(others)])
    kind = rng.choice(("tool", "argument", "argument", "missing", "refusal"))
    arguments = dict(call["arguments"])
    if kind == "argument" and arguments:
        name = rng.choice(list(arguments))
        values = [other["arguments"][name] for other in by_tool[tool] if other["arguments"][name] != arguments[name]]
        if values:
            return {"tool": tool, "arguments": {**arguments, name: rng.choice(values)}}
    if kind == "missing" and arguments:
        del arguments[rng.choice(list(arguments))]
        return {"tool": tool, "arguments": arguments}
    return dict(REFUSAL) if kind == "refusal" else {"tool": rng.choice(others), "arguments": arguments}
