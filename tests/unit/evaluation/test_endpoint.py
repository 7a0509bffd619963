"""A model behind an endpoint: what is sent, how likelihoods are cut, and the same scores as in this process."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import FakeServer, error, text
from typer.testing import CliRunner

from ingot.address import read_address
from ingot.cli import app
from ingot.errors import EndpointError, RecipeError
from ingot.evaluation.api import Api, Limits
from ingot.evaluation.endpoint import CHATS, SCORES, STARTS, WRITES, Endpoint, model_of
from ingot.evaluation.result import load_evaluation
from ingot.evaluation.subject import Local
from ingot.model.load import load_model, load_tokenizer
from ingot.recipe import Model
from ingot.serving.server import Endpoint as Served

ASKED = [f"question {number}?" for number in range(20)]
FAST = Limits(tries=2, backoff_s=0.001)


@pytest.fixture
def opened() -> Iterator[Callable[..., Endpoint]]:
    with contextlib.ExitStack() as stack:

        def make(server: FakeServer, model: str = "tiny") -> Endpoint:
            return Endpoint(stack.enter_context(Api(read_address(server.url, "target"), None, FAST)), model)

        yield make


def echoing(bos: str | None = "<s>", pieces: Callable[[str], list[str]] | None = None, least: int = 0) -> Any:
    """A server's likelihoods: tokens of up to 3 letters, each -1, of "no" -2 where "ye" would be -0.5."""

    def tokens(prompt: str) -> list[str]:
        return [prompt[place : place + 2] for place in range(0, len(prompt), 2)]

    def answer(path: str, body: dict[str, Any]) -> Any:
        if not body.get("echo"):
            return text("one two three")
        if body["max_tokens"] < least:
            return error(400, "max_tokens must be 1 at least")
        bare = body["prompt"].removeprefix("<s>").removeprefix("<s>")
        starts = ["<s>"] * ((len(body["prompt"]) - len(bare)) // 3)
        found = ([] if bos is None else [bos]) + starts + (pieces or tokens)(bare) + ["!"] * body["max_tokens"]
        own = [None, *(-2.0 if it == "no" else -1.0 for it in found[1:])]
        tops = [None, *({it: -2.0, "ye": -0.5} if it == "no" else {it: -1.0} for it in found[1:])]
        told = {"tokens": found, "token_logprobs": own, "top_logprobs": tops, "text_offset": [0] * len(found)}
        reply = text("", "length")
        reply["choices"][0]["logprobs"] = told
        reply["usage"]["completion_tokens"] = body["max_tokens"]
        return reply

    return answer


def test_texts_and_chats_are_asked_greedily(opened: Any) -> None:
    with FakeServer(lambda path, body: text("yes\nQ: no", "length")) as server:
        made, stop = opened(server), ["a", "b", "c", "d", "\nQ", "z"]
        [found] = made.write(["Q: 1? "], max_new_tokens=9, stop=stop)
        assert found == ("yes", "stop", 7, 3, None)  # the fifth stop text is cut here
        turns = [{"role": "user", "content": "Hi", "name": None}]
        assert made.write([turns], max_new_tokens=9)[0].finish_reason == "length"
        said = {"model": "tiny", "temperature": 0, "max_tokens": 9}
        assert server.said() == [said | {"prompt": "Q: 1?", "stop": ["a", "b", "c", "d"]}]
        assert server.said("/chat/completions") == [said | {"messages": [{"role": "user", "content": "Hi"}]}]


def test_the_newer_name_of_the_limit_is_found(opened: Any) -> None:
    def newer(path: str, body: dict[str, Any]) -> Any:
        if "max_tokens" in body:
            return error(400, "Unsupported parameter: use 'max_completion_tokens' instead")
        return text(str(body["max_completion_tokens"]))

    with FakeServer(newer) as server:
        found = opened(server).write([[{"role": "user", "content": it}] for it in "abcdefghijkl"], max_new_tokens=5)
    assert {it.text for it in found} == {"5"}
    assert len(server.asked) <= 12 + FAST.at_once  # asked wrongly by those under way alone


def test_likelihoods_are_those_of_the_continuations_tokens(opened: Any) -> None:
    with FakeServer(echoing()) as server:
        found = opened(server).score([("Ask:", ["no", "maybe?"]), ("", ["yeno"])])
    assert found == [[(-2.0, False, 1), (-3.0, True, 3)], [(-3.0, False, 2)]]
    assert {body["prompt"] for body in server.said()} == {"Ask:no", "Ask:maybe?", "yeno"}  # nothing asked twice


def test_where_no_zero_is_allowed_the_written_token_is_dropped(opened: Any) -> None:
    with FakeServer(echoing(least=1)) as server:
        made = opened(server)
        made.probe([SCORES])
        assert made.score([("Ask:", ["no"])]) == [[(-2.0, False, 1)]]


def test_tokens_of_half_characters_are_counted_from_the_prompt_alone(opened: Any) -> None:
    def halves(prompt: str) -> list[str]:  # every byte a token, as byte-level tokenizers cut what is rare
        return [bytes([it]).decode("ascii", "replace") for it in prompt.encode()]

    with FakeServer(echoing(pieces=halves)) as server:
        [[found]] = opened(server).score([("é: ", ["ü"])])
    assert found == (-3.0, True, 3)  # the blank, and two bytes
    assert {body["prompt"] for body in server.said()} == {"é: ü", "é:"}


def test_whole_texts(opened: Any) -> None:
    with FakeServer(echoing()) as server:
        # As lm-evaluation-harness: behind a BOS, the tokenizer's own BOS is a token of the text.
        assert opened(server).roll(["abcd", ""]) == [(-3.0, 3), (-1.0, 1)]


@pytest.mark.parametrize(
    ("need", "answer", "words"),
    [
        (WRITES, lambda path, body: error(404, "no route"), "does not go on with texts; .*no route"),
        (CHATS, lambda path, body: error(400, "no template"), "answers no chats; .*no template"),
        (
            SCORES,
            lambda path, body: error(400, "echo: unknown"),
            "use a generation task, or measure a local model .*echo",
        ),
        (SCORES, lambda path, body: text("x"), "without logprobs"),
        (SCORES, echoing(bos=None), None),
        (STARTS, echoing(bos=None), "whole texts; use a generation task.*puts nothing before the first"),
        (STARTS, echoing(), None),
    ],
    ids=["write", "chat", "refused", "silent", "behind a prompt", "no start", "start"],
)
def test_what_is_not_there_is_said_before(opened: Any, need: str, answer: Any, words: str | None) -> None:
    with FakeServer(answer) as server:
        if words is None:
            assert opened(server).probe([need]) == {"served": "tiny"}
            return
        with pytest.raises(EndpointError, match=words):
            opened(server).probe([need])


def test_the_model_is_looked_up() -> None:
    def named(server: FakeServer, model: str) -> str:
        with Api(read_address(server.url + model, "target"), None, FAST) as api:
            return model_of(api)

    with FakeServer(models=("org/tiny-7b", "org/large")) as server:
        assert named(server, "#org/large") == "org/large"
        with pytest.raises(RecipeError, match=r"model = 'tiny-7b'.*no such model; did you mean 'org/tiny-7b'\?"):
            named(server, "#tiny-7b")
        with pytest.raises(RecipeError, match=r"write which model behind it: .*#MODEL \(org/large, org/tiny-7b\)"):
            named(server, "")
        server.models = ("one",)
        assert named(server, "") == "one"
        server.models = None
        assert named(server, "#hidden") == "hidden"


def test_answers_of_two_models_are_no_result(opened: Any) -> None:
    with FakeServer() as server:
        made = opened(server)
        made.write(["a"], max_new_tokens=1)
        server.answer = lambda path, body: text("yes") | {"model": "other"}
        with pytest.raises(EndpointError, match="served tiny and now serves other"):
            made.write(["b"], max_new_tokens=1)


# --- on the command line ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def write_task(**fields: Any) -> Path:
    Path("rows.jsonl").write_text("".join(json.dumps({"q": it, "a": "yes", "o": ["no", "yes"]}) + "\n" for it in ASKED))
    values = {"task": "t", "version": 1, "kind": "text-generation", "data": "rows.jsonl", "prompt": "q", "target": "a"}
    Path("t.yaml").write_text(json.dumps({name: it for name, it in (values | fields).items() if it is not None}))
    return Path("t.yaml")


def ingot(*arguments: object, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [str(it) for it in arguments], env={"COLUMNS": "200"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    return done


class Dying:
    """Answers `alive` questions, then nothing but 500; each question's answer is its number."""

    def __init__(self, alive: int) -> None:
        self.alive, self.answered, self._lock = alive, list[str](), threading.Lock()

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        if "question" not in body["prompt"]:
            return text("probe", system_fingerprint="fp-1")
        with self._lock:
            if len(self.answered) >= self.alive:
                return error(400, "died")
            self.answered.append(body["prompt"])
        return text("yes" if int(body["prompt"].split()[1][:-1]) % 4 else "no", system_fingerprint="fp-1")


def test_after_an_interruption_only_the_rest_is_asked() -> None:
    task = write_task()
    with FakeServer(dying := Dying(7)) as server:
        refused = ingot("evaluate", f"{server.url}#tiny", "--task", task, "--out", "out", code=1)
        assert "answered 400: died" in refused.stderr
        assert not Path("out/t.json").exists()
        dying.alive = 100
        again = ingot("evaluate", f"{server.url}#tiny", "--task", task, "--out", "out")
        assert "7 answers are there from before" in again.stderr
        assert sorted(dying.answered) == sorted(ASKED)  # each once
        found = load_evaluation(Path("out"), "t")
        assert found.scores["exact_match"].value == 0.75
        model = found.about["model"]
        assert (model["endpoint"], model["model"], model["system_fingerprint"]) == (server.url, "tiny", "fp-1")
        assert [it.name for it in Path("out").iterdir() if it.name.startswith(".")] == []
        ingot("evaluate", f"{server.url}#tiny", "--task", task, "--out", "out")  # is only scored
        assert len(dying.answered) == len(ASKED)
        ingot("evaluate", f"{server.url}#tiny", "--task", task, "--out", "out", "--fresh")
        assert len(dying.answered) == 2 * len(ASKED)


def test_another_model_behind_the_same_name_is_noticed() -> None:
    task = write_task()
    with FakeServer(dying := Dying(7)) as server:
        ingot("evaluate", f"{server.url}#tiny", "--task", task, "--out", "out", code=1)
        server.answer = lambda path, body: text("yes", system_fingerprint="fp-2")
        done = ingot("evaluate", f"{server.url}#tiny", "--task", task, "--out", "out")
        assert "serves another model than when this was interrupted: all rows are asked again" in done.stderr
        assert load_evaluation(Path("out"), "t").scores["exact_match"].value == 1.0
        server.answer, dying.alive = dying, 100
        refused = ingot("evaluate", f"{server.url}#tiny", "--task", task, "--out", "out", code=2)
        assert f"from before {server.url}#tiny changed its model" in refused.stderr


def test_what_cannot_be_asked_is_refused_before_any_row() -> None:
    choice = {"kind": "multiple-choice", "choices": "o", "answer": "a", "target": None}
    with FakeServer(lambda path, body: error(400, "echo is unknown") if body.get("echo") else text("yes")) as server:
        for fields, words, code in (
            (choice, "use a generation task, or measure a local model", 1),
            (choice | {"chat": {}}, "tells no likelihoods behind chats", 2),
            ({"kind": "question-answering", "prompt": None, "target": None}, "needs a model in this process", 2),
        ):
            refused = ingot("evaluate", f"{server.url}#tiny", "--task", write_task(**fields), "--out", "out", code=code)
            assert words in refused.stderr
        task = write_task()
        assert "'tiny'" in ingot("evaluate", f"{server.url}#tinny", "--task", task, code=2).stderr
        assert "--base" in ingot("evaluate", f"{server.url}#tiny", "--task", task, "--base", "x", code=2).stderr
        assert "task files only" in ingot("evaluate", f"{server.url}#tiny", "--harness", "arc_easy", code=2).stderr
        far = ingot("evaluate", "http://192.0.2.1/v1#tiny", "--task", task, code=2).stderr
        assert "plain http to another machine" in far
        assert "no endpoint" in ingot("evaluate", "ingot://nano", "--task", task, "--at-once", "2", code=2).stderr
        assert not any("question" in str(body) for _, body in server.asked)
    assert not Path("out").exists()


def test_no_key_and_no_prompt_is_shown_or_stored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-sesame")
    caplog.set_level("DEBUG")
    task = write_task()
    with FakeServer() as server:
        done = ingot("evaluate", f"{server.url}?sig=sesame#tiny", "--task", task, "--out", "out", "--key-env", "MY_KEY")
        assert all(it["Authorization"] == "Bearer sk-sesame" for it in server.headers)
    stored = b"".join(it.read_bytes() for it in Path("out").rglob("*") if it.is_file())
    assert b"sesame" not in stored
    assert "sesame" not in done.output
    assert "question" not in caplog.text


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_our_own_server_gives_the_same_scores_as_the_model_in_this_process(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    fields = {"kind": "chat-completion"} if kind == "chat" else {}
    task = write_task(**fields, max_new_tokens=6, stop=["a", "e"], metrics=["exact_match", "chrf"])
    ingot("evaluate", folder, "--task", task, "--out", "local")
    with Served(folder) as served:
        ingot("evaluate", f"{served.url}/v1", "--task", task, "--out", "remote", "--at-once", "3")
    local, remote = (load_evaluation(Path(it), "t") for it in ("local", "remote"))
    written = [{name: it for name, it in row.output.items() if name != "engine"} for row in local.samples]
    assert [row.output for row in remote.samples] == written
    assert len({row.output["text"] for row in local.samples}) > 1
    assert remote.scores == local.scores
    assert [row.n_output_tokens for row in remote.samples] == [row.n_output_tokens for row in local.samples]
    compared = ingot("compare", "local", "remote", "--json")
    assert json.loads(compared.stdout)[0]["differences"][0]["paired"]["difference"] == 0


@pytest.mark.parametrize("source", ["text_folder", "stories"])
def test_our_own_server_tells_the_same_likelihoods(source: str, request: pytest.FixtureRequest) -> None:
    folder = (
        request.getfixturevalue("shared_dir") / "models/stories260k"
        if source == "stories"
        else request.getfixturevalue(source)
    )
    model = Model(source=str(folder))
    local = Local(load_model(model, Path.cwd(), "text-generation"), load_tokenizer(model, Path.cwd()))
    questions = [("Once upon a time ", ["there was", " a cat", "né 猫"]), ("Tom said:", [" yes", "\n\nno"])]
    with Served(folder) as served, Api(read_address(f"{served.url}/v1", "target"), None, FAST) as api:
        made = Endpoint(api, served.name)
        made.probe([SCORES])
        told = made.score(questions)
        if source == "stories":  # its tokenizer begins with a BOS
            made.probe([STARTS])
            texts = ["Once upon a time, there was a cat.", "né 猫"]
            rolled, right = made.roll(texts), local.roll(texts)
            assert [n for _, n in rolled] == [n for _, n in right]
            assert [it for it, _ in rolled] == pytest.approx([it for it, _ in right], abs=1e-4)
    for found, wanted in zip(told, local.score(questions), strict=True):
        assert [it.n_tokens for it in found] == [it.n_tokens for it in wanted]
        assert [it.greedy for it in found] == [it.greedy for it in wanted]
        assert [it.logprob for it in found] == pytest.approx([it.logprob for it in wanted], abs=1e-4)
