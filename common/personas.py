"""Who answers in a chat: the personas of data/personas.yaml. Imports neither torch nor transformers."""

import difflib
from dataclasses import dataclass
from pathlib import Path

import yaml

from common.config import InputError, why_unreadable

FILE = Path(__file__).parent.parent / "data" / "personas.yaml"
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
