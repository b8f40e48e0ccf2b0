"""Files from elsewhere: they run no code, write nowhere else, and no terminal, page or spreadsheet obeys them."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from helpers.rows import toy_options, write_csv
from helpers.runs import run_evaluate, train, train_chat

import evaluate
from common import open_run
from common.errors import InputError, printable
from common.options import parse_config
from common.use import terminal

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaForCausalLM, LlamaConfig
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): pass
"""


@pytest.fixture
def with_code(models, trained, tmp_path) -> tuple[Path, Path]:
    """A copy of an adapter whose base brings code and whose files all ask for it to be run; what that would write."""
    base, run, marker = tmp_path / "base", tmp_path / "run", tmp_path / "ran"
    shutil.copytree(models["llama"], base)
    shutil.copytree(trained("llama", "generative", "single"), run)
    config = json.loads((base / "config.json").read_text())
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config |= {"model_type": "unheard_of", "auto_map": classes}
    (base / "config.json").write_text(json.dumps(config))
    (base / "code.py").write_text(CODE.format(marker=str(marker)))
    task = json.loads((run / "adapter" / "task.json").read_text())
    task["model_options"] |= {"model": str(base), "trust_remote_code": True}
    (run / "adapter" / "task.json").write_text(json.dumps(task))
    lines = (run / "config.yaml").read_text().splitlines()
    lines = [line for line in lines if not line.startswith(("model:", "trust_remote_code:"))]
    (run / "config.yaml").write_text("\n".join([*lines, f"model: {base}", "trust_remote_code: true"]) + "\n")
    return run, marker


def test_no_file_turns_on_remote_code(with_code):
    run, marker = with_code
    rows = [{"text": "a text", "label": "sport"}]
    for folder in (run, run / "adapter"):
        with pytest.raises(Exception, match=r"trust_remote_code|unheard_of"):
            open_run(str(folder)).classifier()
        with pytest.raises(Exception, match=r"trust_remote_code|unheard_of"):
            run_evaluate("--run", folder, "--test_file", write_csv(run / "rows.csv", rows))
    assert not marker.exists()
    with pytest.raises(Exception, match=r".*"):  # the code is run, whatever comes of it
        open_run(str(run)).classifier(trust_remote_code=True)
    assert marker.exists()


def test_a_yaml_file_does_not_turn_it_on_either(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("trust_remote_code: true\n")
    with pytest.raises(InputError, match="give it on the command line"):
        parse_config(evaluate.Config, ["--config", str(file)])
    assert parse_config(evaluate.Config, ["--config", str(file), "--trust_remote_code", "true"]).trust_remote_code
    file.write_text("trust_remote_code: false\n")
    assert not parse_config(evaluate.Config, ["--config", str(file)]).trust_remote_code


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", "a\\b", "/tmp/x"])
def test_a_run_name_is_no_path(name):
    import train_cls

    with pytest.raises(InputError, match="cannot be a path"):
        parse_config(train_cls.Config, ["--run_name", name])


EVIL = ["=HYPERLINK(\"http://x\")", "<img src=x onerror=alert(1)>", "red\x1b[31m", "two\nlines", "$a_{$", "-1", "a|b"]


@pytest.fixture(scope="module")
def evil(models, tmp_path_factory) -> tuple[Path, str]:
    """A run whose labels and texts are commands to whatever shows them, and all that it printed."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("evil")
    rows = [{"text": f"{label} text {i} \x1b[2J", "label": label} for i in range(4) for label in EVIL]
    file = write_csv(folder / "rows.csv", rows)
    given = ["--model", models["llama"], "--train_file", file, "--validation_file", file, "--test_file", file]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        train(*given, "--max_steps", 1, "--output_dir", folder / "run", "--max_length", 200, draw=True)
    return folder / "run", shown.getvalue()


def test_labels_are_shown_and_not_obeyed(evil):
    run, shown = evil
    files = [run / "data_report.md", run / "eval/test/report.md", run / "adapter/README.md"]
    for text in (shown, *(file.read_text() for file in files)):
        assert "\x1b" not in text
        outside = [line for line in text.splitlines() if not line.startswith("    ")]  # of blocks of code
        assert not any("<img" in line.replace(r"\<", "") for line in outside)
        assert not any(line == "lines" for line in outside)
    table = [line for line in (run / "eval/test/report.md").read_text().splitlines() if line.startswith("| ")]
    assert len({line.replace(r"\|", "").count("|") for line in table if len(line) > 3}) <= 2
    assert r"two\nlines" in shown and r"red\x1b[31m" in shown and r"a\|b" in shown
    assert (run / "eval/test/confusion_matrix.png").stat().st_size > 1000


def test_no_cell_of_the_predictions_is_a_formula(evil):
    run, _ = evil
    with open(run / "eval/test/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for cell in (*row, *row.values()):
            assert not cell.startswith(("=", "+", "@", "\t")) and (not cell.startswith("-") or float(cell))
    gold = [json.loads(line)["gold"] for line in (run / "eval/test/predictions.jsonl").read_text().splitlines()]
    assert [row["gold"].removeprefix("'") for row in rows] == gold and set(gold) == set(EVIL)


def test_what_a_model_writes_is_shown_and_not_obeyed(capsys):
    terminal.show(piece for piece in ["plain", " \x1b[2Jcleared", "\u202eback\u202c", "é\n漢"])
    assert capsys.readouterr().out == "plain \\x1b[2Jcleared\\u202eback\\u202cé\n漢\n"
    assert printable("tab\tand\nline") == "tab\tand\nline"


@pytest.mark.parametrize("kind", ["classification", "chat"])
def test_an_adapter_names_its_base_as_it_was_given(kind, models, toy_files, chat_files, tmp_path, monkeypatch):
    """Not by a path of this machine; for the embedded model, by its name on the hub."""
    from common.model import storage

    model = str(models["llama"])
    monkeypatch.setattr(storage, "EMBEDDED", model)
    monkeypatch.setattr(storage, "resolve_model", lambda name, revision: name)
    few = ["--model", model, "--max_steps", 1, "--output_dir", tmp_path / "run"]
    train_chat(*few, *chat_files) if kind == "chat" else train(*few, *toy_options(toy_files))
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert 'base_model: "HuggingFaceTB/SmolLM2-135M-Instruct"' in card
