"""Rows -> conversations, whatever the shape of the rows; the counts of the data report.

    {"question": "Hi", "output": "Hello"}                 a row; --columns instruction=question renames the first column
    user: Hi | assistant: Hello                           its turns, up to the last answer
    system: Be brief. | user: Hi | assistant: Hello       with a `system` column or --system_prompt, and with `tools`

Imports neither torch nor transformers: whatever is wrong with the data is reported before a model is loaded.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.data import doctor
from common.data.files import Row, columns_of, parse_json, require_columns, row_ids, text_in
from common.data.splits import DEMO_FOLDERS, SPLITS, Sources, complete_splits, count_copies, read_splits
from common.errors import InputError
from common.options import ChatDataConfig, InstructionConfig

DEMO = DEMO_FOLDERS / InstructionConfig.demo
SHAPES = {  # name -> the columns that make a row one of this shape; the first that fits is taken
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "Bitext": ("instruction", "response", "category", "intent"),
    "instruction + response": ("instruction", "response"),
    "prompt + completion": ("prompt", "completion"),
}
COLUMNS = sorted(
    {name for shape in SHAPES.values() for name in shape} - {"category", "intent"} | {"input", "system", "tools"}
)
QUESTIONS = ("messages", "conversations", "instruction", "prompt", "text")  # columns that a model can be prompted with
ROLES = {
    "system": "system", "user": "user", "human": "user", "prompter": "user", "assistant": "assistant",
    "gpt": "assistant", "bot": "assistant", "model": "assistant", "function_call": "assistant", "tool": "tool",
    "function": "tool", "function_response": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
INPUTS = ("input", "context")  # what an instruction is about, in Alpaca and in Dolly; may be missing or empty
NO_TEXT = ("image", "images", "audio", "audios", "video", "videos")  # columns of what a turn shows beside its text
NEXT_ROLES = {  # role of a turn ("": the start) -> the roles that may follow it; a tool turn answers a call
    "": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
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
    """The three splits (a missing one is empty), and the data report."""

    splits: dict[str, list[Conversation]]
    sources: Sources
    report: dict[str, Any] = field(default_factory=dict)


def load_conversations(config: ChatDataConfig, training: bool = True) -> ChatData:
    """Reads, checks and cuts the splits that the options describe; for training, there must be training rows.

    Raises InputError that names file, row and column for whatever cannot be used.
    """
    renamed = read_columns(config.columns or [])
    tables, sources = read_splits(config, DEMO, training)
    report: dict[str, Any] = {"files": sources, "shapes": {}, "rows": {}}
    splits: dict[str, list[Conversation]] = {}
    for split, rows in tables.items():
        source = sources[split]["name"]
        require_columns(renamed.values(), columns_of(rows), source, "--columns")
        splits[split], shapes, counts = [], Counter[str](), Counter(read=len(rows))
        for number, (id, row) in enumerate(zip(row_ids(rows, source, config.id_column), rows, strict=True), 1):
            row, where = _rename(row, renamed), f"{source}, data row {number}"
            shape, turns, unanswered = read_row(row, where)
            shapes[shape] += 1
            if unanswered:
                counts["dropped_unanswered"] += unanswered
            if _add_instructions(turns, row, where, config.system_prompt):
                counts["with_tools"] += 1
            splits[split].append(Conversation(id, tuple(turns)))
        report["shapes"][split], report["rows"][split] = dict(shapes), dict(counts)
    splits = complete_splits(splits, config, report)
    count_copies(splits, report, lambda row: json.dumps(row.messages), _questions)
    report["findings"] = doctor.examine({split: [_item(row) for row in rows] for split, rows in splits.items()})
    for split, conversations in splits.items():
        roles = [turn["role"] for row in conversations for turn in row.messages]
        report["rows"][split] |= {"turns": len(roles), "answers": roles.count("assistant")}
    return ChatData({split: splits.get(split, []) for split in SPLITS}, sources, report)


def read_columns(pairs: Sequence[str]) -> dict[str, str]:
    """The pairs of `--columns`, as usual name -> name in the file."""
    renamed: dict[str, str] = {}
    for pair in pairs:
        name, separator, column = pair.partition("=")
        if not separator or not column or name not in COLUMNS:
            raise InputError(f"--columns {pair}: expected name=column, with one of the names {', '.join(COLUMNS)}.")
        if name in renamed:
            raise InputError(f"--columns names {name!r} twice. Name each column once.")
        renamed[name] = column
    return renamed


def read_row(row: Row, where: str) -> tuple[str, list[Message], int]:
    """The shape of a row, its turns up to the last answer, and the number of turns after it, which are dropped."""
    shape = _shape(row, where)
    turns = _turns(row, SHAPES[shape][:2], where)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise InputError(f"{where}: there is no assistant turn, so there is nothing to learn. Delete the row.")
    answered = turns[: answers[-1] + 1]
    _check_order(answered, where)
    return shape, answered, len(turns) - len(answered)


def read_question(row: Row, where: str, renamed: dict[str, str], system_prompt: str | None = None) -> list[Message]:
    """The turns that prompt a model: those of a row of any shape, or its `text`, without a last answer if it has one.

    renamed: as of `read_columns`. Raises InputError if there is no question.
    """
    row = _rename(row, renamed)
    column = next((column for column in QUESTIONS if not _is_empty(row.get(column))), None)
    if column is None:
        raise InputError(
            f"{where}: there is no question in {', '.join(QUESTIONS[:-1])} or {QUESTIONS[-1]}. Fill in one of these "
            "columns, or map another one, for example `--columns instruction=question`."
        )
    turns = _turns(row, [column], where)
    if turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] == "system":
        raise InputError(f"{where}, column {column!r}: there is no question. Fill it in or delete the row.")
    _check_order(turns, where)
    _add_instructions(turns, row, where, system_prompt)
    return turns


def _rename(row: Row, renamed: dict[str, str]) -> Row:
    """A mapped column counts under its new name alone."""
    kept = {name: cell for name, cell in row.items() if name not in renamed and name not in renamed.values()}
    return kept | {name: row.get(column) for name, column in renamed.items()}


def _shape(row: Row, where: str) -> str:
    """The first shape whose columns the row has, all filled in; else the first whose columns it has."""
    fitting = [name for name, columns in SHAPES.items() if all(column in row for column in columns)]
    filled = [name for name in fitting if not any(_is_empty(row[column]) for column in SHAPES[name])]
    if not fitting:
        shapes = "; ".join(", ".join(columns) for columns in SHAPES.values())
        raise InputError(
            f"{where}: the columns {', '.join(row)} fit no shape of conversations ({shapes}). "
            "Map them with --columns, for example `--columns instruction=question response=answer`."
        )
    return (filled or fitting)[0]


def _turns(row: Row, columns: Sequence[str], where: str) -> list[Message]:
    """The turns in `columns`: lists of turns; or texts, of a question and, if a second column is given, its answer.

    The text of a column of INPUTS belongs to an `instruction`, that of a column `system` comes first.
    """
    if seen := next((name for name in NO_TEXT if not _is_empty(row.get(name))), None):
        raise InputError(f"{where}, column {seen!r}: only text can be read. Delete the row, or the column.")
    turns: list[Message] = []
    if columns[0] in ("messages", "conversations") or (columns[0] == "prompt" and isinstance(row["prompt"], list)):
        for column in columns:
            turns += _turns_in(row[column], f"{where}, column {column!r}")
    else:
        if not _is_empty(row.get("history")):
            remedy = "Write all turns as `messages`, or give a file without it; for an older run as --test_file."
            raise InputError(f"{where}, column 'history': not read. {remedy}")
        given = [name for name in INPUTS if not _is_empty(row.get(name))]
        if columns[0] != "instruction" and given:
            pairs = zip(("instruction", "output"), columns, strict=False)
            mapped = " ".join(f"{name}={column}" for name, column in pairs)
            remedy = f"Map the others with `--columns {mapped}`, or delete it."
            raise InputError(f"{where}, column {given[0]!r}: read beside an `instruction` alone. {remedy}")
        for role, column in zip(("user", "assistant"), columns, strict=False):
            names = (column, *INPUTS) if column == "instruction" else (column,)
            texts = [_text_in(row.get(name), f"{where}, column {name!r}") for name in names]
            content = "\n\n".join(text for text in texts if text.strip())
            if not content:
                what = "question" if role == "user" else "answer"
                raise InputError(f"{where}, column {column!r}: the {what} is empty. Fill it in or delete the row.")
            turns.append({"role": role, "content": content})
    if not _is_empty(row.get("system")):
        if turns and turns[0]["role"] == "system":
            raise InputError(f"{where}, column 'system': the conversation has a system turn already. Keep one of both.")
        turns.insert(0, {"role": "system", "content": _text_in(row["system"], f"{where}, column 'system'")})
    if turns and turns[0]["role"] == "system" and not turns[0]["content"].strip():
        del turns[0]
    return turns


def _turns_in(cell: Any, where: str) -> list[Message]:
    """The turns in a cell: a list of {role, content} or {from, value}, or such a list as JSON text (in CSV)."""
    cell = _parse_json(cell, f"{where}: not a list of turns, and not valid JSON")
    if not isinstance(cell, list) or not all(isinstance(turn, dict) for turn in cell):
        raise InputError(f'{where}: expected a list of turns, such as [{{"role": "user", "content": "..."}}, ...].')
    turns: list[Message] = []
    for number, turn in enumerate(cell, 1):
        place = f"{where}, turn {number}"
        role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
        given = turn.get(role_key)
        if not isinstance(given, str) or given not in ROLES:
            raise InputError(f"{place}: the role {given!r} is unknown; use one of {', '.join(ROLES)}.")
        role, content = ROLES[given], _text_in(turn.get(text_key), place)
        _check_fields(turn, place)
        if calls := _calls_in(turn.get("tool_calls"), place):
            content = "\n".join([content, *calls] if content.strip() else calls)
        if not content.strip() and role != "system":
            missing = "the answer" if role == "assistant" else "the turn"
            raise InputError(f"{place} ({given}): {missing} is empty. Fill it in or delete it.")
        if given == "function_call" and turns and turns[-1]["role"] == "assistant":
            turns[-1] = {"role": role, "content": f"{turns[-1]['content']}\n{content}"}  # one turn speaks and calls
        else:
            turns.append({"role": role, "content": content})
    return turns


def _check_fields(turn: dict[str, Any], where: str) -> None:
    """Refuses what another trainer would honor and this one does not."""
    for name in ("reasoning_content", "reasoning", "thinking"):
        if not _is_empty(turn.get(name)):
            raise InputError(f"{where}: {name!r} is not read. Write it into the turn's text, or delete it.")
    if turn.get("weight") not in (None, 1) or turn.get("train") is False:
        raise InputError(f"{where}: all turns weigh the same in training. Delete 'weight' or 'train'.")


def _calls_in(cell: Any, where: str) -> list[str]:
    """The function calls of a turn, each as JSON."""
    cell = _parse_json(cell, f"{where}: 'tool_calls' is not valid JSON")
    if _is_empty(cell):
        return []
    if not isinstance(cell, list) or not all(isinstance(call, dict) for call in cell):
        raise InputError(f"{where}: 'tool_calls' is not a list of calls. Correct it.")
    return [_as_json(call.get("function", call), f"{where}: 'tool_calls'") for call in cell]


def _check_order(turns: list[Message], where: str) -> None:
    """A system turn may come first; then user and assistant take turns, with tool turns after an answer (a call)."""
    before = ""
    for number, turn in enumerate(turns, 1):
        role, expected = turn["role"], NEXT_ROLES[before]
        if role not in expected:
            raise InputError(
                f"{where}, turn {number}: the role {role} {f'after {before}' if before else 'at the start'}, where "
                f"{' or '.join(expected)} is expected. Join neighbors of one role, and delete what does not belong."
            )
        before = role


def _add_instructions(turns: list[Message], row: Row, where: str, system_prompt: str | None) -> bool:
    """Gives turns without a system turn the system prompt, and the system turn the functions that a row may call.

    Without their description, a model would learn to make up calls. Returns whether the row has functions.
    """
    system = [turns.pop(0)["content"]] if turns[0]["role"] == "system" else [system_prompt] if system_prompt else []
    tools = _parse_json(row.get("tools"), f"{where}, column 'tools': not valid JSON")
    if not _is_empty(tools):
        system.append(TOOLS.format(tools=_as_json(tools, f"{where}, column 'tools'")))
    if system:
        turns.insert(0, {"role": "system", "content": "\n\n".join(system)})
    return not _is_empty(tools)


def _as_json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise InputError(f"{where}: {error}. Write it as text.") from None


def _parse_json(cell: Any, problem: str) -> Any:
    """The value that a text in a cell spells as JSON, None if it is blank; a list or an object is the value itself."""
    if isinstance(cell, bytes):
        raise InputError(f"{problem} (bytes). Write it as text.")
    try:
        return (parse_json(cell) if cell.strip() else None) if isinstance(cell, str) else cell
    except ValueError as error:
        raise InputError(f"{problem} ({getattr(error, 'msg', error)}). Correct it.") from None


def _is_empty(cell: Any) -> bool:
    return cell is None or cell == "" or cell == [] or cell != cell  # NaN is not itself


def _text_in(cell: Any, where: str) -> str:
    if not isinstance(cell, list) or not all(isinstance(part, dict) for part in cell):
        return text_in(cell, where)
    for part in cell:  # OpenAI's content parts
        kind = str(part.get("type") or "text")
        if "text" not in kind or not isinstance(part.get("text"), str):
            raise InputError(f"{where}: a part of the type {kind!r}; only text can be read. Delete it, or the row.")
    return "".join(part["text"] for part in cell)


def _item(row: Conversation) -> doctor.Item:
    answer = "\n".join(turn["content"] for turn in row.messages if turn["role"] == "assistant")
    return doctor.Item(row.id, "\n".join(_questions(row)), answer, answer)


def _questions(row: Conversation) -> tuple[str, ...]:
    """What a model is told in a conversation: by the system, by users and by tools."""
    return tuple(turn["content"] for turn in row.messages if turn["role"] != "assistant")
