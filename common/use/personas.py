"""Who answers in a chat: the personas of data/personas.yaml. Imports neither torch nor transformers."""

import difflib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from common.disk import read_yaml
from common.errors import InputError

PERSONAS = Path(__file__).parents[2] / "data" / "personas.yaml"


@dataclass(frozen=True)
class Persona:
    """A name, what lists show of it, the system turn, and questions that a page offers as buttons."""

    name: str
    description: str
    system_prompt: str
    examples: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The description up to its dash."""
        return self.description.partition(" - ")[0]


def read_personas(path: Path = PERSONAS) -> dict[str, Persona]:
    """name -> persona. Raises InputError that names what is wrong in the file."""
    keys = [item.name for item in fields(Persona)]
    needed = [item.name for item in fields(Persona) if item.default is MISSING]
    content = read_yaml(path, str(path))
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: expected a list of personas, each with {', '.join(needed)}.")
    personas: dict[str, Persona] = {}
    for number, entry in enumerate(content, 1):
        where = f"{path}, persona {number}"
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected {', '.join(needed)}.")
        for key in entry:
            if key not in keys:
                raise InputError(f"{where}: {key!r} is none of {', '.join(keys)}.")
        for key in needed:
            if not _is_text(entry.get(key)):
                raise InputError(f"{where}: {key!r} is missing or blank. Fill it in.")
        examples = entry.get("examples", [])
        if not isinstance(examples, list) or not all(map(_is_text, examples)):
            raise InputError(f"{where}: 'examples' must be a list of questions.")
        if entry["name"] in personas:
            raise InputError(f"{where}: the name {entry['name']!r} occurs twice. Rename one.")
        personas[entry["name"]] = Persona(**{**entry, "examples": tuple(examples)})
    return personas


def choose_persona(name: str) -> Persona:
    """The persona of this name. Raises InputError where there is none."""
    personas = read_personas()
    if name in personas:
        return personas[name]
    near = difflib.get_close_matches(name, personas, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise InputError(
        f"There is no persona {name!r}. {hint}There are {', '.join(personas)}; add yours to {PERSONAS.name}."
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
