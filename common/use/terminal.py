"""A chat in a terminal: reading what is typed, commands, an answer as it is written. Knows no model: a function
answers. Imports neither torch nor transformers."""

import contextlib
import difflib
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from common.data.conversations import Message, read_row
from common.data.files import read_rows
from common.errors import InputError, printable
from common.use.chat_state import ChatState
from common.use.personas import read_personas

QUOTES = "'''"
HELP = """\
/reset              starts a new conversation; the system turn stays
/system TEXT        sets the system turn; without TEXT, removes it
/persona NAME       sets a persona's system turn; without NAME, lists the personas
/retry              answers the last question again (with another answer only if answers are sampled)
/undo               takes back the last question and its answer
/params NAME=VALUE  sets temperature, top_p, top_k, repetition_penalty, max_new_tokens, do_sample or seed;
                    NAME= unsets it; alone, shows them
/save FILE.jsonl    writes the conversation as a row that train_sft.py reads
/load FILE.jsonl    continues the first conversation in a file
/quit               ends, as Ctrl-D does; Ctrl-C stops an answer
A line that ends in \\ continues in the next; ''' begins and ends a text of several lines; // begins one with a /."""


class Chat(ChatState):
    """A conversation in a terminal."""

    def run(self) -> None:
        """Reads and answers until /quit or the end of the input."""

        def handle(text: str) -> None:
            if text.startswith("/") and not text.startswith("//"):
                self.command(text)
            else:
                self.ask(text[1:] if text.startswith("//") else text)

        _for_every_text(handle)

    def ask(self, question: str) -> None:
        """Answers a question; if no word of an answer comes, the question is not kept."""
        self._show(self.stream_answer(question))

    def command(self, line: str) -> None:
        """Carries out a line that begins with /. Raises InputError where it cannot."""
        commands: dict[str, Callable[[str], str]] = {
            "help": lambda _: HELP, "reset": self._reset, "system": self._system, "persona": self._persona,
            "retry": self._retry, "undo": self._undo, "params": self._params, "save": self._save, "load": self._load,
        }  # fmt: skip
        name, _, rest = line.strip().removeprefix("/").partition(" ")
        if name not in commands:
            near = difflib.get_close_matches(name, [*commands, "quit"], n=1)
            raise InputError(f"there is no command /{name}. " + (f"Did you mean /{near[0]}?" if near else "See /help."))
        if note := commands[name](rest.strip()):
            print(printable(note), flush=True)

    def _show(self, pieces: Iterator[str]) -> None:
        answer, _ = show(pieces)
        if not answer.strip():
            print("(no answer; nothing was added)", flush=True)

    def _reset(self, rest: str) -> str:
        self.reset()
        return "(a new conversation)"

    def _system(self, rest: str) -> str:
        self.system = rest or None
        return "(system turn set)" if rest else "(no system turn)"

    def _persona(self, rest: str) -> str:
        if not rest:
            return "\n".join(f"{persona.name:10} {persona.description}" for persona in read_personas().values())
        return f"(persona: {self.use_persona(rest).description})"

    def _retry(self, rest: str) -> str:
        self._show(self.stream_retry())
        return ""

    def _undo(self, rest: str) -> str:
        return f"(taken back: {_one_line(self.undo()[0])})"

    def _params(self, rest: str) -> str:
        names, texts = asdict(self.sampling), {}
        for pair in rest.split():
            name, equals, texts[name] = pair.partition("=")
            if not equals or name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"Did you mean {near[0]}=...?" if near else f"There are {', '.join(names)}."
                raise InputError(f"/params {pair}: expected NAME=VALUE. {hint}")
        self.change_sampling(texts)
        return " ".join(f"{name}={'' if value is None else value}" for name, value in asdict(self.sampling).items())

    def _save(self, rest: str) -> str:
        path = _conversation_file("save", rest)
        if not self.messages:
            raise InputError("/save: nothing has been said yet.")
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.turns()}, ensure_ascii=False) + "\n")
        except FileExistsError:
            raise InputError(f"/save {path}: there is such a file already. Choose another name.") from None
        except OSError as error:
            raise InputError(f"/save {path}: the file cannot be written ({error.strerror}).") from None
        return f"(saved to {path})"

    def _load(self, rest: str) -> str:
        path = _conversation_file("load", rest)
        _, turns, _ = read_row(read_rows(path)[0], f"{path}, data row 1")
        self.system = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
        self.messages = turns
        return f"({len(turns)} turns, the last one: {_one_line(turns[-1])})"


def answer_lines(answer: Callable[[str], Iterator[str]]) -> None:
    """Reads texts and shows the answer to each, which knows nothing of the others, until /quit or the end of input."""
    _for_every_text(lambda text: show(answer(text)))


def show(pieces: Iterator[str]) -> tuple[str, bool]:
    """Prints the pieces of an answer as they come; returns the text, and whether Ctrl-C stopped it."""
    text, stopped = "", False
    try:
        with contextlib.closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                text += piece
                print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
    print(" [stopped]" if stopped else "", flush=True)
    return text, stopped


def require_utf8(text: str, what: str) -> None:
    """Raises InputError for bytes that are not UTF-8, which Python passes on as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        remedy = "Convert it, for example with `iconv -f windows-1252 -t utf-8`."
        raise InputError(f"{what} is not UTF-8. {remedy}") from None


def read_all() -> str:
    """Everything that comes through the pipe; bytes that are not UTF-8 as in `require_utf8`."""
    _pass_bytes_on()
    return sys.stdin.read()


def greet(text: str) -> None:
    """Turns on line editing and history, where Python has them, and says to a person what can be typed."""
    _pass_bytes_on()
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (`input` uses it once it is imported)
        print(f"{text} Ctrl-C stops an answer, Ctrl-D ends.", flush=True)


def read_typed(prompt: str) -> str | None:
    """A line from the terminal, or several: joined by a backslash at their ends, or between '''; None at the end.

    Ctrl-C drops what has been typed.
    """
    lines: list[str] = []
    quoted = False
    while True:
        try:
            line = input((". " if lines or quoted else prompt) if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            lines, quoted = [], False
            print("\n(dropped; Ctrl-D or /quit ends)", flush=True)
            continue
        if not quoted and not lines and line.strip().startswith(QUOTES):
            quoted, line = True, line.strip().removeprefix(QUOTES)
            if not line:
                continue
        if quoted:
            if line.rstrip().endswith(QUOTES):
                return "\n".join([*lines, line.rstrip().removesuffix(QUOTES)]).strip("\n")
            lines.append(line)
        elif line.endswith("\\"):
            lines.append(line[:-1])
        else:
            return "\n".join([*lines, line])


def _for_every_text(handle: Callable[[str], object]) -> None:
    """Hands every text that is typed to `handle`, and shows its errors, until /quit or the end of the input."""
    while (text := read_typed("> ")) is not None and text.split()[:1] != ["/quit"]:
        try:
            require_utf8(text, "the line")
            if text.strip():
                handle(text)
        except InputError as error:
            print(printable(f"error: {error}"), flush=True)
        except KeyboardInterrupt:  # between two answers
            print("(Ctrl-D or /quit ends)", flush=True)


def _pass_bytes_on() -> None:
    """Bytes that are not UTF-8 do not end the reading: an error would lose the lines around them."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def _one_line(turn: Message) -> str:
    return " ".join(turn["content"].split())[:60]


def _conversation_file(command: str, rest: str) -> Path:
    if Path(rest).suffix != ".jsonl":
        raise InputError(f"/{command}: name a file that ends in .jsonl, for example `/{command} talk.jsonl`.")
    return Path(rest).expanduser()
