"""Files from elsewhere: they run no code, write nowhere else, and no terminal, page or spreadsheet obeys them."""

import csv
import json
import re
import shutil
from html import unescape
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from helpers.rows import toy_options, toy_rows, write_csv
from helpers.runs import run_evaluate, train, train_chat

import evaluate
from common import open_run
from common.data.report import table
from common.errors import InputError, printable
from common.options import parse_config
from common.train.run_folder import list_checkpoints
from common.use import terminal
from common.use.questions import made_from

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
        with pytest.raises(InputError, match=r"could not be loaded.*(trust_remote_code|unheard_of)"):
            open_run(str(folder)).classifier()
        with pytest.raises(InputError, match=r"could not be loaded.*(trust_remote_code|unheard_of)"):
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
    lines = (run / "eval/test/report.md").read_text().splitlines()
    bars = [line.replace(r"\|", "").count("|") if line.startswith("|") else 0 for line in lines]
    assert max(bars) > 2 and all(a == b for a, b in pairwise(bars) if a and b)  # no cell opens a column
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


@pytest.mark.parametrize("text", [r"\<img src=x>", r"\\<img src=x>", "![x](http://a.b)", r"\|a", r"[x]\(y)", r"a\b"])
def test_a_cell_is_shown_as_it_is_by_a_markdown_reader(text):
    """No backslash of the text's own takes the escapes away."""
    html = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table").render(table(["a"], [[text]]))
    shown = unescape(re.search("<td>(.*)</td>", html)[1])
    assert shown == text and "<img" not in html and "href" not in html


def test_results_are_written_nowhere_else(trained, tmp_path):
    """Not over a user's files, and through no link in a run folder that came from elsewhere."""
    run, mine = shutil.copytree(trained("llama", "generative", "single"), tmp_path / "run"), tmp_path / "mine"
    mine.mkdir()
    (mine / "report.md").write_text("precious")
    with pytest.raises(InputError, match="there is report.md already"):
        run_evaluate("--run", run, "--output_dir", mine)
    with pytest.raises(InputError, match="this is a file"):
        run_evaluate("--run", run, "--output_dir", mine / "report.md")
    (run / "eval" / "test" / "predictions.jsonl").unlink()
    (run / "eval" / "test" / "predictions.jsonl").symlink_to(mine / "report.md")
    with pytest.raises(InputError, match="predictions.jsonl is a link"):
        run_evaluate("--run", run)
    shutil.rmtree(run / "eval" / "test")
    (run / "eval" / "test").symlink_to(mine)
    with pytest.raises(InputError, match="test is a link"):
        run_evaluate("--run", run)
    (run / "eval" / "test").unlink()
    shutil.rmtree(run / "eval")
    (run / "eval").symlink_to(mine)
    with pytest.raises(InputError, match="eval is a link"):
        run_evaluate("--run", run)
    assert (mine / "report.md").read_text() == "precious" and len(list(mine.iterdir())) == 1


def test_answers_of_another_base_are_not_continued(models, trained, tmp_path):
    """Neither of an evaluation nor of a batch: what they are made from names the weights of the base."""
    base = shutil.copytree(models["llama"], tmp_path / "base")
    file = write_csv(tmp_path / "rows.csv", toy_rows(2))
    run = open_run(str(base), "classification")
    config = SimpleNamespace(model=str(base), revision=None, input_file=str(file), chat_template=None,
                             prompt_template=None, output_dir=None, split="test", per_device_eval_batch_size=1,
                             )  # fmt: skip

    def source() -> dict:
        return run.partial_results(config, {"test": {}, "train": {}}, None)["source"]

    with mock.patch("common.use.questions.binding_options", vars), mock.patch("common.use.runs.asdict", vars):
        before = made_from(config, run), source()
        weights = base / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        after = made_from(config, run), source()
    assert before[0]["base"] != after[0]["base"] and before[1]["base"] != after[1]["base"]


def test_damaged_files_of_a_run_are_named(trained, tmp_path):
    run = shutil.copytree(trained("llama", "generative", "single"), tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"update": 5, "lo')  # cut by a kill
    shutil.copytree(run / "checkpoints" / "step_4", run / "checkpoints" / "step_4_good")
    assert "step_4_good" not in [path.name for path in list_checkpoints(run)]
    run_evaluate("--run", run)
    (run / "splits.json").write_text('{"sources": ')
    with pytest.raises(InputError, match="splits.json: damaged"):
        run_evaluate("--run", run)
