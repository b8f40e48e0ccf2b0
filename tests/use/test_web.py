"""The page of `inference.py --web` without a browser: its queue, sessions, pages asked by Gradio's client."""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.models import build_model
from helpers.pages import CHAT, PLAIN, QUIET, open_page
from helpers.rows import read_jsonl, toy_rows, write_csv
from helpers.runs import quick
from helpers.scripts import expect_error, run_alone
from helpers.threads import alive, waiting_threads

import inference
from common.errors import InputError
from common.options import PASSWORD, Sampling
from common.use import web, web_sessions
from common.use.model_queue import ModelQueue, Waiting
from common.use.personas import choose_persona
from common.use.web_sessions import KEPT, OWN, Conversations, Sessions

pytestmark = QUIET


# --- queue and sessions


def running() -> bool:
    return False


def parts(text: str) -> Iterator[str]:
    yield from text


def test_the_queue_keeps_the_order_and_whoever_leaves_makes_room():
    queue = ModelQueue()
    first, second, third = (queue.in_turn(lambda name=name: parts(name), running) for name in ("ab", "cd", "ef"))
    assert next(first) == "a"
    assert next(second) == Waiting(1) and next(third) == Waiting(2)
    second.close()  # while it waits
    assert next(third) == Waiting(1)
    first.close()  # in the middle of its answer
    assert list(third) == ["e", "f"]
    assert list(queue.in_turn(lambda: parts("g"), running)) == ["g"]


def test_an_error_leaves_the_queue():
    queue = ModelQueue()

    def broken() -> Iterator[str]:
        yield "a"
        raise InputError("no")

    with pytest.raises(InputError):
        list(queue.in_turn(broken, running))
    assert list(queue.in_turn(lambda: parts("b"), running)) == ["b"]


def test_no_thread_waits_between_two_parts_of_an_answer():
    """Gradio asks for the next part in any thread, which has threads of its own to compute with."""
    with waiting_threads() as waiting:
        parts = ModelQueue().in_turn(lambda: (torch.ones(2**20).exp_() for _ in range(2)), lambda: False)
        next(parts)
        assert not waiting & alive()
        parts.close()


def test_one_answer_at_a_time():
    """Four people at once: no two answers overlap."""
    queue, inside, most = ModelQueue(), [], []

    def answer() -> Iterator[str]:
        inside.append(1)
        for _ in range(5):
            most.append(len(inside))
            time.sleep(0.005)
            yield "x"
        inside.pop()

    threads = [threading.Thread(target=lambda: list(queue.in_turn(answer, running))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(most) == 20 and max(most) == 1


def echo(system: str | None = None) -> SimpleNamespace:
    """A model that says its system turn and the last question, word by word."""

    def pieces(turns, sampling):
        first = turns[0]["content"] if turns[0]["role"] == "system" else "none"
        yield from [f"[{first[:12]}] ", *turns[-1]["content"].split(), f" {sampling.temperature}"]

    return SimpleNamespace(pieces=pieces, template=True, system=system)


def conversations(*models: SimpleNamespace) -> Conversations:
    return Conversations(ModelQueue(), [(str(i), model) for i, model in enumerate(models)], Sampling())


def test_personas_and_settings_of_a_conversation():
    found = conversations(echo("trained"), echo())
    list(found.answer("one two", {"temperature": "0.5"}))
    assert [chat[-1]["content"] for chat in found.shown()] == ["[trained] onetwo 0.5", "[none] onetwo 0.5"]
    found.use_persona("sales")
    list(found.answer(None, {}))
    assert [len(chat) for chat in found.shown()] == [2, 2]
    said = f"[{choose_persona('sales').system_prompt[:12]}] onetwo 0.5"
    assert [chat[-1]["content"] for chat in found.shown()] == [said] * 2
    found.use_persona(OWN)
    list(found.answer("three", {}, anew=True))
    assert found.shown()[0] == [
        {"role": "user", "content": "three"}, {"role": "assistant", "content": "[trained] three 0.5"}
    ]  # fmt: skip
    with pytest.raises(InputError, match="top_p"):
        list(found.answer("four", {"top_p": "7"}))
    assert len(found.shown()[0]) == 2


def test_a_retry_asks_all_models_the_same(monkeypatch):
    """Stopped while the first one wrote, the second one has not been asked yet."""
    monkeypatch.setattr(web_sessions, "REFRESH", -1)
    for before in ([], ["zero"]):
        found = conversations(echo(), echo())
        with pytest.raises(InputError, match="nothing has been asked"):
            list(found.answer(None, {}))
        for question in before:
            list(found.answer(question, {}))
        pieces = found.answer("one two", {})
        next(pieces), next(pieces)
        found.turn.stop()
        list(pieces)
        assert [len(chat) for chat in found.shown()] == [2 * len(before) + 2, 2 * len(before)]
        list(found.answer(None, {}))
        asked = [[turn["content"] for turn in chat if turn["role"] == "user"] for chat in found.shown()]
        assert asked == [[*before, "one two"]] * 2


def test_a_retry_where_one_model_had_no_word_to_say():
    """Its question is not kept, and is asked of both again."""
    silent = SimpleNamespace(template=True, system=None, pieces=lambda turns, sampling: iter([]))
    found = conversations(silent, echo())
    list(found.answer("one", {}))
    assert [len(chat) for chat in found.shown()] == [0, 2]
    list(found.answer(None, {}))
    assert [[turn["content"] for turn in chat] for chat in found.shown()] == [[], ["one", "[none] one None"]]


def test_a_page_that_begins_with_a_persona_goes_back_to_the_models_own_turn():
    found = Conversations(ModelQueue(), [("a", echo("trained"))], Sampling(), "sales")
    list(found.answer("one", {}))
    assert not found.shown()[0][-1]["content"].startswith("[trained]")
    found.use_persona(OWN)
    list(found.answer("two", {}))
    assert found.shown()[0][-1]["content"].startswith("[trained]")


def test_errors_are_text_on_the_page():
    """Gradio's warnings are HTML, and a chat template, which may be anybody's, can raise whatever it likes."""
    web_look = pytest.importorskip("common.use.web_look", reason="an extra")
    assert web_look.error_text(ValueError('<img src="https://x/"> --seed')) == (
        "&lt;img src=&quot;https://x/&quot;&gt; seed"
    )


def test_stop_and_clear_in_the_middle_of_an_answer(monkeypatch):
    monkeypatch.setattr(web_sessions, "REFRESH", -1)
    found = conversations(echo())
    pieces = found.answer("one two", {})
    assert next(pieces) == "" and found.shown()[0][-1]["content"] == "one two"
    assert next(pieces) == "Writing." and found.shown()[0][-1]["content"] == "[none] "
    with pytest.raises(InputError, match="Stop it first"):
        next(found.answer("other", {}))
    found.turn.stop()
    list(pieces)
    assert [turn["content"] for turn in found.shown()[0]] == ["one two", "[none] "]
    for before in (1, 2):  # a piece was written, or none
        pieces = found.answer("three", {})
        for _ in range(before):
            next(pieces)
        found.clear()
        list(pieces)
        assert found.shown() == [[]]  # nothing of the old answer comes back
    list(found.answer("four", {}))
    assert [turn["content"] for turn in found.shown()[0]] == ["four", "[none] four None"]


def test_a_stream_that_is_dropped_frees_queue_and_session():
    queue = ModelQueue()
    first, second = (Conversations(queue, [("m", echo())], Sampling()) for _ in range(2))
    pieces = first.answer("one two three", {})
    next(pieces)
    pieces.close()  # as Gradio does where a browser is gone
    assert list(second.answer("four", {}))[0] == "" and len(second.shown()[0]) == 2
    list(first.answer("five", {}))
    assert first.shown()[0][-1]["content"].endswith("five None")


def test_everybody_has_a_session():
    sessions = Sessions(list)
    a, b = (SimpleNamespace(session_hash=name) for name in "ab")
    sessions.of(a).append(1)
    assert sessions.of(a) == [1] and sessions.of(b) == []
    for number in range(KEPT):
        sessions.of(SimpleNamespace(session_hash=str(number)))
    assert sessions.of(a) == []  # not used for longest


# --- options


def test_who_may_see_the_page(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    given = ["--run", str(tmp_path), "--web"]
    pytest.importorskip("gradio")
    expect_error(run_alone(*given, "--web_address", "0.0.0.0", script="inference.py", cwd=tmp_path), PASSWORD)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = run_alone(*given, "--web_port", str(port), script="inference.py", cwd=tmp_path)
    expect_error(found, f"--web_port {port}", "Choose another port")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--web", "--prompt", "a"], "exclude each other"),
        (["--web_port", "9000"], "--web_port need --web"),
        (["--web", "--web_port", "0"], "at least 1"),
    ],
)
def test_options_of_the_page(tmp_path, given, reason):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    expect_error(run_alone("--run", str(tmp_path), *given, script="inference.py", cwd=tmp_path), reason)


def test_without_gradio(monkeypatch):
    def missing(name):
        raise web.importlib.metadata.PackageNotFoundError

    config = SimpleNamespace(web_address="127.0.0.1", web_port=1)
    for version in (missing, lambda name: "5.49.1"):
        monkeypatch.setattr(web.importlib.metadata, "version", version)
        with pytest.raises(InputError, match="pip install 'gradio>=6'"):
            web.check_ready(config)


@pytest.mark.parametrize(("address", "reason"), [("::1", "of the form 127.0.0.1"), ("a..b", "no page can be opened")])
def test_addresses_that_no_page_can_have(address, reason, monkeypatch):
    pytest.importorskip("gradio", reason="an extra")
    monkeypatch.setenv(PASSWORD, "secret")
    with pytest.raises(InputError, match=reason):
        web.check_ready(SimpleNamespace(web_address=address, web_port=7860))


# --- pages


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> str:
    """A model that writes for long."""
    folder = tmp_path_factory.mktemp("writer") / "model"
    return str(build_model(folder, "llama", max_position_embeddings=20000))


@pytest.fixture
def client():
    """Gradio's own client, without its words on the terminal."""
    made = pytest.importorskip("gradio_client").Client
    return lambda url, **more: made(url, verbose=False, **more)


def settings(**given) -> list:
    """The values of the fields of the settings."""
    return [given.get(item.name, "" if "bool" in str(item.type) else item.default) for item in fields(Sampling)]


def said(result) -> list[tuple[str, str]]:
    """(role, text) of the turns in what a page answered."""
    return [(turn["role"], turn["content"][0]["text"]) for turn in result[0]]


def test_two_chats_apart(writer, tmp_path, client):
    """Answers are the model's; each person has a chat of their own; a stream that is given up frees the queue."""
    with open_page(tmp_path, run=writer, **CHAT, max_new_tokens=12) as (url, [(_, model)]):
        one, two = client(url), client(url)
        first = said(one.predict("goal <b>team</b>", *settings(max_new_tokens=12), api_name="/ask"))
        expected = "".join(model.stream("goal <b>team</b>", max_new_tokens=12))
        assert first[0] == ("user", "goal &lt;b&gt;team&lt;/b&gt;")
        from common.use.web_look import plain

        assert first[1][1] == plain(expected)
        job = one.submit("coach", *settings(max_new_tokens=15000), api_name="/ask")
        while len(job.outputs()) < 3:
            time.sleep(0.05)
        waiting = two.submit("other", *settings(max_new_tokens=4), api_name="/ask")
        while not waiting.outputs():
            time.sleep(0.05)
        assert not waiting.done()
        job.cancel()
        assert len(said(waiting.result(timeout=60))) == 2  # nothing of the first one's four turns
        again = said(one.predict(*settings(max_new_tokens=4), api_name="/retry"))
        assert [text for role, text in again if role == "user"] == [first[0][1], "coach"]
        assert said(two.predict(api_name="/clear")) == []
        refused = two.predict("x", *settings(do_sample="true", temperature=0), api_name="/ask")
        assert said(refused) == []


def test_models_side_by_side(models, tmp_path, client):
    from helpers.rows import chats, write_jsonl
    from helpers.runs import train_chat

    file = write_jsonl(tmp_path / "rows.jsonl", chats(11))
    files = ["--train_file", file, "--validation_file", file, "--test_file", file, "--eval_strategy", "no"]
    for seed in ("1", "2"):
        train_chat("--model", models["llama"], *files, "--seed", seed, "--output_dir", tmp_path / seed)
    names = [str(tmp_path / "1"), str(tmp_path / "2"), "base"]
    with open_page(tmp_path, compare=names, max_new_tokens=8) as (url, models):
        found = client(url).predict("goal team", *settings(max_new_tokens=8), api_name="/ask")
        answers = [found[i][1]["content"][0]["text"] for i in range(3)]
        from common.use.web_look import plain

        expected = [plain("".join(model.stream("goal team", max_new_tokens=8))) for _, model in models]
        assert answers == expected
        assert len(set(answers)) > 1


def test_a_text_is_continued(writer, tmp_path, client):
    with open_page(tmp_path, run=writer, **PLAIN, task="causal_lm", max_new_tokens=6) as (url, [(_, model)]):
        found = client(url).predict("goal team", *settings(max_new_tokens=6), api_name="/ask")
        from common.errors import printable

        assert found[0] == printable("goal team" + model.answer("goal team", max_new_tokens=6))


def test_a_file_has_the_answers_of_the_command(trained, tmp_path, client):
    """The lines that the page offers are those of `inference.py --input_file`; a bad file is named on the page."""
    from gradio_client import handle_file

    run = trained("llama", "head", "single")
    file = write_csv(tmp_path / "rows.csv", [{"id": f"r{i}", "text": row["text"]} for i, row in enumerate(toy_rows(9))])
    (tmp_path / "bad.csv").write_text("body\nx\n")
    options = ["--run", str(run), "--input_file", str(file), "--output_file", str(tmp_path / "out.jsonl")]
    with quick(), mock.patch("sys.argv", ["inference.py", *options, "--min_probability", "0.4"]):
        inference.main()
    with open_page(tmp_path / "cache", run=str(run)) as (url, model):
        asked = client(url)
        found = asked.predict(handle_file(str(file)), 0.4, api_name="/classify_file")
        lines = read_jsonl(Path(found[2]["value"] if isinstance(found[2], dict) else found[2]))
        assert lines == read_jsonl(tmp_path / "out.jsonl") and any(line["abstained"] for line in lines)
        bad = asked.predict(handle_file(str(tmp_path / "bad.csv")), 0, api_name="/classify_file")
        assert "bad.csv" in bad[0] and "text" in bad[0] and str(tmp_path) not in bad[0]
        text = toy_rows(1)[0]["text"]
        shown, expected = asked.predict(text, 0, api_name="/classify"), model.classify([text])[0]
        assert f"<b>{expected.prediction}</b>" in shown
        assert all(f"{p:.3f}" in shown for p in expected.probabilities.values())
        assert "Abstained: the certainty" in asked.predict(text, 1, api_name="/classify")


def test_a_password_is_asked_for(writer, tmp_path, client):
    with open_page(tmp_path, password="pass", run=writer, **CHAT) as (url, _):
        with pytest.raises(Exception, match="(?i)auth|login|credential|401"):
            client(url)
        with pytest.raises(Exception, match="(?i)auth|login|credential|401|incorrect"):
            client(url, auth=("anybody", "other"))
        assert client(url, auth=("anybody", "pass"))


def test_fields_have_the_bounds_of_the_options():
    pytest.importorskip("gradio")
    from common.use.web_look import sampling_fields, sampling_texts

    found = dict(zip([item.name for item in fields(Sampling)], sampling_fields(Sampling(temperature=0.5)), strict=True))
    assert (found["top_p"].minimum, found["top_p"].maximum) == (0, 1)
    assert (found["max_new_tokens"].minimum, found["max_new_tokens"].precision) == (1, 0)
    assert found["temperature"].value == 0.5
    texts = sampling_texts([0.5, None, None, None, 12, "", 42])
    assert texts["temperature"] == "0.5" and texts["top_p"] == "" and texts["max_new_tokens"] == "12"


def test_facts_of_a_run(trained):
    pytest.importorskip("gradio")
    from common.use.runs import open_run
    from common.use.web_look import facts, plain

    found = dict(facts(open_run(str(trained("llama", "head", "single")))))
    assert "rows)" in found["Trained on"] and any(name.startswith("accuracy, ") for name in found)
    assert plain("<img src=x>\x1b[2J") == "&lt;img src=x&gt;\\x1b[2J"
