"""Rows of files -> conversations, whatever the shape of the rows; splits; the counts of the data report.

Imports neither torch nor transformers: whatever is wrong with the data is reported before a model is loaded.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.data.files import SPLITS, cut_splits, read_files, read_hub
from common.errors import InputError

DEMO = Path(__file__).parents[2] / "data" / "instructions_demo"
SHAPES = {  # name -> the columns that make a row one of this shape; the first that fits is taken
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),  # and `input`, which may be missing or empty
    "Bitext": ("instruction", "response", "category", "intent"),
    "instruction + response": ("instruction", "response"),
    "prompt + completion": ("prompt", "completion"),
}
COLUMNS = sorted({name for shape in SHAPES.values() for name in shape} - {"category", "intent"} | {"input", "system"})
ROLES = {
    "system": "system", "user": "user", "human": "user", "prompter": "user", "assistant": "assistant",
    "gpt": "assistant", "bot": "assistant", "model": "assistant", "function_call": "assistant", "tool": "tool",
    "function": "tool", "function_response": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
TOOLS = "You can call these functions:\n{tools}"
Message = dict[str, str]  # role: system, user, assistant or tool; content


@dataclass(frozen=True)
class Conversation:
    """One row: an optional system turn, a user turn, then turns up to an answer (role assistant), the last one."""

    id: str
    messages: tuple[Message, ...]


@dataclass
class ChatData:
    """The three splits (a missing one is empty), where they come from, and what happened on the way."""

    splits: dict[str, list[Conversation]]
    sources: dict[str, dict[str, str]]  # split -> file (or data set) and its hash
    report: dict[str, Any] = field(default_factory=dict)


def load_conversations(config: Any, training: bool = True, demo: Path = DEMO) -> ChatData:
    """Reads, checks and cuts the splits that `config` (DataConfig and InstructionConfig) describes.

    demo: the folder of the files that stand in where the options name none.
    Raises InputError that names file, row and column for whatever cannot be used.
    """
    renamed = read_columns(config.columns or [])
    tables, sources = read_hub(config) if config.dataset_name else read_files(config, demo)
    if training and "train" not in tables:
        raise InputError(f"{config.dataset_name or 'The data'}: there are no training rows; give --train_file.")
    report: dict[str, Any] = {"files": sources, "shapes": {}, "rows": {}}
    splits: dict[str, list[Conversation]] = {}
    for split, rows in tables.items():
        report["rows"][split], report["shapes"][split] = {"read": len(rows)}, {}
        splits[split] = _conversations(rows, sources[split]["name"], renamed, config, report, split)
    splits = cut_splits(splits, config, report, _draw) if "train" in splits else splits
    for split, limit in (("train", config.max_train_samples), ("validation", config.max_eval_samples)):
        if limit and len(splits.get(split, ())) > limit:
            splits[split] = [splits[split][i] for i in _draw(splits[split], limit, config.split_seed)]
    _count(splits, report)
    return ChatData({split: splits.get(split, []) for split in SPLITS}, sources, report)


def read_columns(pairs: Sequence[str]) -> dict[str, str]:
    """The pairs of `--columns`, as usual name -> name in the file."""
    renamed = {}
    for pair in pairs:
        name, separator, column = pair.partition("=")
        if not separator or not column or name not in (*COLUMNS, "tools"):
            raise InputError(
                f"--columns {pair}: expected name=column, where the name is one of {', '.join([*COLUMNS, 'tools'])}."
            )
        if name in renamed:
            raise InputError(f"--columns names {name!r} twice. Name each column once.")
        renamed[name] = column
    return renamed


def _conversations(
    rows: list[dict], source: str, renamed: dict[str, str], config: Any, report: dict, split: str
) -> list[Conversation]:
    columns = list(dict.fromkeys(name for row in rows for name in row))  # JSON rows may each lack some
    for option, names in (("columns", renamed.values()), ("id_column", [config.id_column] * bool(config.id_column))):
        for name in names:
            if name not in columns:
                raise InputError(f"{source}: there is no column {name!r} (--{option}); it has {', '.join(columns)}.")
    shapes: Counter[str] = Counter()
    counts = report["rows"][split]
    conversations, ids = [], set()
    for number, row in enumerate(rows, 1):
        where = f"{source}, data row {number}"
        identifier = str(row.get(config.id_column)) if config.id_column else str(number - 1)
        if config.id_column and (row.get(config.id_column) in (None, "") or identifier in ids):
            raise InputError(f"{where}, column {config.id_column!r}: an id is missing or occurs twice.")
        ids.add(identifier)
        # A mapped column keeps its own name as well, where that name does not stand for something else now.
        row = {k: v for k, v in row.items() if k not in renamed} | {k: row.get(c) for k, c in renamed.items()}
        shape, turns, unanswered = read_row(row, where)
        shapes[shape] += 1
        if unanswered:
            counts["dropped_unanswered"] = counts.get("dropped_unanswered", 0) + unanswered
        if _instruct(turns, row, where, config.system_prompt):
            counts["with_tools"] = counts.get("with_tools", 0) + 1
        conversations.append(Conversation(identifier, tuple(turns)))
    report["shapes"][split] = dict(shapes)
    return conversations


def _instruct(turns: list[Message], row: dict, where: str, system_prompt: str | None) -> bool:
    """Puts a system turn in front of turns that have none, and the row's functions into it; whether there are any."""
    if turns[0]["role"] != "system" and system_prompt:
        turns.insert(0, {"role": "system", "content": system_prompt})
    tools = _tools(row.get("tools"), where)
    if tools:
        if turns[0]["role"] == "system":
            tools = f"{turns.pop(0)['content']}\n\n{tools}"
        turns.insert(0, {"role": "system", "content": tools})
    return bool(tools)


def read_question(row: dict, where: str, renamed: dict[str, str], system_prompt: str | None = None) -> list[Message]:
    """What a row asks, in any of the shapes or in a column `text`: its turns without the last answer, if it has one.

    renamed: as of `read_columns`. Raises InputError where nothing is asked.
    """
    row = {k: v for k, v in row.items() if k not in renamed} | {k: row.get(c) for k, c in renamed.items()}
    filled = [name for name, cell in row.items() if not _empty(cell)]
    name = next((name for name in ("messages", "conversations", "instruction", "prompt", "text") if name in filled), "")
    if not name:
        raise InputError(
            f"{where}: nothing is asked in messages, conversations, instruction, prompt or text. Fill in one of these "
            "columns, or map another one, for example `--columns instruction=question`."
        )
    if name in ("messages", "conversations") or isinstance(row[name], list):
        turns = _listed(row[name], f"{where}, column {name!r}")
    else:
        asked = ["input"] if name == "instruction" else []
        parts = [_text(row.get(column), f"{where}, column {column!r}") for column in (name, *asked)]
        turns = [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}]
    _add_system(turns, row, where)
    if turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] == "system" or not turns[-1]["content"].strip():
        raise InputError(f"{where}, column {name!r}: nothing is asked. Fill it in or delete the row.")
    _check_turns(turns, where)
    _instruct(turns, row, where, system_prompt)
    return turns


def read_row(row: dict, where: str) -> tuple[str, list[Message], int]:
    """The shape of a row, its turns up to the last answer, and how many turns without one were left out behind it."""
    shape = _shape(row, where)
    turns = _turns(row, shape, where)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise InputError(f"{where}: there is no assistant turn, so there is nothing to learn. Delete the row.")
    answered = turns[: answers[-1] + 1]
    _check_turns(answered, where)
    return shape, answered, len(turns) - len(answered)


def _shape(row: dict, where: str) -> str:
    """The first shape whose columns the row has, and has filled; else the first whose columns it has."""
    fitting = [name for name, columns in SHAPES.items() if all(column in row for column in columns)]
    filled = [name for name in fitting if not any(_empty(row[column]) for column in SHAPES[name])]
    if not fitting:
        shapes = "; ".join(", ".join(columns) for columns in SHAPES.values())
        raise InputError(
            f"{where}: the columns {', '.join(map(str, row))} fit no shape of conversations ({shapes}). "
            "Map them with --columns, for example `--columns instruction=question response=answer`."
        )
    return (filled or fitting)[0]


def _turns(row: dict, shape: str, where: str) -> list[Message]:
    if shape in ("messages", "ShareGPT"):
        turns = _listed(row[SHAPES[shape][0]], f"{where}, column {SHAPES[shape][0]!r}")
    elif shape == "prompt + completion" and isinstance(row["prompt"], list):
        turns = [turn for name in SHAPES[shape] for turn in _listed(row[name], f"{where}, column {name!r}")]
    else:
        question, answer = SHAPES[shape][:2]
        names = [question, "input"] if question == "instruction" else [question]
        asked = [_text(row.get(name), f"{where}, column {name!r}") for name in names]
        answered = _text(row[answer], f"{where}, column {answer!r}")
        if not any(part.strip() for part in asked):
            raise InputError(f"{where}, column {question!r}: there is no instruction. Fill it in or delete the row.")
        if not answered.strip():
            raise InputError(f"{where}, column {answer!r}: the answer is empty. Fill it in or delete the row.")
        content = "\n\n".join(part for part in asked if part.strip())
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answered}]
    _add_system(turns, row, where)
    return turns


def _add_system(turns: list[Message], row: dict, where: str) -> None:
    """Puts the text of a column `system` in front; a blank system turn goes."""
    if not _empty(row.get("system")):
        if turns and turns[0]["role"] == "system":
            raise InputError(f"{where}, column 'system': the conversation has a system turn already. Keep one of both.")
        turns.insert(0, {"role": "system", "content": _text(row["system"], f"{where}, column 'system'")})
    if turns and turns[0]["role"] == "system" and not turns[0]["content"].strip():
        del turns[0]


def _listed(cell: Any, where: str) -> list[Message]:
    """The turns in a cell: a list of {role, content} or {from, value}, or such a list as JSON text (in CSV)."""
    cell = _from_json(cell, f"{where}: not a list of turns, and not valid JSON")
    if not isinstance(cell, list) or not all(isinstance(turn, dict) for turn in cell):
        raise InputError(f'{where}: expected a list of turns, such as [{{"role": "user", "content": "..."}}, ...].')
    turns: list[Message] = []
    for number, turn in enumerate(cell, 1):
        place = f"{where}, turn {number}"
        role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
        given = turn.get(role_key)
        if given not in ROLES:
            raise InputError(f"{place}: the role {given!r} is unknown; use one of {', '.join(ROLES)}.")
        role, content = ROLES[given], _text(turn.get(text_key), place)
        _check_fields(turn, place)
        calls = _calls(turn.get("tool_calls"), place)
        content = "\n".join([content] * bool(content.strip()) + calls) if calls else content
        if not content.strip() and role != "system":
            missing = "the answer" if role == "assistant" else "the turn"
            raise InputError(f"{place} ({given}): {missing} is empty. Fill it in or delete it.")
        if given == "function_call" and turns and turns[-1]["role"] == "assistant":
            turns[-1] = {"role": role, "content": f"{turns[-1]['content']}\n{content}"}  # said and called in one turn
        else:
            turns.append({"role": role, "content": content})
    return turns


def _check_fields(turn: dict, where: str) -> None:
    """Refuses what another trainer would honour and this one does not."""
    for name in ("reasoning_content", "reasoning", "thinking"):
        if not _empty(turn.get(name)):
            raise InputError(f"{where}: {name!r} is not read. Write it into the turn's text, or delete it.")
    if turn.get("weight") == 0 or turn.get("train") is False:
        raise InputError(f"{where}: a turn cannot be left out of training alone. Delete its 'weight' or 'train'.")


def _calls(cell: Any, where: str) -> list[str]:
    """The calls of functions in a turn, each as JSON."""
    cell = _from_json(cell, f"{where}: 'tool_calls' is not valid JSON")
    if _empty(cell):
        return []
    if not isinstance(cell, list) or not all(isinstance(call, dict) for call in cell):
        raise InputError(f"{where}: 'tool_calls' is not a list of calls. Correct it.")
    return [json.dumps(call.get("function", call), ensure_ascii=False) for call in cell]


def _check_turns(turns: list[Message], where: str) -> None:
    """A system turn first, if any; then user and assistant in turns, and tool turns behind an answer (a call)."""
    after = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool")}
    before = ""
    for number, turn in enumerate(turns, 1):
        expected = after.get(before, ("tool", "assistant", "user"))
        if turn["role"] not in expected:
            raise InputError(
                f"{where}, turn {number}: the role {turn['role']} {f'behind {before}' if before else 'at the start'}, "
                f"where {' or '.join(expected)} is expected. Join turns of one role, and delete what does not belong."
            )
        before = turn["role"]


def _tools(cell: Any, where: str) -> str:
    """The functions that a conversation may call, for its system turn: without them a call would be made up."""
    cell = _from_json(cell, f"{where}, column 'tools': not valid JSON")
    return "" if _empty(cell) else TOOLS.format(tools=json.dumps(cell, ensure_ascii=False))


def _from_json(cell: Any, problem: str) -> Any:
    """What the text in a cell says, as tables have it; what is no text as it is, and blank text as None."""
    try:
        return (json.loads(cell) if cell.strip() else None) if isinstance(cell, str) else cell
    except json.JSONDecodeError as error:
        raise InputError(f"{problem} ({error.msg}). Correct it.") from None


def _empty(cell: Any) -> bool:
    return cell is None or cell == "" or cell == [] or cell != cell  # NaN is not itself


def _text(cell: Any, where: str) -> str:
    if isinstance(cell, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in cell):
        return "".join(part["text"] for part in cell)  # OpenAI's parts
    if isinstance(cell, list | dict):
        raise InputError(f"{where}: expected a text, not {json.dumps(cell, default=str)[:60]}. Only text can be read.")
    return "" if _empty(cell) else str(cell).encode("utf-8", "replace").decode()  # half a surrogate pair, from JSON


def _draw(rows: Sequence[Any], count: int, seed: int) -> list[int]:
    return sorted(int(i) for i in np.random.default_rng(seed).permutation(len(rows))[:count])


def _count(splits: dict[str, list[Conversation]], report: dict) -> None:
    """also_in_train: what is asked is the same, whatever the answer; rows that only repeat are duplicates."""

    def asked(row: Conversation) -> tuple[str, ...]:
        return tuple(turn["content"] for turn in row.messages if turn["role"] in ("user", "tool"))

    train = {asked(row) for row in splits.get("train", ())}
    for split, rows in splits.items():
        entry = report["rows"].setdefault(split, {})
        entry["used"] = len(rows)
        entry["turns"] = sum(len(row.messages) for row in rows)
        entry["answers"] = sum(turn["role"] == "assistant" for row in rows for turn in row.messages)
        entry["duplicates"] = len(rows) - len({json.dumps(row.messages) for row in rows})
        if split != "train":
            entry["also_in_train"] = sum(asked(row) in train for row in rows)
