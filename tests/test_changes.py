"""The worked changes of docs/change.md: each is applied to the scripts as they are, and does what the page says."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import ROOT
from helpers.rows import (
    TOPICS,
    WORDS,
    multi_rows,
    read_jsonl,
    task_options,
    toy_options,
    toy_rows,
    write_csv,
    write_jsonl,
)
from helpers.runs import CHAT, PLAIN, log_lines, quick, run_evaluate, weights

from common import report
from common.errors import InputError
from common.measure import metrics, scoring
from common.model.losses import target_logits
from common.text.batches import Batch, Layout

SCRIPTS = ("train_cls.py", "train_clm.py", "train_sft.py")
PAGE = (ROOT / "docs" / "change.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!## )[^\n]*\n)*?```diff\n(.*?)^```$", PAGE, re.M | re.S))
FILES = {f"docs/changes/{path.name}": path.read_text(encoding="utf-8") for path in ROOT.glob("docs/changes/*.diff")}
ONE_UPDATE = ["--max_steps", "1", "--per_device_train_batch_size", "64", "--eval_strategy", "no",
              "--save_strategy", "no", "--validation_fraction", "0", "--test_fraction", "0"]  # fmt: skip
LR = 1e-2


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Metrics and tasks that a changed script registers are forgotten after the test."""
    with mock.patch.dict(metrics.METRICS), mock.patch.dict(metrics.TASKS):
        yield


@pytest.fixture
def changed(tmp_path, monkeypatch) -> Callable[[str, str], ModuleType]:
    """(diff, the script that it changes or adds) -> that script, as a module."""

    def apply(diff: str, script: str = "train_cls.py") -> ModuleType:
        folder = tmp_path / "scripts"
        folder.mkdir()
        for name in SCRIPTS:
            shutil.copy(ROOT / name, folder)
        git = ["git", "-c", "core.autocrlf=false", "apply", "--whitespace=error", "-"]
        subprocess.run(git, input=diff, text=True, cwd=folder, check=True, timeout=60)
        spec = importlib.util.spec_from_file_location("changed_script", folder / script)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where its dataclasses look for their module
        spec.loader.exec_module(module)
        return module

    return apply


def run(module: ModuleType, folder: Path, *options: Any) -> Path:
    """`python SCRIPT OPTIONS`; the run folder."""
    argv = [module.__file__, *options, "--num_threads", "1", "--output_dir", folder]
    with quick(), mock.patch.object(sys, "argv", list(map(str, argv))):
        module.main()
    return folder


def first_loss(module: ModuleType, folder: Path, expected: Callable[..., torch.Tensor], *options: Any) -> list[float]:
    """The loss of an update of all rows: as logged, and by `expected`, (model, batch) -> losses of the targets."""
    sums = []
    real = module.loss_of

    def watched(model: Any, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            sums.append([float((expected(model, batch) * batch.weights).sum()), float(batch.weights.sum())])
        return real(model, batch)

    with mock.patch.object(module, "loss_of", watched):
        run(module, folder, *PLAIN, *ONE_UPDATE, *options)
    losses, counts = zip(*sums, strict=True)
    return [log_lines(folder)[0]["loss"], sum(losses) / sum(counts)]


def test_changes_are_short():
    """At most ten changed lines each, blank ones included; new scripts are files that the page names."""
    assert list(DIFFS) == ["Label smoothing", "Focal loss", "Another metric", "Two learning rates",
                           "Fewer adapted layers"]  # fmt: skip
    assert PAGE.count("```diff") == len(DIFFS)
    for diff in DIFFS.values():
        assert 1 <= len(re.findall(r"^[+-](?!--|\+\+)", diff, re.M)) <= 10
    assert len(re.findall(r"^\+(?!\+\+)", FILES["docs/changes/regression.diff"], re.M)) <= 60  # lines of its own
    assert FILES.keys() == set(re.findall(r"`git apply (docs/\S+)`", PAGE)) and len(FILES) == 2


# --- losses


def test_label_smoothing(changed, models, toy_files, tmp_path):
    """0.9 of the target and 0.1 spread evenly, from the logits of all targets; and another loss than without."""

    def smoothed(model: Any, batch: Batch) -> torch.Tensor:
        logits = target_logits(model, batch).double()
        goal = torch.full_like(logits, 0.1 / logits.shape[1])
        goal[range(len(logits)), batch.targets] += 0.9
        return -(goal * logits.log_softmax(1)).sum(1)

    def plain(model: Any, batch: Batch) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(target_logits(model, batch), batch.targets, reduction="none")

    module = changed(DIFFS["Label smoothing"])
    options = ["--model", models["qwen"], "--train_file", toy_files["train"]]
    logged, expected = first_loss(module, tmp_path / "smoothed", smoothed, *options)
    assert logged == pytest.approx(expected, rel=1e-5)
    logged, expected = first_loss(module, tmp_path / "plain", plain, *options)
    assert logged != pytest.approx(expected, rel=1e-3)


def test_focal_loss_is_the_papers(changed):
    """-a (1 - p)^2 log p of the right answer, a its weight or the label's factor, for both kinds of head."""
    module = changed(DIFFS["Focal loss"])
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    several = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0.0]])
    weights, factors = torch.tensor([1.0, 2.0, 0.0, 1.0]), torch.tensor([0.5, 1.0, 3.0])

    def loss(targets: torch.Tensor, weights: torch.Tensor, pos_weight: torch.Tensor | None = None) -> torch.Tensor:
        nothing = torch.zeros(4, 1)
        batch = Batch(nothing, nothing, nothing, nothing, targets, weights, pos_weight=pos_weight, layout=Layout(4))
        return module.loss_of(lambda **inputs: logits, batch)

    p = logits.softmax(1)[range(4), targets]
    torch.testing.assert_close(loss(targets, weights), (-((1 - p) ** 2) * p.log() * weights).sum())
    p, each = torch.where(several > 0, logits.sigmoid(), (-logits).sigmoid()), weights[:, None].expand(4, 3)
    expected = -((1 - p) ** 2) * p.log() * each
    torch.testing.assert_close(loss(several, each), expected.sum())
    torch.testing.assert_close(loss(several, each, factors), (torch.where(several > 0, factors, 1.0) * expected).sum())


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_focal_loss_trains(kind, changed, models, toy_files, tmp_path):
    def focal(model: Any, batch: Batch) -> torch.Tensor:
        logits = model(**batch.inputs).double()
        if kind == "single":
            p = logits.softmax(1)[range(len(logits)), batch.targets]
            return -((1 - p) ** 2) * p.log()
        p = torch.where(batch.targets > 0, logits, -logits).sigmoid()
        return -torch.where(batch.targets > 0, batch.pos_weight, 1.0) * (1 - p) ** 2 * p.log()

    options = ["--train_file", toy_files["train"]]
    if kind == "multi":
        options = ["--train_file", write_csv(tmp_path / "train.csv", multi_rows(24)), "--label_columns", *WORDS]
    options += ["--model", models["gemma"], "--approach", "head", "--class_weights", "balanced"]
    logged, expected = first_loss(changed(DIFFS["Focal loss"]), tmp_path / "run", focal, *options)
    assert logged == pytest.approx(expected, rel=1e-5)


# --- metric, optimizer, layers


@pytest.mark.parametrize("name", ["brier", "brier_loss", "score"])
def test_brier_score_keeps_the_better_weights(name, changed, models, toy_files, tmp_path, monkeypatch):
    """Of two validations, the later is worse by this score and better by all others: the first one's weights stay.

    The score's name plays no part in it.
    """
    module, real, seen = changed(DIFFS["Another metric"].replace('"brier"', f'"{name}"')), scoring.predict, []

    def scripted(classifier: Any, examples: Any, *, what: str, **options: Any) -> list[scoring.Answer]:
        answers = real(classifier, examples, what=what, **options)
        if what == "validation":
            state = {key: value.clone() for key, value in classifier.model.state_dict().items() if "lora_B" in key}
            seen.append(state)
        if what == "validation" and len(seen) == 2:
            for answer, example in zip(answers, examples, strict=True):
                (right,) = answer.labels = example.labels
                answer.probabilities = [float(k == (right + 1) % 3) for k in range(3)]
                answer.nll = 0.0
        return answers

    monkeypatch.setattr(scoring, "predict", scripted)
    options = ["--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1", "--metric_for_best_model", name]
    options += ["--model", models["llama"], *toy_options(toy_files), "--learning_rate", LR]
    folder = run(module, tmp_path / "run", *PLAIN, *options)
    first, second = log_lines(folder, name)
    assert 0 < first[name] < 2 and second[name] == pytest.approx(2)
    assert second["accuracy"] == second["f1_macro"] == 1 > first["accuracy"] and second["eval_loss"] == 0
    kept = {key: value for key, value in weights(folder / "adapter").items() if "lora_B" in key}
    assert kept and len(seen) == 2
    for key, value in kept.items():
        one, other = (state[key.replace("lora_B.", "lora_B.default.")] for state in seen)
        assert torch.equal(value, one) and not torch.equal(one, other)


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_brier_score_fits_the_predictions(kind, changed, models, tmp_path):
    """One label per row and several; the table of results has it."""
    module = changed(DIFFS["Another metric"])
    options = ["--model", models["mistral"], "--max_steps", "1", *task_options(kind, tmp_path / "data")]
    folder = run(module, tmp_path / "run", *PLAIN, *options)
    score = 0.0
    rows = read_jsonl(folder / "eval" / "test" / "predictions.jsonl")
    for row in rows:
        gold = row["gold"] if kind == "multi" else [row["gold"]]
        score += sum((p - (label in gold)) ** 2 for label, p in row["probabilities"].items())
    found = json.loads((folder / "eval" / "test" / "metrics.json").read_text())
    assert found["brier"] == pytest.approx(score / len(rows), rel=1e-5)
    assert "Brier score" in (folder / "eval" / "test" / "report.md").read_text()


def test_two_learning_rates(changed, models, toy_files, tmp_path):
    """Both are logged at every update; B, which starts at 0, moves as far as its own rate takes it."""
    schedule = ["--lr_scheduler_type", "linear", "--warmup_ratio", "0", "--max_steps", "2", "--learning_rate", LR]
    options = [*PLAIN, *ONE_UPDATE, *schedule, "--model", models["llama"], "--train_file", toy_files["train"]]
    folder = run(changed(DIFFS["Two learning rates"]), tmp_path / "run", *options)
    rates = [(line["learning_rate"], line["learning_rate_1"]) for line in log_lines(folder)]
    assert rates == [pytest.approx((LR, 16 * LR)), pytest.approx((LR / 2, 8 * LR))]
    moved = max(float(value.abs().max()) for key, value in weights(folder / "adapter").items() if "lora_B" in key)
    assert 16 * LR < moved < 1.01 * 24 * LR  # the steps of Adam are at most the rates


@pytest.mark.parametrize(("family", "approach"), [("llama", "generative"), ("gemma", "head")])
def test_upper_half_alone_is_trained(family, approach, changed, models, toy_files, tmp_path):
    """The adapter of the lower layer stays at its start (B = 0), that of the upper one is trained.

    Baselines switch the adapter off and on again, which changes nothing of it.
    """
    module = changed(DIFFS["Fewer adapted layers"])
    options = ["--model", models[family], "--approach", approach, *toy_options(toy_files), "--baselines", "true"]
    folder = run(module, tmp_path / "run", *PLAIN, *options, "--max_steps", "1", "--warmup_ratio", "0")
    trained = {key: value for key, value in weights(folder / "adapter").items() if "lora_B" in key}
    lower, upper = ([value for key, value in trained.items() if f".layers.{i}." in key] for i in (0, 1))
    assert lower and not any(value.any() for value in lower)
    assert upper and all(value.any() for value in upper)


# --- new scripts

NUMBERS = {"sport": -0.7, "science": 0.1, "music": 0.8}


def number_rows(per_topic: int, start: int = 0) -> list[dict[str, str]]:
    """Texts whose words give a number away, up to a little that depends on their length."""
    rows = toy_rows(per_topic, start=start)
    return [{"text": row["text"], "stars": f"{NUMBERS[row['label']] + len(row['text']) / 2000:.3f}"} for row in rows]


def test_regression(changed, models, tmp_path, monkeypatch):
    """Trains two seeds: a far smaller error than that of predicting the mean; other commands know what they do not."""
    module = changed(FILES["docs/changes/regression.diff"], "train_reg.py")
    rows = number_rows(18)
    files = ["--train_file", write_csv(tmp_path / "train.csv", rows), "--label_column", "stars", "--validation_file",
             write_csv(tmp_path / "validation.csv", number_rows(4, start=30)), "--test_fraction", "0.2"]  # fmt: skip
    options = ["--model", models["llama"], "--learning_rate", LR, "--num_train_epochs", "16", "--seeds", "1", "2"]
    folder = run(module, tmp_path / "runs", *PLAIN, *files, *options)
    ids = json.loads((folder / "seed_1" / "splits.json").read_text())["ids"]
    train, test = ([float(rows[int(id)]["stars"]) for id in ids[split]] for split in ("train", "test"))
    assert len(train) == 43 and len(test) == 11 and len({*ids["train"], *ids["test"]}) == 54
    naive = sum(abs(number - sum(train) / len(train)) for number in test) / len(test)
    for seed in (1, 2):
        found = json.loads((folder / f"seed_{seed}" / "eval" / "test" / "metrics.json").read_text())
        assert found["mae"] < 0.5 * naive and found["r2"] > 0.5
        lines = log_lines(folder / f"seed_{seed}", "mae")
        assert len(lines) == 16 and lines[-1]["mae"] < lines[0]["mae"]
    shown = (folder / "seed_1" / "data_report.md").read_text()
    assert re.search(r"\[\[target -?0\.\d{1,3}\]\]", shown) and "test: 11 rows cut" in shown
    assert re.search(r"^\| seed .* mean absolute error .* R squared ", (folder / "seeds.md").read_text(), re.M)

    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    *lines, last = snippet.replace("RUN", str(folder / "seed_2")).splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    (number,) = eval(last, names)
    assert math.isfinite(number)

    for name in ("mae", "r2"):
        monkeypatch.delitem(metrics.METRICS, name)
    monkeypatch.delitem(metrics.TASKS, "regression")  # as in a process of its own
    report.main(["table", str(folder), "--output_dir", str(tmp_path / "table")])
    header, _, first, second = (tmp_path / "table" / "table.md").read_text().splitlines()
    assert " mae " in header and "seed_1" in first and f" {found['mae']:.3f} " in second
    with pytest.raises(InputError, match="seed_1 was trained for regression: use it with the script that trained it"):
        run_evaluate("--run", folder / "seed_1")


def test_regression_measures_as_scikit_learn(changed):
    from sklearn.metrics import mean_absolute_error, r2_score

    module = changed(FILES["docs/changes/regression.diff"], "train_reg.py")
    gold, found = [0.5, -1.25, 3.0, 0.75], [0.25, -1.0, 2.0, 0.5]
    examples = [module.Example(str(i), "a text", (number,)) for i, number in enumerate(gold)]
    outputs = torch.tensor(found)[:, None]
    measured = module.evaluate(lambda classifier, rows, what: outputs[: len(rows)], mock.Mock(), examples, "test")
    expected = {"mae": mean_absolute_error(gold, found), "r2": r2_score(gold, found)}
    assert {name: measured[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("cells", "options", "problem"),
    [
        (["0.5", "many"], [], "train.csv, column 'stars': there is no number in every row .*many"),
        (["0.5", "1"], ["--label_column", "star"], "train.csv, column 'star': there is no number in every row"),
        (["0.5", "1"], ["--class_weights", "balanced"], "--label_column is a number: drop"),
        (["0.5", "1"], ["--approach", "generative"], "--approach generative: expected head"),
    ],
)
def test_regression_refuses_what_is_no_number(cells, options, problem, changed, tmp_path):
    module = changed(FILES["docs/changes/regression.diff"], "train_reg.py")
    file = write_csv(tmp_path / "train.csv", [{"text": "a text", "stars": cell} for cell in cells])
    with pytest.raises(InputError, match=problem):
        run(module, tmp_path / "run", "--train_file", file, "--label_column", "stars", *options)


def preferences(count: int, start: int = 0) -> list[dict[str, str]]:
    """A right and a wrong word after a topic, of different lengths."""
    rows, topics = [], list(TOPICS.items())
    for i in range(start, start + count):
        topic, right = topics[i % len(topics)]
        wrong = topics[(i + 1 + i % 4) % len(topics)][1]
        rows.append({"prompt": f"{topic} number {i}", "chosen": right, "rejected": " ".join([wrong] * (1 + i % 3))})
    return rows


def test_preferences(changed, models, tmp_path):
    """DPO: the first loss is log 2; loss falls and margin grows; both are those that transformers and peft give."""
    from common.data.conversations import Conversation
    from common.model.storage import load_chat_model

    module = changed(FILES["docs/changes/dpo.diff"], "train_dpo.py")
    parts = {"train": preferences(18), "validation": preferences(5, 40), "test": preferences(6, 60)}
    files = [x for split, rows in parts.items()
             for x in (f"--{split}_file", write_jsonl(tmp_path / f"{split}.jsonl", rows))]  # fmt: skip
    options = ["--model", models["llama"], "--learning_rate", LR, "--num_train_epochs", "4", "--baselines", "true"]
    folder = run(module, tmp_path / "run", *CHAT, *files, *options, "--warmup_ratio", "0")
    losses = [line["loss"] for line in log_lines(folder)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and sum(losses[-5:]) / 5 < 0.55
    margins = [line["margin"] for line in log_lines(folder, "margin")]
    assert len(margins) == 4 and 0 < margins[0] < margins[-1]
    (base,) = json.loads((folder / "eval" / "test" / "baselines.json").read_text()).values()
    assert (base["dpo_loss"], base["margin"]) == pytest.approx((math.log(2), 0), abs=1e-6)

    model, _, template = load_chat_model(folder / "adapter")
    margins = []

    @torch.no_grad()
    def likelihood(prompt: str, answer: str) -> torch.Tensor:
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
        (row,) = template.rows(Conversation("0", turns), 96)
        ids = torch.tensor([row.ids])
        scores = model(input_ids=ids).logits[0, :-1].double().log_softmax(1).gather(1, ids[0, 1:, None])[:, 0]
        return scores[torch.tensor(row.mask[1:]) > 0].sum()

    for row in parts["test"]:
        pair = [(row["prompt"], row[name]) for name in ("chosen", "rejected")]
        tuned = [likelihood(*answered) for answered in pair]
        with model.disable_adapter():
            reference = [likelihood(*answered) for answered in pair]
        margins.append(0.1 * ((tuned[0] - reference[0]) - (tuned[1] - reference[1])))
    expected = torch.stack(margins)
    found = json.loads((folder / "eval" / "test" / "metrics.json").read_text())
    assert found["margin"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found["dpo_loss"] == pytest.approx(float(torch.nn.functional.softplus(-expected).mean()), rel=1e-4)
    assert "DPO loss" in (folder / "eval" / "test" / "report.md").read_text()

    run_evaluate("--run", folder, "--columns", "completion=chosen", "--max_new_tokens", "3")
    lines = read_jsonl(folder / "eval" / "test-changed" / "predictions.jsonl")
    assert [line["gold"] for line in lines] == [row["chosen"] for row in parts["test"]]


def test_preferences_stay_together(changed, models, tmp_path):
    """Micro-batches of one pair make the same updates as all pairs at once."""
    module = changed(FILES["docs/changes/dpo.diff"], "train_dpo.py")
    options = ["--model", models["qwen"], "--train_file", write_jsonl(tmp_path / "train.jsonl", preferences(6))]
    options += [*ONE_UPDATE, "--max_steps", "2", "--learning_rate", LR]
    for size in (6, 1):
        batches = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", 6 // size]
        run(module, tmp_path / f"by_{size}", *CHAT, *options, *batches)
    for one, other in zip(log_lines(tmp_path / "by_6"), log_lines(tmp_path / "by_1"), strict=True):
        assert (one["loss"], one["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-4)
