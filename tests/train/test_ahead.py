"""Batches made an update early and losses read an update late: the same run, and no broken weights on disk."""

import threading
from types import SimpleNamespace

import pytest
import torch
from helpers.rows import toy_options
from helpers.runs import assert_same_bits, log_lines, train, train_chat, train_text
from helpers.texts import prose

from common.errors import InputError
from common.train import ahead, checkpoints

ACCELERATOR = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))


def planned(count: int, made: list, collate=None, device="cuda"):
    """Updates of two rows; a batch is the rows and the name of the thread that made it. Needs no such device."""

    def default(pairs):
        made.append([row for row, _ in pairs])
        return SimpleNamespace(to=lambda device: (made[-1], threading.current_thread().name))

    numbers = [[2 * i, 2 * i + 1] for i in range(count)]
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=torch.device(device))
    return ahead.batches_ahead(numbers, list("abcdefghij"), 2, accelerator, collate or default)


def collating() -> set[threading.Thread]:
    """The threads that make batches, those included that a run of another test has left in a traceback."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("collate")}


def test_a_thread_makes_the_next_batches_and_no_later_ones():
    made, seen, before = [], [], collating()
    for numbers, batches in planned(4, made):
        [(rows, thread)] = batches()
        seen.append(numbers)
        assert thread.startswith("collate") and rows == ["abcdefghij"[i] for i in numbers]
        assert len(made) <= len(seen) + 1
    assert seen == [[0, 1], [2, 3], [4, 5], [6, 7]] and len(made) == 4
    assert not collating() - before


def test_on_a_cpu_no_second_thread_computes():
    """Each would have threads of its own, more than there are cores."""
    made, own = [], threading.current_thread().name
    for i, (numbers, batches) in enumerate(planned(3, made, device="cpu")):
        assert len(made) == i and numbers == [2 * i, 2 * i + 1]
        assert batches() == [([*"abcdefghij"[2 * i : 2 * i + 2]], own)]


def test_the_next_batches_are_made_while_an_update_runs():
    before = collating()
    made, updates = [], planned(3, [], collate=lambda pairs: made.append(pairs) or SimpleNamespace(to=lambda _: 0))
    next(updates)[1]()
    for _ in range(1000):
        if len(made) == 2:
            break
        threading.Event().wait(0.01)
    assert len(made) == 2
    updates.close()
    assert len(made) == 2
    assert not collating() - before


def test_what_goes_wrong_in_the_thread_is_raised_in_its_update():
    def collate(pairs):
        if pairs[0][0] == "c":
            raise InputError("row c is broken")
        return SimpleNamespace(to=lambda device: "batch")

    updates = planned(3, [], collate)
    assert next(updates)[1]() == ["batch"]
    with pytest.raises(InputError, match="row c is broken"):
        next(updates)[1]()


# --- losses read late, as on a GPU


@pytest.fixture
def late(monkeypatch):
    """Every ledger reads late; in place of the device's events, a note of when they were waited for."""
    waits = []
    event = SimpleNamespace(record=lambda: waits.append("copied"), synchronize=lambda: waits.append("read"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    real, step = ahead.Ledger.__init__, torch.optim.AdamW.step

    def reads_late(ledger, *args):
        real(ledger, *args)
        ledger.late = True

    def apply():
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: waits.append("stepped") or step(*a, **k))
        monkeypatch.setattr(ahead.Ledger, "__init__", reads_late)
        return waits

    return apply


@pytest.mark.parametrize("script", ["train_cls", "train_clm", "train_sft"])
def test_a_run_that_reads_late_is_the_same(models, toy_files, chat_files, tmp_path, late, script):
    """All scripts, to the bit: every line of the log, the best weights, and the state that is saved."""
    text = tmp_path / "text.txt"
    text.write_text(prose(200))
    make, data = {
        "train_cls": (train, toy_options(toy_files)),
        "train_clm": (train_text, ["--train_file", text]),
        "train_sft": (train_chat, chat_files),
    }[script]
    options = ["--model", models["llama"], *data, "--max_steps", 7, "--save_strategy", "steps", "--save_steps", 3]
    options += ["--eval_strategy", "steps", "--eval_steps", 2, "--metric_for_best_model", "eval_loss"]
    for name in ("now", "late"):
        waits = late() if name == "late" else []
        make(*options, "--output_dir", tmp_path / name)
    assert_same_bits(tmp_path / "now", tmp_path / "late")
    # Evaluations after updates 2, 4, 6, 7 and checkpoints after 3, 6, 7 wait; the others are read in the update after.
    assert "".join(word[0] for word in waits) == "cs" + "rcsr" + "csr" + "csr" + "cs" + "rcsr" + "csr"
    states = [
        {k: v for k, v in checkpoints.read_json(path)["state"].items() if k not in ("seconds", "peak_memory")}
        for name in ("now", "late")
        for path in sorted((tmp_path / name / "checkpoints").glob("*/state.json"))
    ]
    assert states[: len(states) // 2] == states[len(states) // 2 :]


@pytest.mark.parametrize("due", [[], ["--save_strategy", "steps", "--save_steps", 3], ["--eval_steps", 3]], ids=str)
def test_a_broken_update_is_found_before_the_next_one_or_before_it_is_kept(
    models, toy_files, tmp_path, monkeypatch, late, due
):
    import train_cls

    real, losses = train_cls.loss_of, []

    def loss_of(model, batch):
        losses.append(real(model, batch))
        return losses[-1] * (float("nan") if len(losses) == 3 else 1.0)

    monkeypatch.setattr(train_cls, "loss_of", loss_of)
    waits = late()
    options = ["--model", models["llama"], *toy_options(toy_files), "--max_steps", 6, "--save_strategy", "no"]
    options += ["--eval_strategy", "steps" if "--eval_steps" in due else "no", *due]
    with pytest.raises(FloatingPointError, match="Update 3 has loss nan and gradient norm nan, so nothing of it was"):
        train(*options, "--output_dir", tmp_path)
    assert waits.count("stepped") == 3 and len(losses) == (3 if due else 4)
    assert [line["update"] for line in log_lines(tmp_path)] == [1, 2]
    assert not list(tmp_path.glob("checkpoints/*")) and not (tmp_path / "adapter").exists()


def test_the_last_update_is_checked_before_its_weights_are_kept(models, toy_files, tmp_path, monkeypatch, late):
    import train_cls

    real, losses = train_cls.loss_of, []

    def loss_of(model, batch):
        losses.append(real(model, batch))
        return losses[-1] * (float("inf") if len(losses) == 3 else 1.0)

    monkeypatch.setattr(train_cls, "loss_of", loss_of)
    late()
    options = ["--model", models["llama"], *toy_options(toy_files), "--max_steps", 3, "--eval_strategy", "no"]
    with pytest.raises(FloatingPointError, match="Update 3 has loss"):
        train(*options, "--save_strategy", "no", "--output_dir", tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_the_ids_of_rows_are_not_read_unless_a_run_stops(tmp_path):
    """A block of text is built to be named."""
    log = SimpleNamespace(update=lambda *args, **values: None)
    ledger = ahead.Ledger(ACCELERATOR, checkpoints.State(), log)
    one = torch.tensor(1.0)
    ACCELERATOR.scaler = None
    ledger.check(one, one, one, {}, (1 / 0 for _ in "a"))
    ledger.count([3], 1.0)
    with pytest.raises(FloatingPointError, match="Its rows: 7, 8"):
        ledger.check(one * float("nan"), one, one, {}, (str(i) for i in (7, 8)))
