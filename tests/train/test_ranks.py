"""Twenty shapes of rows that two processes cannot share out evenly: they do what one process does, and none waits."""

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers import ROOT
from helpers.models import build_model
from helpers.ranks import SHAPES, run_shapes, write_data
from helpers.rows import read_jsonl
from helpers.runs import assert_same_updates, log_lines, timeless
from helpers.scripts import run_script

OWN = ("weights",)  # in metrics.json: the hashes of what was measured, which differ by roundings


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list[list[dict]]]:
    """The folder of the runs of `one` process and of `two`, and the figures that each of the two returned."""
    folder = tmp_path_factory.mktemp("ranks")
    for number, shape in enumerate(SHAPES):
        options = write_data(folder / f"data_{number}", shape)
        (folder / f"data_{number}.json").write_text(json.dumps(options))
    for name in ("one", "two"):
        (folder / name).mkdir()
    model = str(build_model(folder / "model", "llama", num_hidden_layers=1))
    run_shapes(folder / "one", model)
    with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"):
        run_script("tests/helpers/ranks.py", str(folder / "two"), model, processes=2, timeout=180)
    return folder, [json.loads((folder / f"two/rank_{rank}.json").read_text()) for rank in (0, 1)]


def near(one: Any, other: Any) -> bool:
    """Equal but for times and hashes, with numbers as close as another order of sums leaves them."""
    if isinstance(one, dict):
        one, other = ({n: v for n, v in timeless(each).items() if n not in OWN} for each in (one, other))
        return one.keys() == other.keys() and all(near(value, other[name]) for name, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(near, one, other))
    return one == (pytest.approx(other, rel=1e-4, abs=1e-6) if isinstance(one, float) else other)


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=lambda i: f"{SHAPES[i].script}-{SHAPES[i].rows[0]}-rows")
def test_two_processes_do_what_one_does(runs, number):
    """Loss, norm of the gradient and rate of every update, the weights, evaluations by row, and files of answers."""
    folder, both = runs
    shape, one, two = SHAPES[number], folder / f"one/{number}", folder / f"two/{number}"
    per_update = 2 * shape.batch * shape.accumulation
    assert len(log_lines(one)) == -(-shape.rows[0] // per_update)
    assert_same_updates(one, two)
    assert both[0][number] == both[1][number]
    assert len(log_lines(one, "eval_loss")) == 1 and near(log_lines(one, "eval_loss"), log_lines(two, "eval_loss"))
    metrics = [json.loads((run / "eval/test/metrics.json").read_text()) for run in (one, two)]
    assert near(*metrics) and metrics[1]["rows"] >= 1
    if name := {"cls": "predictions.jsonl", "clm": "blocks.jsonl"}.get(shape.script):
        lines = [read_jsonl(run / "eval/test" / name) for run in (one, two)]
        assert near(*lines)
    answers = [read_jsonl(run / "answers.jsonl") for run in (one, two)]
    assert answers[0] == answers[1] and [line["row"] for line in answers[1]] == [str(i) for i in range(shape.rows[0])]
    assert sum(line["chunk"] == -1 for line in answers[1]) == shape.kept
