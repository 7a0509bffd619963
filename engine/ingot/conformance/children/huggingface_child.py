"""Run as `python -I huggingface_child.py REQUEST RESPONSE`: answers rows as a stranger with plain transformers would.

Imports nothing of Ingot's, and reads nothing but the files that transformers reads itself.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def write(folder: str, rows: list[dict[str, Any]], chat: bool, new_tokens: int) -> list[dict[str, Any]]:
    """Greedy answers of a causal language model, by its own `generate`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for row in rows:
        if chat:
            text = row.get("input_string", "")
            turns = json.loads(row["messages"]) if "messages" in row else [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            ids = tokenizer(row["input_string"].rstrip(" "))["input_ids"]
            if ids and ids[-1] == tokenizer.eos_token_id:  # tokenizers that close what they are given
                ids = ids[:-1]
        found.append({"output_string": continued(model, tokenizer, list(ids), new_tokens)})
    return found


def continued(model: Any, tokenizer: Any, ids: list[int], new_tokens: int) -> str:
    """The text that comes after `ids`."""
    prompt = torch.tensor([ids])
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:
        new_tokens = min(new_tokens, positions - len(ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    with torch.inference_mode():
        whole = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad
        )[0].tolist()
    before = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    after = tokenizer.decode(whole, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if after.startswith(before):
        return str(after[len(before) :])
    return str(tokenizer.decode(whole[len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False))


def cut(longest: int | None) -> dict[str, Any]:
    """How a tokenizer is told to cut a text where training did; None: not at all."""
    return {} if longest is None else {"truncation": True, "max_length": longest}


def transform(folder: str, rows: list[dict[str, Any]], new_tokens: int, longest: int | None) -> list[dict[str, Any]]:
    """Greedy answers of a sequence-to-sequence model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for row in rows:
        ids = tokenizer(row["input_string"], return_tensors="pt", **cut(longest))
        with torch.inference_mode():
            written = model.generate(**ids, do_sample=False, num_beams=1, max_new_tokens=new_tokens)[0]
        text = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found.append({"output_string": text})
    return found


def classify(folder: str, rows: list[dict[str, Any]], longest: int | None) -> list[dict[str, Any]]:
    """The most likely label of each text by the model's own head."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    loader = transformers.AutoModelForSequenceClassification
    model, loaded = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if loaded["missing_keys"]:
        raise ValueError(f"weights are missing: {sorted(loaded['missing_keys'])[:3]}")
    found = []
    for row in rows:
        [text] = row.values()
        with torch.inference_mode():
            ids = tokenizer(text, return_tensors="pt", **cut(longest))
            probs = model.eval()(**ids).logits[0].double().softmax(-1)
        best = int(probs.argmax())
        found.append({"label": model.config.id2label[best], "probability": float(probs[best])})
    return found


def main(request_file: str, response_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    folder, rows, kind, longest = (request[name] for name in ("model", "rows", "kind", "longest"))
    if kind == "classifier":
        found = classify(folder, rows, longest)
    elif kind == "sequence-to-sequence":
        found = transform(folder, rows, request["new_tokens"], longest)
    else:
        found = write(folder, rows, kind == "chat", request["new_tokens"])
    Path(response_file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
