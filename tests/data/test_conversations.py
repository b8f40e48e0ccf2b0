"""Rows of every shape to conversations; rows that cannot be used are named; splits and the counts of the report."""

import json
import subprocess
import sys
from dataclasses import replace

import datasets
import pytest
import yaml
from helpers import ROOT, SHARED

from common.data.conversations import ROLES, SHAPES, load_conversations, read_columns, read_question
from common.data.files import file_hash
from common.data.splits import SPLITS
from common.errors import InputError
from common.options import ChatDataConfig as Config
from common.options import check


def save(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tmp_path, rows: list[dict], **options):
    options = {"validation_fraction": 0.0, "test_fraction": 0.0, **options}
    return load_conversations(Config(train_file=save(tmp_path / "t.jsonl", rows), **options))


def turns(data, row: int = 0, split: str = "train") -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in data.splits[split][row].messages]


def problem(tmp_path, rows: list[dict], **options) -> str:
    with pytest.raises(InputError) as caught:
        load(tmp_path, rows, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def said(*pairs: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in pairs]


def shared(*pairs: tuple[str, str]) -> list[dict]:
    return [{"from": role, "value": content} for role, content in pairs]


TURNS = [("user", "Hi"), ("assistant", "Hello")]
PAIR = {"instruction": "Hi", "response": "Hello"}


# --- shapes


@pytest.mark.parametrize(
    ("shape", "row", "expected"),
    [
        ("instruction + response", PAIR, TURNS),
        ("instruction + response", {**PAIR, "input": "1 2"}, [("user", "Hi\n\n1 2"), TURNS[1]]),
        ("Bitext", {**PAIR, "category": "ORDER", "intent": "cancel"}, TURNS),
        ("Alpaca", {"instruction": "Hi", "output": "Hello"}, TURNS),
        ("Alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}, TURNS),
        ("Alpaca", {"instruction": "Add", "input": "1 2", "output": "3"}, [("user", "Add\n\n1 2"), ("assistant", "3")]),
        ("prompt + completion", {"prompt": "Hi", "completion": "Hello"}, TURNS),
        ("prompt + completion", {"prompt": said(TURNS[0]), "completion": said(TURNS[1])}, TURNS),
        ("messages", {"messages": said(*TURNS)}, TURNS),
        ("messages", {"messages": json.dumps(said(*TURNS))}, TURNS),  # as a cell of a CSV file
        ("messages", {"messages": shared(("human", "Hi"), ("gpt", "Hello"))}, TURNS),
        ("messages", {"messages": said(("system", "Be brief"), *TURNS)}, [("system", "Be brief"), *TURNS]),
        ("messages", {"messages": said(("system", " "), *TURNS)}, TURNS),
        ("messages", {"system": "Be brief", "messages": said(*TURNS)}, [("system", "Be brief"), *TURNS]),
        ("messages", {"messages": [{"role": "user", "content": [{"text": "Hi"}]}, *said(TURNS[1])]}, TURNS),
        ("ShareGPT", {"conversations": shared(("human", "Hi"), ("gpt", "Hello")), "source": "s", "score": 4.9}, TURNS),
        (
            "ShareGPT",
            {"conversations": shared(("human", "Hi"), ("function_call", "f()"), ("observation", "1"), ("gpt", "One"))},
            [("user", "Hi"), ("assistant", "f()"), ("tool", "1"), ("assistant", "One")],
        ),
        (
            "ShareGPT",  # one turn speaks and calls
            {"conversations": shared(("human", "Hi"), ("gpt", "Wait."), ("function_call", "f()"))},
            [("user", "Hi"), ("assistant", "Wait.\nf()")],
        ),
    ],
)  # fmt: skip
def test_shapes_are_detected_and_named(tmp_path, shape, row, expected):
    data = load(tmp_path, [row])
    assert turns(data) == expected
    assert data.report["shapes"] == {"train": {shape: 1}}


def test_openai_tool_calls_are_answers(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [*said(("user", "Hi")), {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += said(("tool", "1"), ("assistant", "One"))
    data = load(tmp_path, [{"messages": messages}])
    assert turns(data)[1] == ("assistant", '{"name": "f", "arguments": "{}"}')
    messages[1]["tool_calls"] = json.dumps([call])  # as a cell of a table
    assert turns(load(tmp_path, [{"messages": messages}])) == turns(data)
    messages[1]["tool_calls"] = "["
    assert "data row 1, column 'messages', turn 2: 'tool_calls' is not valid" in problem(
        tmp_path, [{"messages": messages}]
    )


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (r'[{"role": "user", "content": "Hi \ud83d"}]', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "a number has too many digits"),
    ],
)
def test_json_in_a_cell_that_is_no_text_is_named(tmp_path, cell, reason):
    for row in ({"messages": cell}, {**PAIR, "tools": cell}):
        message = problem(tmp_path, [PAIR, row])
        assert f"data row 2, column '{[*row][-1]}': not " in message and reason in message


@pytest.mark.parametrize(
    "field", [{"reasoning_content": "..."}, {"thinking": "..."}, {"weight": 0}, {"weight": 0.5}, {"train": False}]
)
def test_what_a_turn_asks_for_and_does_not_get_is_said(tmp_path, field):
    messages = said(*TURNS)
    messages[1] |= field
    found = problem(tmp_path, [{"messages": messages}])
    assert "data row 1, column 'messages', turn 2: " in found and repr(next(iter(field))) in found


def test_a_weight_of_one_is_what_a_turn_has(tmp_path):
    messages = [{**turn, "weight": weight} for turn, weight in zip(said(*TURNS), (None, 1), strict=True)]
    assert turns(load(tmp_path, [{"messages": messages}])) == TURNS


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image", "text": "a caption", "image": "a.png"},
        {"type": "input_audio", "text": None},
    ],
)
def test_parts_that_are_no_text_are_named(tmp_path, part):
    content = [{"type": "text", "text": "What is this? "}, part]
    row = {"messages": [{"role": "user", "content": content}, *said(TURNS[1])]}
    message = problem(tmp_path, [PAIR, row])
    assert f"row 2, column 'messages', turn 1: a part of the type {part['type']!r}; only text can be read" in message
    with pytest.raises(InputError, match=f"in.json, data row 1, column 'messages', turn 1: .*{part['type']}"):
        read_question(row, "in.json, data row 1", {})


def test_a_history_beside_the_turns_is_named(tmp_path):
    """Without it, the answer would be learned without what it answers to."""
    row = {"instruction": "And in French?", "output": "Bonjour", "history": [["Say hello in Spanish", "Hola"]]}
    assert "row 2, column 'history': not read" in problem(tmp_path, [{**PAIR, "history": []}, row])


def test_an_input_that_belongs_to_no_instruction_is_named(tmp_path):
    row = {"prompt": "Translate", "input": "Hallo", "completion": "Hello"}
    message = problem(tmp_path, [{**row, "input": ""}, row])
    assert "row 2, column 'input': read beside an `instruction` alone. Map" in message
    (read,) = load(tmp_path, [row], columns=["instruction=prompt", "output=completion"]).splits["train"]
    assert read.messages[0]["content"] == "Translate\n\nHallo"


def test_another_system_turn_is_another_question(tmp_path):
    """Two answers to one question are no contradiction where the system turns differ."""
    rows = [{**PAIR, "system": system} for system in ("Be brief.", "Be kind.")] + [{**PAIR, "response": "No."}] * 2
    (finding,) = load(tmp_path, rows).report["findings"]
    assert "1 row repeats an earlier one, but for case" in finding


def test_pictures_beside_the_turns_are_named(tmp_path):
    """They are no part of a turn in some data sets; a row whose column is empty has none."""
    row = {"messages": said(*TURNS), "images": ["a.png"]}
    assert "row 2, column 'images': only text can be read" in problem(tmp_path, [{**PAIR, "images": []}, row])
    with pytest.raises(InputError, match="in.json, data row 1, column 'images'"):
        read_question(row, "in.json, data row 1", {})


def test_every_row_has_its_own_shape(tmp_path):
    """JSON rows may mix shapes; Parquet fills what a row lacks with None."""
    rows = [PAIR, {"messages": said(*TURNS)}]
    data = load(tmp_path, rows)
    assert turns(data, 0) == turns(data, 1) == TURNS
    assert data.report["shapes"] == {"train": {"instruction + response": 1, "messages": 1}}
    filled = [{**dict.fromkeys(("instruction", "response", "messages")), **row} for row in rows]
    datasets.Dataset.from_list(filled).to_parquet(tmp_path / "t.parquet")
    config = Config(train_file=str(tmp_path / "t.parquet"), validation_fraction=0.0, test_fraction=0.0)
    assert load_conversations(config).report["shapes"] == data.report["shapes"]


def test_csv_tsv_and_json_files(tmp_path):
    (tmp_path / "t.csv").write_text('instruction,response\n"a, b","c\nd"\n')
    (tmp_path / "t.tsv").write_text("instruction\tresponse\nnan\tc\n")
    (tmp_path / "t.json").write_text(json.dumps([PAIR]))
    found = []
    for name in ("t.csv", "t.tsv", "t.json"):
        config = Config(train_file=str(tmp_path / name), validation_fraction=0.0, test_fraction=0.0)
        found.append(turns(load_conversations(config)))
    assert found == [[("user", "a, b"), ("assistant", "c\nd")], [("user", "nan"), ("assistant", "c")], TURNS]


def test_columns_maps_odd_names(tmp_path):
    rows = [{"question": "Hi", "answer": "Hello", "instruction": "an id"}]
    assert turns(load(tmp_path, rows, columns=["instruction=question", "response=answer"])) == TURNS
    assert turns(load(tmp_path, [{"chat": said(*TURNS)}], columns=["messages=chat"])) == TURNS
    assert "no column 'q'; it has question, answer, instruction. Name the right one with --columns." in problem(
        tmp_path, rows, columns=["instruction=q"]
    )
    assert "--columns question" in problem(tmp_path, rows, columns=["question"])
    assert "--columns text=question: expected name=column, with one of the names" in problem(
        tmp_path, rows, columns=["text=question"]
    )
    assert "'response' twice" in problem(tmp_path, rows, columns=["response=answer", "response=question"])
    assert read_columns(["input=a=b"]) == {"input": "a=b"}
    rows = [{"input": "Hi", "output": "Hello"}]
    for columns in (["instruction=input"], ["prompt=input", "completion=output"]):
        assert turns(load(tmp_path, rows, columns=columns)) == TURNS  # a mapped column counts once


def test_what_an_instruction_is_about_may_be_its_context(tmp_path):
    rows = [{"instruction": "When?", "context": "It began in 2000.", "response": "2000", "category": "closed_qa"}]
    assert turns(load(tmp_path, rows)) == [("user", "When?\n\nIt began in 2000."), ("assistant", "2000")]
    rows = [{"prompt": "When?", "context": "It began in 2000.", "completion": "2000"}]
    assert "column 'context': read beside an `instruction` alone" in problem(tmp_path, rows)


def test_system_prompt_comes_first_where_there_is_none(tmp_path):
    rows = [PAIR, {"messages": said(("system", "Own"), *TURNS)}]
    data = load(tmp_path, rows, system_prompt="Be brief")
    assert turns(data, 0) == [("system", "Be brief"), *TURNS]
    assert turns(data, 1) == [("system", "Own"), *TURNS]


def test_tools_are_listed_in_the_system_turn(tmp_path):
    """A call of a function that was never described would teach to make one up."""
    listed = 'You can call these functions:\n[{"name": "f"}]'
    row = {"conversations": shared(("human", "Hi"), ("gpt", "Hello")), "tools": '[{"name": "f"}]'}
    rows = [row, {**row, "tools": [{"name": "f"}]}, {**row, "tools": "[]"}, {**row, "tools": None}]
    data = load(tmp_path, rows)
    assert [turns(data, i)[0][1] for i in range(4)] == [listed, listed, "Hi", "Hi"]
    assert data.report["rows"]["train"]["with_tools"] == 2
    assert turns(load(tmp_path, rows[:1], system_prompt="Brief"))[0] == ("system", f"Brief\n\n{listed}")
    assert "data row 1, column 'tools': not valid JSON" in problem(tmp_path, [{**row, "tools": "["}])


def test_turns_after_the_last_answer_are_dropped_and_counted(tmp_path):
    data = load(tmp_path, [{"messages": said(*TURNS, ("user", "And?"))}, PAIR])
    assert turns(data) == TURNS and data.report["rows"]["train"]["dropped_unanswered"] == 1


# --- rows that cannot be used


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "a", "label": "b"},
            "the columns text, label fit no shape of conversations (messages; conversations; ",
        ),
        ({"instruction": "Hi", "response": " "}, "column 'response': the answer is empty"),
        ({"instruction": "Hi", "output": None}, "column 'output': the answer is empty"),
        ({"instruction": "", "input": None, "output": "a"}, "column 'instruction': the question is empty"),
        ({"prompt": "Hi", "completion": float("nan")}, "column 'completion': the answer is empty"),
        ({"messages": said(("user", "Hi"))}, "there is no assistant turn"),
        ({"messages": []}, "there is no assistant turn"),
        ({"messages": said(("user", "Hi"), ("assistant", ""))}, "turn 2 (assistant): the answer is empty"),
        ({"messages": said(("user", ""), ("assistant", "a"))}, "turn 1 (user): the turn is empty"),
        ({"messages": said(("user", "Hi"), ("narrator", "a"))}, "turn 2: the role 'narrator' is unknown; use one of"),
        ({"messages": [{"content": "Hi"}]}, "turn 1: the role None is unknown"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "turn 1: the role ['user'] is unknown"),
        ({"messages": said(*TURNS, TURNS[1])}, "turn 3: the role assistant after assistant, where user or tool"),
        ({"messages": said(TURNS[0], *TURNS)}, "turn 2: the role user after user, where assistant is expected"),
        ({"messages": said(TURNS[1], *TURNS)}, "turn 1: the role assistant at the start"),
        ({"messages": said(*TURNS, ("system", "s"), *TURNS)}, "turn 3: the role system after assistant"),
        ({"messages": said(("tool", "1"), *TURNS)}, "turn 1: the role tool at the start"),
        ({"messages": "Hi"}, "column 'messages': not a list of turns, and not valid JSON"),
        ({"messages": {"role": "user"}}, "column 'messages': expected a list of turns"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "turn 1: expected a text, not a list"),
        ({**PAIR, "instruction": {"title": "t"}}, "column 'instruction': expected a text, not an object"),
        ({**PAIR, "response": [1]}, "column 'response': expected a text, not a list"),
        (
            {"system": "s", "messages": said(("system", "s"), *TURNS)},
            "column 'system': the conversation has a system",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, row, message):
    assert "t.jsonl, data row 2" in problem(tmp_path, [PAIR, row]) and message in problem(tmp_path, [PAIR, row])


@pytest.mark.parametrize("column", ["instruction", "response", "messages", "system", "tools"])
def test_bytes_are_no_text(tmp_path, column):
    rows = [dict.fromkeys((*PAIR, "messages", "system", "tools")) | PAIR | {column: b"[]"}]
    rows[0] |= dict.fromkeys(PAIR) if column == "messages" else {}
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=f"t.parquet, data row 1, column '{column}': .*bytes"):
        load_conversations(Config(train_file=str(tmp_path / "t.parquet")))
    if column != "response":
        with pytest.raises(InputError, match=f"in, data row 7, column '{column}': .*bytes"):
            read_question(rows[0], "in, data row 7", {})


def test_every_role_and_shape_is_listed(tmp_path):
    """The lists that errors print are those that are honored."""
    assert set(ROLES.values()) == {"system", "user", "assistant", "tool"}
    for shape, columns in SHAPES.items():
        cell = said(*TURNS) if len(columns) == 1 else "text"
        assert load(tmp_path, [dict.fromkeys(columns, cell)]).report["shapes"]["train"] == {shape: 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"system_prompt": " "}, "--system_prompt is blank"),
        ({"dataset_name": "a", "train_file": "b"}, "--dataset_name and --train_file"),
        ({"dataset_config": "a"}, "--dataset_config needs"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leave no training rows"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    check(Config())
    with pytest.raises(InputError) as caught:
        check(replace(Config(), **options))
    assert message in str(caught.value)


# --- splits and counts


def many(count: int) -> list[dict]:
    return [{"instruction": f"Question {i}", "response": f"Answer {i}"} for i in range(count)]


def test_missing_splits_are_cut_by_their_own_seed(tmp_path):
    data = load(tmp_path, many(50), validation_fraction=0.1, test_fraction=0.2)
    assert [len(data.splits[split]) for split in SPLITS] == [35, 5, 10]
    assert data.report["cut_from_train"] == {"test": 10, "validation": 5}
    ids = [row.id for split in SPLITS for row in data.splits[split]]
    assert sorted(ids, key=int) == [str(i) for i in range(50)]
    for row in data.splits["test"]:
        assert row.messages[1]["content"] == f"Answer {row.id}"
    again = load(tmp_path, many(50), validation_fraction=0.1, test_fraction=0.2)
    other = load(tmp_path, many(50), validation_fraction=0.1, test_fraction=0.2, split_seed=1)
    assert again.splits == data.splits != other.splits
    assert data.sources["train"] == {
        "name": str(tmp_path / "t.jsonl"), "sha256": file_hash(tmp_path / "t.jsonl")
    }  # fmt: skip
    assert "too few to cut 10% for test" in problem(tmp_path, many(3), test_fraction=0.1)


def test_limits_and_ids(tmp_path):
    rows = [{**row, "key": f"k{i}"} for i, row in enumerate(many(40))]
    limits = {"max_train_samples": 7, "max_eval_samples": 2, "validation_fraction": 0.1, "test_fraction": 0.1}
    data = load(tmp_path, rows, id_column="key", **limits)
    assert [len(data.splits[split]) for split in SPLITS] == [7, 2, 4]
    assert data.report["rows"]["train"]["used"] == 7 and data.report["rows"]["train"]["read"] == 40
    assert all(row.messages[1]["content"] == f"Answer {row.id[1:]}" for row in data.splits["train"])
    message = problem(tmp_path, [{**row, "key": "k"} for row in rows], id_column="key")
    assert "t.jsonl, data row 2, column 'key': the id is missing or occurs in an earlier row" in message
    assert "no column 'name'; it has " in problem(tmp_path, rows, id_column="name")


def test_duplicates_and_overlap_are_counted(tmp_path):
    rows = [PAIR, PAIR, {"instruction": "Hi", "response": "Good day"}]
    test = save(tmp_path / "test.jsonl", [{"instruction": "Hi", "response": "Yes?"}, many(1)[0]])
    counts = load(tmp_path, rows, test_file=test).report["rows"]
    assert counts["train"] == {"read": 3, "used": 3, "turns": 6, "answers": 3, "duplicates": 1}
    assert counts["test"] == {"read": 2, "used": 2, "turns": 4, "answers": 2, "duplicates": 0, "also_in_train": 1}


def test_test_rows_alone_for_evaluation(tmp_path):
    config = Config(test_file=save(tmp_path / "t.jsonl", many(2)))
    assert len(load_conversations(config, training=False).splits["test"]) == 2
    with pytest.raises(InputError, match="no training rows"):
        load_conversations(config)


def test_a_hub_data_set_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    save(tmp_path / "set" / "train.jsonl", [{"conversations": shared(("human", "Hi"), ("gpt", "Hello")), "score": 5.0}])
    config = Config(dataset_name=str(tmp_path / "set"), validation_fraction=0.0, test_fraction=0.0)
    data = load_conversations(config)
    assert turns(data) == TURNS and data.report["shapes"] == {"train": {"ShareGPT": 1}}


def test_reads_data_without_torch_or_transformers():
    code = "import sys, common.data.conversations; print({'torch', 'transformers'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.strip() == "set()"


# --- the data that come with the project


def test_demo_is_split_80_20_without_copies():
    """150 instructions and 30 conversations of several turns, held out by a fifth; nobody's text twice."""
    data = load_conversations(Config())
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 144, "validation": 18, "test": 18}
    assert data.report["shapes"] == {
        "train": {"instruction + response": 120, "messages": 24},
        **dict.fromkeys(("validation", "test"), {"instruction + response": 15, "messages": 3}),
    }
    counts = data.report["rows"].values()
    assert not any(entry["duplicates"] or entry.get("also_in_train") for entry in counts)
    rows = [row for split in SPLITS for row in data.splits[split]]
    assert all(sum(turn["role"] == "assistant" for turn in row.messages) > 1 for row in rows if len(row.messages) > 2)
    for role in ("user", "assistant"):  # no near copies: hardly a run of four words is shared
        said = [[turn["content"].split() for turn in row.messages if turn["role"] == role] for row in rows]
        runs = [{tuple(words[i : i + 4]) for words in texts for i in range(len(words) - 3)} for texts in said]
        for i, one in enumerate(runs):
            assert max((len(one & other) for other in runs[:i]), default=0) <= 3


def test_demo_answers_have_a_tone_but_no_template():
    """Short, and each begins in its own way."""
    data = load_conversations(Config())
    answers = [
        turn["content"] for rows in data.splits.values() for row in rows for turn in row.messages
        if turn["role"] == "assistant"
    ]  # fmt: skip
    assert max(len(answer.split()) for answer in answers) <= 80
    assert len({tuple(answer.split()[:3]) for answer in answers}) > 0.98 * len(answers)
    assert sum("!" in answer for answer in answers) > 0.6 * len(answers)  # a plain base model has few


def test_personas():
    personas = yaml.safe_load((ROOT / "data" / "personas.yaml").read_text(encoding="utf-8"))
    assert [persona["name"] for persona in personas] == ["order", "billing", "sales", "support"]
    for persona in personas:
        assert set(persona) == {"name", "description", "system_prompt", "examples"}
        assert 20 < len(persona["description"]) < 80 and "\n" not in persona["system_prompt"]
        assert 40 < len(persona["system_prompt"].split()) < 90


@pytest.mark.skipif(not SHARED.exists(), reason="real data lie beside the project")
@pytest.mark.parametrize(
    ("files", "shape", "used"),
    [
        ("rasbt_instruct_1100", "Alpaca", {"train": 935, "validation": 55, "test": 110}),
        ("bitext_customer_support", "Alpaca", {"train": 3609, "validation": 452, "test": 453}),
        ("oasst_chat", "messages", {"train": 763, "validation": 95, "test": 95}),
        ("sharegpt_glaive_demo/glaive_toolcall_en_demo.json", "ShareGPT", {"train": 240, "validation": 30, "test": 30}),
    ],
)
def test_real_data_load(files, shape, used):
    path = SHARED / files
    paths = {f"{split}_file": str(path / f"{split}.jsonl") for split in SPLITS} if path.is_dir() else {
        "train_file": str(path)
    }  # fmt: skip
    data = load_conversations(Config(**paths))
    assert {split: len(rows) for split, rows in data.splits.items()} == used
    assert {name for shapes in data.report["shapes"].values() for name in shapes} == {shape}
    if files.startswith("rasbt"):  # seven questions of its other splits are in its training rows as well
        assert [data.report["rows"][split]["also_in_train"] for split in ("validation", "test")] == [1, 6]
    if files.startswith("sharegpt"):
        assert data.report["rows"]["train"]["with_tools"] == 191
