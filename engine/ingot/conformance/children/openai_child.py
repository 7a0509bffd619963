"""Run as `python -I openai_child.py REQUEST RESPONSE`: rows asked by OpenAI's own client, at once and as a stream."""

import json
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI


def asked(client: OpenAI, model: str, row: dict[str, Any], chat: bool) -> tuple[str, str]:
    """The answer to one row, and the same as a stream, joined."""
    if chat:
        text = row.get("input_string", "")
        turns = json.loads(row["messages"]) if "messages" in row else [{"role": "user", "content": text}]
        whole = client.chat.completions.create(model=model, messages=turns, temperature=0)
        parts = client.chat.completions.create(model=model, messages=turns, temperature=0, stream=True)
        streamed = "".join(it.choices[0].delta.content or "" for it in parts if it.choices)
        return whole.choices[0].message.content or "", streamed
    prompt = row["input_string"]
    done = client.completions.create(model=model, prompt=prompt, temperature=0)
    pieces = client.completions.create(model=model, prompt=prompt, temperature=0, stream=True)
    return done.choices[0].text, "".join(it.choices[0].text for it in pieces if it.choices)


def main(request_file: str, response_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    client = OpenAI(base_url=f"{request['url']}/v1", api_key="none", max_retries=0, timeout=request["timeout_s"])
    model = client.models.list().data[0].id
    chat = request["task"] == "chat-completion"
    both = [asked(client, model, row, chat) for row in request["rows"]]
    records = [{"whole": {"output_string": a}, "streamed": {"output_string": b}} for a, b in both]
    Path(response_file).write_text(json.dumps(records), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
