"""The embedded model itself: what the README's first command does, cut short, with the weights people get."""

import json

import pytest
import torch
from helpers import ROOT
from helpers.packs import assert_same, make
from helpers.rows import write_csv
from helpers.runs import log_lines
from helpers.scripts import run_script

from common.data.files import read_rows
from common.errors import InputError
from common.hub import EMBEDDED, resolve_model
from common.text.prompts import AnswerRow

FEW = ["--max_steps", "10", "--max_length", "96", "--per_device_train_batch_size", "2", "--warmup_ratio", "0.1",
       "--learning_rate", "2e-3", "--logging_steps", "1", "--eval_strategy", "no", "--baselines", "false"]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> str:
    try:
        return resolve_model(EMBEDDED, None)
    except InputError as error:
        pytest.skip(f"the embedded model cannot be fetched here: {error}")


def test_demo_learns_in_4_bit_and_is_the_same_after_reload(model, tmp_path):
    run, demo = tmp_path / "run", ROOT / "data" / "arxiv_demo"
    rows = write_csv(tmp_path / "test.csv", read_rows(demo / "test.csv")[:15])
    files = ["--train_file", str(demo / "train.csv"), "--test_file", str(rows)]
    run_script("train_cls.py", "--model", model, *files, *FEW, "--output_dir", str(run), timeout=900)
    losses = [line["loss"] for line in log_lines(run)]
    assert len(losses) == 10 and sum(losses[-3:]) < 0.8 * sum(losses[:3])
    trained = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    run_script("evaluate.py", "--run", str(run), "--output_dir", str(tmp_path / "again"), timeout=900)
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["rows"] == 15
    for name in ("accuracy", "f1_macro", "eval_loss"):
        assert again[name] == trained[name], name


def test_packs_have_the_padded_batch_s_loss_and_gradients(model):
    """Through 30 layers of trained weights, in fp32, with an adapter that is not zero."""
    apart = 1e-4  # rounding alone puts the first layer's gradients up to 3e-5 apart, with 2 threads
    draw = torch.Generator().manual_seed(0)
    prefix, *texts = (torch.randint(1000, 40000, (n,), generator=draw).tolist() for n in (40, 3, 12, 4, 7, 5, 9, 3))
    rows = [AnswerRow(prefix + text, text[:2] + [2], 1.0 + len(text) % 3) for text in texts]
    assert_same(make(model), rows, apart)


def test_it_answers_and_stops(model, tmp_path):
    """A question with one right answer, by the script: the embedded model knows it, and ends by itself."""
    (tmp_path / "in.jsonl").write_text('{"text": "What is the capital of France?"}\n{"text": "Hi"}\n')
    plain = ["--load_in_4bit", "false", "--mixed_precision", "no"]
    files = ["--input_file", str(tmp_path / "in.jsonl"), "--output_file", str(tmp_path / "out.jsonl")]
    run_script("inference.py", "--run", model, *files, *plain, "--max_new_tokens", "40", timeout=900)
    first, second = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert "Paris" in first["answer"] and first["stopped"] and second["stopped"] and second["answer"]
