"""An evaluation that was killed continues where it was, and ends with the same results."""

import json
from types import SimpleNamespace

import pytest
from helpers.rows import read_jsonl, toy_rows, write_csv
from helpers.runs import Stopped, run_evaluate, stop_at, timeless

from common.measure import partial_results, scoring
from common.measure.label_answer import Answer
from common.measure.partial_results import measure_in_chunks

ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)


def measured(tmp_path, source: dict, calls: list, stop: int | None = None, rows: int = 40) -> list:
    """The squares of the rows in chunks of 16, stopped at a chunk; `calls` has the rows that were computed."""

    def square(some: list[int], what: str) -> list[tuple[int, float]]:
        if len(calls) == stop:
            raise Stopped
        calls.append((some, what))
        return [(row * row, row / 7) for row in some]

    options = {"file": tmp_path / "kept.jsonl", "source": source, "batch_size": 1, "accelerator": ALONE}
    results, seconds = measure_in_chunks(square, range(rows), what="test", restore=tuple, **options)
    assert 0 < seconds < 10
    return results


def test_only_what_is_missing_is_computed(tmp_path, capsys):
    calls, again = [], []
    with pytest.raises(Stopped):
        measured(tmp_path, {"a": 1}, calls, stop=2)
    with open(tmp_path / "kept.jsonl", "a") as file:
        file.write('{"seconds": 0.1, "results": [[1024, 4.57')  # cut by the kill
    results = measured(tmp_path, {"a": 1}, again)
    assert results == [(row * row, row / 7) for row in range(40)]
    assert [some for some, _ in calls + again] == [[*range(16)], [*range(16, 32)], [*range(32, 40)]]
    assert again[0][1] == "test, rows 33 to 40 of 40"
    assert "32 rows had been evaluated before" in capsys.readouterr().out and not (tmp_path / "kept.jsonl").exists()


def test_results_of_something_else_are_dropped(tmp_path):
    calls = []
    with pytest.raises(Stopped):
        measured(tmp_path, {"a": 1}, calls, stop=1)
    calls.clear()
    with pytest.raises(Stopped):
        measured(tmp_path, {"a": 2}, calls, stop=2)
    assert len(read_jsonl(tmp_path / "kept.jsonl")) == 3 and len(calls) == 2
    for damaged in ("", '{"a": \n', '{"a": 2}\n{"seconds"\n'):
        (tmp_path / "kept.jsonl").write_text(damaged)
        assert measured(tmp_path, {"a": 2}, calls)[39] == (1521, 39 / 7)
    assert measured(tmp_path, {"a": 2}, [], rows=40)[39] == (1521, 39 / 7)


def test_an_answer_survives_json():
    for answer in (Answer((1, 2), [0.1, 1 / 3], 0.7, 1, 2), Answer(None, [], text="é")):
        assert Answer.restored(json.loads(json.dumps(answer.__dict__))) == answer


@pytest.mark.parametrize("approach", ["generative", "head"])
def test_a_killed_evaluation_ends_as_ever(approach, trained, tmp_path, monkeypatch):
    run = trained("llama", approach, "single")
    rows = write_csv(tmp_path / "rows.csv", toy_rows(7))
    monkeypatch.setattr(partial_results, "CHUNK", 1)
    options = ["--run", run, "--test_file", rows, "--per_device_eval_batch_size", 4]
    run_evaluate(*options, "--output_dir", tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, scoring, "classify", 4)
        run_evaluate(*options, "--output_dir", tmp_path / "killed")
    calls = []
    real = scoring.classify
    monkeypatch.setattr(scoring, "classify", lambda *a, **k: calls.append(a) or real(*a, **k))
    run_evaluate(*options, "--output_dir", tmp_path / "killed")
    assert len(calls) == 3 and not list((tmp_path / "killed").glob(".*"))
    first, second = (tmp_path / name / "metrics.json" for name in ("straight", "killed"))
    assert timeless(json.loads(first.read_text())) == timeless(json.loads(second.read_text()))
    assert read_jsonl(first.with_name("predictions.jsonl")) == read_jsonl(second.with_name("predictions.jsonl"))


def test_two_processes_that_evaluate_alike_do_not_count_rows_twice(tmp_path):
    """A chunk that is in the file twice is read once; a line that a kill has cut is not continued in its middle."""
    with pytest.raises(Stopped):
        measured(tmp_path, {"a": 1}, [], stop=1)
    source, chunk = (tmp_path / "kept.jsonl").read_text().splitlines()
    (tmp_path / "kept.jsonl").write_text(f"{source}\n{chunk}\n{chunk}\n{chunk[:30]}")
    calls = []
    with pytest.raises(Stopped):
        measured(tmp_path, {"a": 1}, calls, stop=1)
    assert [some for some, _ in calls] == [[*range(16, 32)]]
    assert measured(tmp_path, {"a": 1}, calls) == [(row * row, row / 7) for row in range(40)] and len(calls) == 2
