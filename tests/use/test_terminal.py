"""Chats in a terminal: personas, what is typed, commands, and sessions with a model."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from helpers import ROOT
from helpers.models import build_model
from helpers.rows import read_jsonl

from common.errors import InputError, Terminated, printable
from common.options import Sampling
from common.use import terminal
from common.use.personas import PERSONAS, choose_persona, read_personas
from common.use.terminal import show

BASE = ["--load_in_4bit", "false", "--mixed_precision", "no", "--chat_template", "plain"]


BAD_PERSONAS = [
    ("- name: a\n  description: b\n", "persona 1: 'system_prompt' is missing or blank"),
    ("- name: a\n  description: b\n  system_prompt: c\n" * 2, "persona 2: the name 'a' occurs twice"),
    ("- name: a\n  tone: b\n", "persona 1: 'tone' is none of name, description, system_prompt"),
    ("a: [b\n", "not valid YAML"),
    ("a: b\n", "expected a list of personas"),
    ("", "expected a list of personas"),
    ("- a\n", "persona 1: expected name"),
    ("- name: a\n  description: b\n  system_prompt: c\n  examples: d\n", "persona 1: 'examples' must be a list"),
]


@pytest.mark.parametrize(("text", "reason"), BAD_PERSONAS)
def test_personas_are_checked(tmp_path, text, reason):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(InputError, match=reason):
        read_personas(tmp_path / "p.yaml")


def test_personas_of_the_project():
    assert list(read_personas()) == ["order", "billing", "sales", "support"]
    assert "invoices" in choose_persona("billing").system_prompt
    assert all(len(persona.examples) == 3 for persona in read_personas().values())
    with pytest.raises(InputError, match="there is no such file"):
        read_personas(PERSONAS.with_name("gone.yaml"))


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Path:
    """A model that writes for long: many positions, and no end token after these questions."""
    return build_model(tmp_path_factory.mktemp("writer") / "model", "llama", max_position_embeddings=20000)


class Terminal:
    """A chat in a pseudo terminal; every wait has an end."""

    def __init__(self, folder: Path, *options) -> None:
        environment = {**os.environ, "TERM": "dumb", "HF_HUB_OFFLINE": "1"}
        command = [str(ROOT / "inference.py"), *map(str, options)]
        self.child = pexpect.spawn(
            sys.executable, command, cwd=folder, env=environment, encoding="utf-8", timeout=90,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores Ctrl-C
        )  # fmt: skip
        self.child.setwinsize(50, 1000)

    def line(self, text: str, *expected: str) -> str:
        """Types a line; what is printed up to the next prompt has the expected parts."""
        self.child.sendline(text)
        self.child.expect_exact(text.replace("\t", ""))  # the echo
        return self.until_prompt(*expected)

    def until_prompt(self, *expected: str) -> str:
        self.child.expect(r"\r\n(\x1b\[\?2004h)?(> |\. )")
        for part in expected:
            assert part in self.child.before, (part, self.child.before)
        return self.child.before.strip()

    def interrupt(self) -> None:
        self.child.sendintr()


def test_a_session_in_a_terminal(writer, tmp_path):
    """Stream, Ctrl-C mid-answer, retry, undo, reset, persona, several lines, params, save, load, Ctrl-D."""
    terminal = Terminal(tmp_path, "--run", writer, *BASE, "--max_new_tokens", 12)
    terminal.until_prompt("/help lists the commands")
    first = terminal.line("goal team")
    assert first
    assert terminal.line("/retry") == first  # greedy
    terminal.line("/params max_new_tokens=15000", "max_new_tokens=15000")
    terminal.child.sendline("coach of the team")
    terminal.child.expect_exact("coach of the team\r\n")
    terminal.child.expect(r"\S+")  # it streams
    time.sleep(0.2)
    started = time.monotonic()
    terminal.interrupt()
    stopped = terminal.until_prompt(" [stopped]")
    assert time.monotonic() - started < 10 and len(stopped) > len("[stopped]")
    terminal.line("/params max_new_tokens=12 temperature=0.8", "temperature=0.8")
    terminal.line("/params tempature=1", "error: /params tempature=1", "Did you mean temperature=...?")
    terminal.line("/params top_p=2", "error: --top_p 2.0: must be at most 1")
    terminal.line("/params temperature=", "temperature= top_p=")
    terminal.line("/undo", "(taken back: coach of the team)")
    assert terminal.line("/retry") == first
    terminal.line("/persona", "billing", "support")
    terminal.line("/persona biling", "error: There is no persona 'biling'. Did you mean billing?")
    terminal.line("/persona billing", "(persona: Billing and pricing")
    other = terminal.line("goal team")
    terminal.line("several \\")
    several = terminal.line("lines")
    assert several
    terminal.line("/undo", "(taken back: several lines)")
    terminal.line("/save talk.txt", "error: /save: name a file that ends in .jsonl")
    terminal.line("/save talk.jsonl", "(saved to talk.jsonl)")
    terminal.line("/save talk.jsonl", "error: /save talk.jsonl: there is such a file already")
    (row,) = read_jsonl(tmp_path / "talk.jsonl")
    assert [turn["role"] for turn in row["messages"]] == ["system", *["user", "assistant"] * 2]
    assert row["messages"][0]["content"] == choose_persona("billing").system_prompt
    assert [" ".join(printable(turn["content"]).split()) for turn in row["messages"][2::2]] == [
        " ".join(answer.split()) for answer in (first, other)
    ]
    terminal.line("/reset", "(a new conversation)")
    terminal.line("/undo", "error: nothing has been asked yet")
    terminal.line("/system", "(no system turn)")
    assert terminal.line("goal team") == first  # as at the start
    terminal.line("/load gone.jsonl", "error: gone.jsonl: there is no such file")
    terminal.line("/load talk.jsonl", "(4 turns, the last one:")
    assert terminal.line("/retry") == other
    terminal.line("/lod x", "error: there is no command /lod. Did you mean /load?")
    terminal.line("/help", "/persona NAME", "Ctrl-C stops an answer")
    terminal.child.send("half a li")
    terminal.child.expect_exact("half a li")
    time.sleep(0.2)  # a signal while readline is at a character waits for the next key
    terminal.interrupt()
    terminal.until_prompt("(dropped; Ctrl-D or /quit ends)")
    terminal.child.send("goal taem\x08\x08\x08eam\r")  # corrected while it is typed
    terminal.until_prompt()
    terminal.line("/undo", "(taken back: goal team)")
    terminal.child.sendeof()
    terminal.child.expect(pexpect.EOF)
    terminal.child.close()
    assert terminal.child.exitstatus == 0


def test_a_classifier_in_a_terminal(trained, tmp_path):
    terminal = Terminal(tmp_path, "--run", trained("llama", "head", "single"))
    terminal.until_prompt("Every text that you type is classified")
    terminal.line("goal team coach", "sport", "0.")
    terminal.child.sendline("/quit")
    terminal.child.expect(pexpect.EOF)
    terminal.child.close()
    assert terminal.child.exitstatus == 0


def scripted(monkeypatch, *typed: str) -> list[str | None]:
    """What `read_typed` makes of these lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
    found = []
    while (text := terminal.read_typed("> ")) is not None:
        found.append(text)
    return found


def test_texts_of_several_lines(monkeypatch):
    assert scripted(monkeypatch, "a\\", "b", "'''", "c", "", "d\\", "'''", "'''e'''", "f") == [
        "a\nb", "c\n\nd\\", "e", "f",
    ]  # fmt: skip
    assert scripted(monkeypatch, "'''open", "end") == ["open\nend"]


def test_a_question_without_an_answer_does_not_stay(capsys):
    """Empty answers, errors and Ctrl-C before the first word; a stopped retry leaves what there was."""
    said = iter(["yes", "", InputError("no"), KeyboardInterrupt(), "  "])

    def answer(messages, sampling):
        found = next(said)
        if isinstance(found, BaseException):
            raise found
        yield found

    chat = terminal.Chat(answer, Sampling())
    chat.ask("one")
    kept = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "yes"}]
    chat.ask("two")
    assert chat.messages == kept and "(no answer; nothing was added)" in capsys.readouterr().out
    with pytest.raises(InputError):
        chat.ask("three")
    assert chat.messages == kept
    chat.command("/retry")
    assert chat.messages == kept
    chat.ask("five")
    assert chat.messages == kept


@pytest.mark.parametrize("errors", ["surrogateescape", "strict"])
def test_bytes_that_are_not_utf8_are_refused_line_by_line(errors):
    """Python passes such bytes on as halves of surrogate pairs under C.UTF-8, and raises an error elsewhere."""
    code = "from common.use.terminal import *; greet(''); answer_lines(lambda text: (part for part in [text.upper()]))"
    environment = {**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}", "PYTHONPATH": str(ROOT)}
    command, typed = [sys.executable, "-c", code], b"one\ncaf\xe9\ntwo\n"
    ended = subprocess.run(command, input=typed, env=environment, capture_output=True, check=True, timeout=60)
    first, error, last = ended.stdout.decode().splitlines()
    assert (first, last) == ("ONE", "TWO") and error.startswith("error: the line is not UTF-8. ")


@pytest.mark.parametrize("errors", ["surrogateescape", "strict"])
@pytest.mark.parametrize("argv", [["-"], [b"caf\xe9"], ["--prompt", b"caf\xe9"]])
def test_an_instruction_that_is_not_utf8_is_refused(tmp_path, errors, argv):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    command = [sys.executable, ROOT / "inference.py", *argv, "--run", tmp_path]
    environment = {**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"}
    ended = subprocess.run(command, input=b"caf\xe9\n", env=environment, capture_output=True, timeout=60)
    assert ended.returncode == 2 and b"not UTF-8. " in ended.stderr and b"Traceback" not in ended.stderr, ended.stderr


def test_sigterm_does_not_stop_an_answer_alone():
    """Ctrl-C stops an answer and the chat continues; SIGTERM ends the program."""

    def pieces(error: BaseException) -> Iterator[str]:
        yield "some"
        raise error

    assert show(pieces(KeyboardInterrupt())) == ("some", True)
    with pytest.raises(Terminated):
        show(pieces(Terminated()))
