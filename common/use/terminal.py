"""The terminal of a chat: reading lines, commands, an answer as it comes. Knows no model: a function answers.

Imports neither torch nor transformers.

Who answers in a chat: the personas of data/personas.yaml. Imports neither torch nor transformers."""

import contextlib
import difflib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml

from common.data.conversations import Message, read_row
from common.data.files import read_rows
from common.errors import InputError, why_unreadable
from common.options import Sampling, check_sampling, from_texts

HELP = """\
/reset              begins anew; the system turn stays
/system TEXT        sets the system turn; alone, takes it away
/persona NAME       takes a persona's system turn; alone, lists the personas
/retry              answers the last question again (another answer only where answers are drawn)
/undo               takes back the last question and its answer
/params NAME=VALUE  sets temperature, top_p, top_k, repetition_penalty, max_new_tokens, do_sample or seed;
                    NAME= unsets it; alone, shows them
/save FILE.jsonl    writes the conversation as a row that train_sft.py reads
/load FILE.jsonl    goes on with the first conversation in a file
/quit               ends, as Ctrl-D does; Ctrl-C stops an answer
A line that ends in \\ goes on in the next; ''' begins and ends a text of several lines; // begins one with a /."""


QUOTES = "'''"


@dataclass
class Chat:
    """A conversation and the settings of its answers.

    answer: gives the pieces of the next answer to (turns, settings).
    """

    answer: Callable[[list[Message], Sampling], Iterator[str]]
    sampling: Sampling
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def run(self) -> None:
        """Reads and answers until the end of the input."""
        while (text := read_text("> ")) is not None:
            if not text.strip():
                continue
            try:
                if text.startswith("/") and not text.startswith("//"):
                    if text.split()[0] == "/quit":
                        return
                    self.command(text)
                else:
                    self.ask(text[1:] if text.startswith("//") else text)
            except InputError as error:
                print(f"error: {error}", flush=True)
            except KeyboardInterrupt:  # between two answers
                print("(Ctrl-D or /quit ends)", flush=True)

    def ask(self, question: str) -> None:
        """Answers a question; one that gets no word of an answer does not stay."""
        self.messages.append({"role": "user", "content": question})
        said = ""
        try:
            said, _ = show(self.answer(self.turns(), self.sampling))
        finally:
            if said.strip():
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()
        if not said.strip():
            print("(no answer; nothing was added)", flush=True)

    def turns(self) -> list[Message]:
        """The conversation with its system turn."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.messages

    def command(self, line: str) -> None:
        """Does what a line that begins with / says. Raises InputError where it cannot."""
        name, _, rest = line.strip().partition(" ")
        name, rest = name.removeprefix("/"), rest.strip()
        commands = ("help", "reset", "system", "persona", "retry", "undo", "params", "save", "load")
        if name not in commands:
            near = difflib.get_close_matches(name, [*commands, "quit"], n=1)
            raise InputError(f"there is no command /{name}. " + (f"Did you mean /{near[0]}?" if near else "See /help."))
        note = getattr(self, f"_{name}")(rest)
        if note:
            print(note, flush=True)

    def _help(self, rest: str) -> str:
        return HELP

    def _reset(self, rest: str) -> str:
        self.messages.clear()
        return "(a new conversation)"

    def _system(self, rest: str) -> str:
        self.system = rest or None
        return "(system turn set)" if rest else "(no system turn)"

    def _persona(self, rest: str) -> str:
        if not rest:
            return "\n".join(f"{persona.name:10} {persona.description}" for persona in read_personas().values())
        persona = choose_persona(rest)
        self.system = persona.system_prompt
        return f"(persona: {persona.description})"

    def _retry(self, rest: str) -> None:
        exchange = self._take_back()
        before = len(self.messages)
        try:
            self.ask(exchange[0]["content"])
        finally:
            if len(self.messages) == before:  # no answer: what there was stays
                self.messages += exchange

    def _undo(self, rest: str) -> str:
        question = self._take_back()[0]["content"]
        return f"(taken back: {' '.join(question.split())[:60]})"

    def _take_back(self) -> list[Message]:
        asked = [i for i, turn in enumerate(self.messages) if turn["role"] == "user"]
        if not asked:
            raise InputError("nothing has been asked yet.")
        exchange = self.messages[asked[-1] :]
        del self.messages[asked[-1] :]
        return exchange

    def _params(self, rest: str) -> str:
        texts = {name: str(value).lower() for name, value in asdict(self.sampling).items() if value is not None}
        known = [item.name for item in fields(Sampling)]
        for pair in rest.split():
            name, equals, value = pair.partition("=")
            if not equals or name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]}=...?" if near else f"There are {', '.join(known)}."
                raise InputError(f"/params {pair}: expected NAME=VALUE. {hint}")
            texts.pop(name, None)
            if value:
                texts[name] = value
        sampling = from_texts(Sampling, texts)
        check_sampling(sampling)
        self.sampling = sampling
        return " ".join(f"{name}={'' if value is None else value}" for name, value in asdict(sampling).items())

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
        last = " ".join(turns[-1]["content"].split())
        return f"({len(turns)} turns, the last one: {last[:60]})"


def answer_lines(answer: Callable[[str], Iterator[str]]) -> None:
    """Reads texts and shows the answer to each, which knows nothing of the others, until the end of the input."""
    while (text := read_text("> ")) is not None:
        if text.strip() == "/quit":
            return
        if text.strip():
            try:
                show(answer(text))
            except InputError as error:
                print(f"error: {error}", flush=True)
            except KeyboardInterrupt:
                print("(Ctrl-D or /quit ends)", flush=True)


def show(pieces: Iterator[str]) -> tuple[str, bool]:
    """Prints the pieces of an answer as they come; returns the text, and whether Ctrl-C stopped it."""
    said, stopped = "", False
    try:
        with contextlib.closing(pieces):
            for piece in pieces:
                said += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
    print(" [stopped]" if stopped else "", flush=True)
    return said, stopped


def read_text(prompt: str) -> str | None:
    """A line from the terminal, or several: behind a backslash at its end, or between '''; None at the end of input.

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


def greet(text: str) -> None:
    """Turns on line editing and history, where Python has them, and says what can be typed to whom sits there."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (`input` uses it once it is imported)
        print(f"{text} Ctrl-C stops an answer, Ctrl-D ends.", flush=True)


def _conversation_file(command: str, rest: str) -> Path:
    if Path(rest).suffix != ".jsonl":
        raise InputError(f"/{command}: name a file that ends in .jsonl, for example `/{command} talk.jsonl`.")
    return Path(rest).expanduser()


FILE = Path(__file__).parents[2] / "data" / "personas.yaml"
KEYS = ("name", "description", "system_prompt")


@dataclass(frozen=True)
class Persona:
    """A name, what lists show of it, and the system turn."""

    name: str
    description: str
    system_prompt: str


def read_personas(path: Path = FILE) -> dict[str, Persona]:
    """name -> persona. Raises InputError that names what is wrong in the file."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise InputError(f"{path}: {why_unreadable(error)}.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: the file is not UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: expected a list of personas, each with {', '.join(KEYS)}.")
    personas: dict[str, Persona] = {}
    for number, entry in enumerate(content, 1):
        where = f"{path}, persona {number}"
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected {', '.join(KEYS)}.")
        for key in entry:
            if key not in KEYS:
                raise InputError(f"{where}: {key!r} is none of {', '.join(KEYS)}.")
        for key in KEYS:
            if not isinstance(entry.get(key), str) or not entry[key].strip():
                raise InputError(f"{where}: {key!r} is missing or blank. Fill it in.")
        if entry["name"] in personas:
            raise InputError(f"{where}: the name {entry['name']!r} occurs twice. Rename one.")
        personas[entry["name"]] = Persona(**entry)
    return personas


def choose_persona(name: str, path: Path = FILE) -> Persona:
    """The persona of this name. Raises InputError where there is none."""
    personas = read_personas(path)
    if name not in personas:
        near = difflib.get_close_matches(name, personas, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise InputError(
            f"There is no persona {name!r}. {hint}There are {', '.join(personas)}; add yours to {path.name}."
        )
    return personas[name]
