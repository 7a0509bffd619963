"""The mask from a family's own chat template is the one that the same template with marks gives.

TRL ships real templates of many families (`X.jinja`) beside versions with `{% generation %}` marks
(`X_training.jinja`), and some that have marks by themselves, which are taken out here. Only its files are read.
Blanks behind the stop token, which marks often take in, are not compared; every other difference is listed below with
its reason, and a listed one that is gone fails too.
"""

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ingot.data.conversation import Conversation, Message
from ingot.data.turns import encode_chats
from ingot.errors import IngotError
from ingot.recipe import Objective

SPEC = find_spec("trl")
FOLDER = Path(SPEC.origin).parent / "chat_templates" if SPEC and SPEC.origin else Path("no trl")
PAIRS = sorted(path.name.removesuffix("_training.jinja") for path in FOLDER.glob("*_training.jinja"))
MARK = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
MARKED = ["lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"]  # by themselves
FAMILIES = [*PAIRS, *MARKED] if PAIRS else []
ALL = Objective(task="chat-completion")
LAST = Objective(task="chat-completion", train_on="last-assistant")

# What each family's template has as special tokens: `<|x|>` and the like.
SPECIAL = re.compile(
    r"<[|｜][^<>\s{}']{1,40}[|｜]>|</?s>|<(?:start|end)_of_(?:turn|utterance)>|<\|?(?:turn|channel|tool_call|tool_response)\|?>"
)

# --- conversations ---------------------------------------------------------------------------------------------

CALL = ({"id": "c1", "type": "function", "function": {"name": "book", "arguments": {"people": 2}}},)
PEOPLE = {"type": "object", "properties": {"people": {"type": "integer", "description": "n"}}, "required": ["people"]}
TOOLS = ({"type": "function", "function": {"name": "book", "description": "Books.", "parameters": PEOPLE}},)
SYSTEM = Message("system", "Be brief.")
REPLY = Message("tool", "ok then", name="book", tool_call_id="c1")


def ask(content: str) -> Message:
    return Message("user", content)


def say(content: str = "", reasoning: str | None = None, *, calls: bool = False) -> Message:
    return Message("assistant", content, CALL if calls else (), reasoning=reasoning)


CASES = {
    "single": (ask("Hello!"), say("How can I help?")),
    "multi": (ask("Hello!"), say("Hi."), ask("Bye"), say("See you."), ask("?"), say("!")),
    "system": (SYSTEM, ask("Hello!"), say("Hi."), ask("Bye"), say("See you.")),
    "blanks": (ask(" Hello! "), say(" Hi. \n"), ask("\nBye "), say("\n See  you. ")),
    "tools": (ask("a table"), say(calls=True), REPLY, say("Done.")),
    "tools and talk": (SYSTEM, ask("a table"), say("I book.", calls=True), REPLY, say("Done."), ask("Ok"), say("Bye.")),
    "two calls": (ask("a table"), say(calls=True), REPLY, say(calls=True), REPLY, say("Done.")),
    "reasoning": (ask("Hello!"), say("Hi.", "They greet.")),
    "reasoning twice": (ask("Hello!"), say("Hi.", "They greet."), ask("Bye"), say("See you.", "They go.")),
    "thoughts in the content": (
        *(ask("Hello!"), say("<think>\nThey greet.\n</think>\n\nHi.")),
        *(ask("Bye"), say("<think>\nThey go.\n</think>\n\nSee you.")),
    ),
    "reasoning and tools": (ask("a table"), say("", "I book.", calls=True), REPLY, say("Done.", "It is done.")),
}
WITH_TOOLS = {"tools", "tools and talk", "two calls", "reasoning and tools"}
WITH_TEXTS = set(CASES) - {"tools", "two calls", "reasoning and tools"}
CHATS = {name: Conversation(turns, TOOLS if name in WITH_TOOLS else (), name) for name, turns in CASES.items()}

# --- differences, each with its reason -------------------------------------------------------------------------

# The marks take in what the generation prompt gives: the model is never asked to write it.
PROMPT = {
    "deepseek_r1_distill": "<｜Assistant｜>|<｜tool▁outputs▁end｜>",
    "deepseekv3": "<｜Assistant｜>|<｜tool▁outputs▁end｜>",
    "gptoss": re.escape("<|start|>assistant"),
    "muse_glimmer": re.escape("<|start|>assistant"),
    "nemotron_3_5_lightning": "<think>\n|<think></think>",  # the second is the prompt for a turn without thoughts
    "nemotron_3_nano": "<think>\n|<think></think>",
    "nemotron_3_super": "<think>\n|<think></think>",
    "nemotron_3_ultra": "<think>\n|<think></think>",
    "qwen2_5": "\n",  # of the header
    "qwen3_5_nothink": "<think>\n(\n</think>\n\n)?",  # the first is the prompt for a turn with thoughts
    "qwen3_5_think": "<think>\n",
    "qwen3_6": "<think>\n",
    "qwen3_8": "<think>\n",
}
# The version with marks writes another text: thoughts that the original drops. What is trained is what is packaged.
THOUGHTS = "(<think>\n.*?\n</think>\n\n)?"
REWRITTEN = {
    "deepseek_r1_distill": "<｜Assistant｜>(<think>\n.*?\n</think>)?",
    "qwen3": THOUGHTS,
    "qwen3_5_nothink": THOUGHTS + "|<think>\n",
    "qwen3_5_think": THOUGHTS + "|<think>\n",
    "qwen3_6": THOUGHTS + "|<think>\n",
}
# The marks leave out a stop token: Gemma ends a call with the token that opens the reply, and must learn to write it.
STOP_TOO = {"diffusion_gemma": "<|tool_response>"}

NO_CALLS = "does not write the assistant's call"  # the template drops them: an empty answer would be learned
NO_STOP = "never learn to stop"  # a turn ends where the next begins, and the last one nowhere
PARTS = "does not write what turns say"  # a vision template: it reads lists of parts, not texts
# Gemma writes the content of a turn with a call behind the tool's reply; DeepSeek V3 no header before a second call.
INSIDE = "cannot be proved"
REFUSED = {
    "deepseek_r1_distill": (NO_CALLS, WITH_TOOLS),
    "deepseekv3": (INSIDE, {"two calls"}),
    "diffusion_gemma": (INSIDE, {"tools and talk"}),
    "glm4moe": (NO_STOP, set(CASES)),
    "idefics3": (PARTS, WITH_TEXTS),
    "lfm2": (NO_CALLS, WITH_TOOLS),
    "llama3": (NO_CALLS, WITH_TOOLS),
    "phi3": (NO_CALLS, WITH_TOOLS),
    "phi3_5": (NO_CALLS, WITH_TOOLS),
    "qwen2_5_vl": (NO_CALLS, WITH_TOOLS),
    "smolvlm": (PARTS, WITH_TEXTS),
}
# Families of which the version with marks refuses too: nothing to compare.
REFUSED_BY_BOTH = {
    "cohere": WITH_TOOLS,
    "cohere2": WITH_TOOLS,
    "gemma": WITH_TOOLS | {"system"},
    "gemma3": WITH_TOOLS,
    "idefics3": set(CASES) - WITH_TEXTS,
    "llava_next": set(CASES),
    "smolvlm": set(CASES) - WITH_TEXTS,
}


def templates(family: str) -> tuple[str, str]:
    """The template as the family ships it, and the one with marks."""
    own = (FOLDER / f"{family}.jinja").read_text()
    if family in MARKED:
        return MARK.sub("{{- '' -}}", own), own
    return own, (FOLDER / f"{family}_training.jinja").read_text()


# --- the comparison --------------------------------------------------------------------------------------------


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each special token of the template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(template)))})
    tokenizer.chat_template = template
    return tokenizer


def stretches(tokenizer: PreTrainedTokenizerFast, ids: list[int], mask: list[int] | list[bool]) -> list[str]:
    """Texts of the learned stretches, without the blanks at their ends."""
    runs: list[list[int]] = []
    for index, (token, on) in enumerate(zip(ids, mask, strict=True)):
        if on and not (index and mask[index - 1]):
            runs.append([])
        if on:
            runs[-1].append(token)
    return [tokenizer.decode(run).rstrip() for run in runs]


def marked(family: str) -> dict[str, tuple[str, list[str]]]:
    """Case -> text and learned stretches of the version with marks; cases that it refuses are left out."""
    tokenizer = tokenizer_of(templates(family)[1])
    found = {}
    for name, chat in CHATS.items():
        try:
            encoded = tokenizer.apply_chat_template(
                [message.as_dict() for message in chat.messages],
                tools=list(chat.tools) or None,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except Exception:  # as the template pleases
            continue
        runs = stretches(tokenizer, encoded["input_ids"], encoded["assistant_masks"])
        found[name] = (tokenizer.decode(encoded["input_ids"]), runs)
    return found


def computed(family: str) -> tuple[dict[str, tuple[str, list[str]]], dict[str, str]]:
    """Case -> text and learned stretches of the family's own template, and case -> why it is refused."""
    tokenizer = tokenizer_of(templates(family)[0])
    found, refused = {}, {}
    for name, chat in CHATS.items():
        try:
            [(ids, mask)] = encode_chats([chat], tokenizer, ALL)
        except IngotError as error:
            refused[name] = str(error)
            continue
        found[name] = (tokenizer.decode(ids), stretches(tokenizer, ids, mask))
        [(_, mask)] = encode_chats([chat], tokenizer, LAST)
        assert stretches(tokenizer, ids, mask) == found[name][1][-1:], name
    return found, refused


def differences(family: str, name: str, wanted: tuple[str, list[str]], got: tuple[str, list[str]]) -> set[str]:
    """Which of the listed differences there are; fails for any other."""
    assert len(wanted[1]) == len(got[1]), (name, wanted[1], got[1])
    is_same = wanted[0] == got[0]
    kind, allowed = ("prompt", PROMPT) if is_same else ("text", REWRITTEN)
    seen = set() if is_same else {kind}
    for marks, ours in zip(wanted[1], got[1], strict=True):
        extra = STOP_TOO.get(family, "")
        if extra and ours.endswith(extra) and not marks.endswith(extra):
            ours = ours.removesuffix(extra)
            seen.add("stop")
        assert marks.endswith(ours), (name, marks, ours)
        more = marks.removesuffix(ours)
        if more:
            assert re.fullmatch(allowed.get(family, ""), more, re.DOTALL), (name, more, ours)
            seen.add(kind)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_is_that_of_the_marks(family):
    by_marks = marked(family)
    by_proof, refused = computed(family)
    assert set(CASES) - set(by_marks) == REFUSED_BY_BOTH.get(family, set())
    reason, cases = REFUSED.get(family, ("", set()))
    assert {name for name in by_marks if name in refused} == cases & set(by_marks)
    assert set(by_proof) == set(by_marks) - cases, "the version with marks refuses what the other takes"
    for name in cases:
        assert reason in refused[name]
    seen = set()
    for name, got in by_proof.items():
        seen |= differences(family, name, by_marks[name], got)
    listed = {"prompt": PROMPT, "text": REWRITTEN, "stop": STOP_TOO}
    assert seen == {kind for kind, families in listed.items() if family in families}


def test_all_pairs_are_there():
    assert len(PAIRS) >= 30, "install the dev extra: TRL carries the templates"
    assert set(FAMILIES) >= {*PROMPT, *REWRITTEN, *STOP_TOO, *REFUSED, *REFUSED_BY_BOTH}


# --- turns that are switched off -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gptoss", "nemotron_3_nano", "lfm2_2_5"])
def test_a_turn_that_is_switched_off_is_read_and_not_learned(family):
    tokenizer = tokenizer_of((FOLDER / f"{family}.jinja").read_text())
    chat = CHATS["multi"]
    [(ids, mask)] = encode_chats([chat], tokenizer, ALL)
    every = stretches(tokenizer, ids, mask)
    assert len(every) == 3
    for off in (1, 3, 5):
        turns = [replace(turn, learned=index != off) for index, turn in enumerate(chat.messages)]
        [(same_ids, mask)] = encode_chats([replace(chat, messages=tuple(turns))], tokenizer, ALL)
        assert same_ids == ids
        assert stretches(tokenizer, ids, mask) == [run for index, run in enumerate(every) if 2 * index + 1 != off]
        [(_, mask)] = encode_chats([replace(chat, messages=tuple(turns))], tokenizer, LAST)
        assert stretches(tokenizer, ids, mask) == ([] if off == 5 else every[-1:])
