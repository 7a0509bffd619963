"""Masks and stop tokens of conversations: what is wrong in any turn is named, and sound templates raise no alarm."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ingot.data.template as encoder
from ingot.check.mask import folded, plain
from ingot.check.verdict import Status
from ingot.data.conversation import Conversation, Message
from ingot.data.turns import encode_chats
from ingot.recipe import Objective

CALL = [{"type": "function", "function": {"name": "book", "arguments": {"people": 2}}}]


def ask(content):
    return {"role": "user", "content": content}


def say(content="", **more):
    return {"role": "assistant", "content": content, **more}


def chat(*turns):
    return {"messages": list(turns)}


TWO = chat(ask("Hello"), say("Hi."), ask("Bye"), say("See you."))
# Sound rows that a careless proof would refuse.
SOUND = [
    TWO,
    chat(ask("Hello"), say("Hi."), ask("and now?")),  # ends with the user
    chat(ask("Hello"), say("Hi.", train=False), ask("Bye"), say("See you.")),
    chat(ask("Hello"), say("Hi."), ask("Bye"), say("See you.", train=False)),
    chat(ask("Paris"), say("Paris", train=False), ask("Paris"), say("Paris")),
    chat({"role": "system", "content": "Be brief."}, ask("Hi."), say("Hi.")),
    chat(ask("  blanks \n"), say("\n  answer  \n\n")),
    chat(ask("```py\nx = 1\n```"), say("naïve ½ “quotes” 你好 👩‍👩‍👧 \u00a0 ﬁne\u200b")),
    chat(ask("a table"), say("I book.", tool_calls=CALL), {"role": "tool", "content": "done"}, say("Done.")),
    chat(ask("what closes it?"), say("It is </think> there, and not before.")),
]
# Ways of real families, in short; H stands for the header.
HEADED = "{% for m in messages %}H{{ m.role }}\n{{ m.content | trim }}{{ m.tool_calls | tojson if m.tool_calls }}"
TEMPLATES = {
    "trims (Llama 3)": HEADED + "<|eot|>{% endfor %}{% if add_generation_prompt %}Hassistant\n{% endif %}",
    # Phi: another token ends the conversation, and so the last turn only.
    "ends otherwise (Phi)": HEADED
    + "<|eot|>\n{% endfor %}{% if add_generation_prompt %}Hassistant\n{% else %}<eos>{% endif %}",
    # Gemma 4: no header is asked for after a tool's reply, but one is written.
    "no header after a tool (Gemma)": HEADED
    + "<|eot|>{% endfor %}{% if add_generation_prompt and messages[-1].role != 'tool' %}Hassistant\n{% endif %}",
    # TRL's gpt-oss: the marks take in the header that the model is asked with.
    "marks around the header (gpt-oss)": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}Hassistant\n{{ m.content | trim }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}<|eot|>{% endgeneration %}{% else %}H{{ m.role }}\n"
        "{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}{% if add_generation_prompt %}Hassistant\n{% endif %}"
    ),
}


def tokenizer_of(template, **names):
    """One token a byte, and the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", **names}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|head|>", "<|eot|>"]})
    tokenizer.chat_template = template.replace("H", "<|head|>")
    return tokenizer


@pytest.mark.parametrize("train_on", ["all-assistant", "last-assistant"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_sound_conversations_raise_no_alarm(on_rows, failed, name, train_on):
    last_is_on = [row for row in SOUND if row["messages"][-1].get("train", True)]
    rows = SOUND if train_on == "all-assistant" else last_is_on
    verdicts = on_rows(rows, tokenizer_of(TEMPLATES[name]), objective={"train_on": train_on})
    assert {name: it.because for name, it in verdicts.items() if it.status is Status.failed} == {}
    assert verdicts["prompt-mask"].facts["rows"] == len(rows)


def test_one_token_for_bos_eos_and_pad(on_rows, failed):
    one = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<eos>")
    assert failed(on_rows(SOUND, tokenizer_of(TEMPLATES["trims (Llama 3)"], **one))) == []


def planted(monkeypatch, change):
    """`masks`, and then `change(ids, learned)` in place, of rows that hold more than one turn."""
    original = encoder.masks

    def masks(*args):
        found = [(ids, list(learned)) for ids, learned in original(*args)]
        for ids, learned in found:
            change(ids, learned)
        return found

    monkeypatch.setattr(encoder, "masks", masks)


def first_run(learned):
    start = learned.index(True)
    return start, learned.index(False, start)


def late(ids, learned):
    learned[first_run(learned)[0]] = False


def early(ids, learned):
    learned[first_run(learned)[0] - 1] = True


def only_first(ids, learned):
    end = first_run(learned)[1]
    learned[end:] = [False] * (len(learned) - end)


def only_last(ids, learned):
    start, end = first_run(learned)
    learned[start:end] = [False] * (end - start)


def no_inner_stop(ids, learned):
    learned[first_run(learned)[1] - 1] = False


def no_last_stop(ids, learned):
    learned[max(n for n, on in enumerate(learned) if on)] = False


def all_of_it(ids, learned):
    learned[1:] = [True] * (len(ids) - 1)


@pytest.mark.parametrize(
    ("change", "proof"),
    [
        (late, "prompt-mask"),
        (early, "prompt-mask"),
        (only_first, "prompt-mask"),
        (only_last, "prompt-mask"),
        (all_of_it, "prompt-mask"),
        (no_inner_stop, "stop-token"),
        (no_last_stop, "stop-token"),
    ],
)
def test_a_mask_that_is_wrong_in_one_turn(on_rows, failed, monkeypatch, change, proof):
    planted(monkeypatch, change)
    same = chat(ask("Hello"), say("Hi."), ask("Hello"), say("Hi."))  # the turns' texts do not tell them apart
    for row in (TWO, same):
        assert proof in failed(on_rows([row], tokenizer_of(TEMPLATES["trims (Llama 3)"])))


def test_a_turn_that_is_learned_though_it_is_switched_off(on_rows, failed, monkeypatch):
    row = chat(ask("Hello"), say("Hi.", train=False), ask("Bye"), say("See you."))
    tokenizer = tokenizer_of(TEMPLATES["trims (Llama 3)"])
    turns = tuple(Message(turn["role"], turn["content"]) for turn in TWO["messages"])
    [(_, learned)] = encode_chats([Conversation(turns)], tokenizer, Objective())
    planted(monkeypatch, lambda ids, mask: mask.__setitem__(slice(None), learned))
    assert "prompt-mask" in failed(on_rows([row], tokenizer))


def test_a_bos_in_a_text_is_no_second_bos(on_rows, failed):
    """HTML strikes out with <s>; a template that writes it twice does so in every row."""
    names = {"bos_token": "<s>"}
    tokenizer = tokenizer_of("<s>" + TEMPLATES["trims (Llama 3)"], **names)
    rows = [chat(ask(f"Hello {n}"), say("Hi.")) for n in range(120)]
    verdicts = on_rows([*rows, chat(ask("what is <s>?"), say("It strikes out."))], tokenizer)
    assert failed(verdicts) == []
    assert verdicts["one-bos"].facts["inside"] == 1
    assert failed(on_rows([*rows[:5], chat(ask("what is <s>?"), say("It strikes out."))], tokenizer)) == ["one-bos"]


def test_texts_are_compared_in_one_form():
    assert plain("Don't  stop!\n") == "dontstop"
    assert folded(" Crème ﬁn! ") == "cremefin!"
