"""Run as `python -I llama_child.py REQUEST RESPONSE`: rows answered by llama.cpp's Python package, from a GGUF file."""

import json
import sys
from pathlib import Path
from typing import Any

from llama_cpp import Llama


def answered(model: Any, row: dict[str, Any], chat: bool, new_tokens: int) -> str:
    """The greedy answer to a row."""
    how = {"temperature": 0.0, "max_tokens": new_tokens}
    if not chat:
        return str(model.create_completion(row["input_string"].rstrip(" "), **how)["choices"][0]["text"])
    text = row.get("input_string", "")
    turns = json.loads(row["messages"]) if "messages" in row else [{"role": "user", "content": text}]
    return str(model.create_chat_completion(turns, **how)["choices"][0]["message"]["content"])


def main(request_file: str, response_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    model = Llama(model_path=request["gguf"], n_ctx=0, verbose=False)  # 0: the model's own context
    chat = request["task"] == "chat-completion"
    found = [answered(model, row, chat, request["new_tokens"]) for row in request["rows"]]
    Path(response_file).write_text(json.dumps([{"output_string": text} for text in found]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
