"""inference.py: chats in a terminal, single answers, comparisons, files of answers that survive a kill."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
import transformers
from helpers import ROOT
from helpers.models import FAMILIES
from helpers.rows import chats, read_jsonl, toy_rows, write_csv, write_jsonl
from helpers.runs import COMBINATIONS, quick, run_evaluate, train_chat
from helpers.scripts import expect_error, run_alone, run_in_two_processes

import inference
from common.data.conversations import Conversation, read_question
from common.errors import InputError, printable
from common.model import base_model, storage
from common.options import Sampling
from common.text.chat import ChatTemplate
from common.use.answer_file import AnswerFile

PLAIN = ["--load_in_4bit", "false", "--mixed_precision", "no"]
BASE = [*PLAIN, "--chat_template", "plain"]


def run(*options) -> None:
    """What `python inference.py OPTIONS` does."""
    with quick(), mock.patch.object(sys, "argv", ["inference.py", *map(str, options)]):
        inference.main()


@pytest.fixture(scope="session")
def talks(models, tmp_path_factory) -> dict[str, Path]:
    """A chat run of every family; `other`: a second one on the base of `llama`, with a system prompt; full; nf4."""
    base = tmp_path_factory.mktemp("talks")
    file = write_jsonl(base / "rows.jsonl", chats(11))
    test = write_jsonl(base / "test.jsonl", chats(7, 30))
    files = ["--train_file", file, "--validation_file", file, "--test_file", test, "--eval_strategy", "no"]
    options = ["--learning_rate", 1e-2, "--num_train_epochs", 8]
    for family in FAMILIES:
        train_chat("--model", models[family], *files, *options, "--output_dir", base / family)
    system = ["--system_prompt", "You coach", "--lora_r", 2, "--seed", 7, "--num_train_epochs", 3]
    train_chat("--model", models["llama"], *files, *options, *system, "--output_dir", base / "other")
    train_chat("--model", models["qwen"], *files, *options, "--full_finetuning", "true", "--output_dir", base / "full")
    quantized = ["--load_in_4bit", "true", "--mixed_precision", "bf16"]
    train_chat("--model", models["gemma"], *files, *options, *quantized, "--output_dir", base / "nf4")
    return {name: base / name for name in (*FAMILIES, "other", "full", "nf4")}


@pytest.fixture(scope="session")
def texts_run(models, tmp_path_factory) -> Path:
    """A run on running text."""
    import train_clm
    from common.data.corpus import open_sources
    from common.options import parse_config

    base = tmp_path_factory.mktemp("texts")
    (base / "text.txt").write_text(" ".join(row["text"] for row in toy_rows(30)), encoding="utf-8")
    config = parse_config(train_clm.Config, [
        *PLAIN, "--model", str(models["llama"]), "--train_file", str(base / "text.txt"), "--max_steps", "3",
        "--block_size", "32", "--baselines", "false", "--report_to", "none", "--output_dir", str(base / "run"),
    ])  # fmt: skip
    with quick():
        train_clm.train(config, open_sources(config), config.model)
    return base / "run"


# --- answers


@pytest.mark.parametrize("family", FAMILIES)
def test_one_greedy_answer_everywhere(talks, family, tmp_path, capsys):
    """inference.py (file, one instruction) == evaluate.py == plain `generate` on the adapter with its saved settings.

    The prompt is that of training, byte for byte, with one BOS.
    """
    run_dir = talks[family]
    file = json.loads((run_dir / "splits.json").read_text())["sources"]["test"]["name"]
    more = ["--max_new_tokens", 20, "--do_sample", "false"]
    run("--run", run_dir, "--input_file", file, "--output_file", tmp_path / "a.jsonl", *more)
    run_evaluate("--run", run_dir, *more[:2], "--output_dir", tmp_path / "eval")
    answers, evaluated = read_jsonl(tmp_path / "a.jsonl"), read_jsonl(tmp_path / "eval" / "predictions.jsonl")
    assert [(row["id"], row["answer"], row["stopped"]) for row in answers] == [
        (row["id"], row["prediction"], row["stopped"]) for row in evaluated
    ]
    assert len({row["answer"] for row in answers}) > 1
    capsys.readouterr()
    asked = [row["messages"] for row in chats(7, 30)]
    single = next(i for i, messages in enumerate(asked) if len(messages) == 2)
    run(asked[single][0]["content"], "--run", run_dir, *more)
    assert capsys.readouterr().out == printable(answers[single]["answer"]) + "\n"

    task = json.loads(
        (run_dir / "adapter" / "task.json").read_text()
    )  # from here with no code of ours but the prompt's
    base = transformers.AutoModelForCausalLM.from_pretrained(task["model_options"]["model"], dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, run_dir / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_dir / "adapter")
    settings = transformers.GenerationConfig.from_pretrained(run_dir / "adapter")
    template = ChatTemplate(tokenizer, tokenizer.chat_template, "the saved template")
    for messages, answer in zip(asked, answers, strict=True):
        row = template.rows(Conversation("0", tuple(messages)), 96)[0]
        assert template.prompt(messages[:-1]).ids == row.ids[: len(row.ids) - sum_last(row.mask)]
        assert row.ids.count(tokenizer.bos_token_id) == 1
        ids = torch.tensor([template.prompt(messages[:-1]).ids])
        with torch.inference_mode():
            found = model.generate(ids, generation_config=settings, max_new_tokens=20, do_sample=False)
        found = found[0, ids.shape[1] :]
        assert tokenizer.decode(found, skip_special_tokens=True).strip() == answer["answer"]
        assert (int(found[-1]) in settings.eos_token_id) == answer["stopped"]


def sum_last(mask: list[int]) -> int:
    """The length of the last answer."""
    return next((n for n, counts in enumerate(reversed(mask)) if not counts), len(mask))


@pytest.mark.parametrize("kind", ["full", "nf4"])
def test_other_kinds_of_weights(talks, kind, tmp_path, capsys):
    """A model trained whole (by its run folder and its own), and an adapter on a bf16 NF4 base: as evaluate.py."""
    file = json.loads((talks[kind] / "splits.json").read_text())["sources"]["test"]["name"]
    more = ["--max_new_tokens", 12, "--per_device_eval_batch_size", 8]
    run("--run", talks[kind], "--input_file", file, "--output_file", tmp_path / "a.jsonl", *more)
    run_evaluate("--run", talks[kind], *more, "--output_dir", tmp_path)
    found = [row["answer"] for row in read_jsonl(tmp_path / "a.jsonl")]
    assert found == [row["prediction"] for row in read_jsonl(tmp_path / "predictions.jsonl")] and len(set(found)) > 1
    folder = talks[kind] / ("model" if kind == "full" else "adapter")
    run("--run", folder, "--input_file", file, "--output_file", tmp_path / "a.jsonl", *more)
    assert "has the answers to all 7 rows already" in capsys.readouterr().out
    run("--run", folder, "--demo", "--max_new_tokens", 3)
    assert capsys.readouterr().out.count("[base]") == (0 if kind == "full" else 5)
    if kind == "full":
        with pytest.raises(InputError, match="has no adapter, all its weights were trained"):
            run("--compare", talks[kind], "base", "--prompt", "x")


def test_a_merged_model_answers_as_its_adapter(talks, tmp_path, capsys):
    model, tokenizer, _ = storage.load_chat_model(talks["mistral"] / "adapter", "cpu")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    for options in (["--run", talks["mistral"]], ["--run", tmp_path / "merged", *PLAIN]):
        run("goal number 5", *options, "--max_new_tokens", 12)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_an_instruction_through_a_pipe(talks, capsys, monkeypatch):
    outputs = []
    for words, piped in ((["goal number 30"], ""), (["-"], "goal number 30\n"), (["--prompt", "goal number 30"], "")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
        run(*words, "--run", talks["qwen"], "--max_new_tokens", 10)
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 1 and outputs[0].strip()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(InputError, match="The instruction is empty"):
        run("-", "--run", talks["qwen"])


def test_runs_side_by_side_are_what_each_is_alone(talks, capsys):
    """--compare: the base is loaded once and adapters are switched; --demo: the adapter off and on."""
    question, more = "goal number 3", ["--max_new_tokens", 12]
    alone = []
    for name in ("llama", "other"):
        run(question, "--run", talks[name], *more)
        alone.append(capsys.readouterr().out.strip())
    tuned = storage.load_chat_model(talks["llama"] / "adapter", "cpu")
    with tuned[0].disable_adapter():
        from common.model.generation import answer_prompts

        ids = tuned[2].prompt([{"role": "user", "content": question}]).ids
        untrained = answer_prompts(*tuned, [ids], Sampling(max_new_tokens=12), 1, "cpu")[0].text
    real, calls = storage.load_base, []
    with mock.patch.object(storage, "load_base", lambda *a, **k: calls.append(a) or real(*a, **k)):
        run("--compare", talks["llama"], "base", talks["other"], talks["llama"], "--prompt", question, *more)
    assert len(calls) == 1
    answers = [part.split("]\n", 1)[1].strip() for part in capsys.readouterr().out.split("\n[")[1:]]
    assert answers == [alone[0], printable(untrained), alone[1], alone[0]] and len(set(answers)) == 3
    run("--run", talks["llama"], "--demo", *more)
    shown = capsys.readouterr().out
    assert shown.count("\n[base]\n") == shown.count("\n[this run]\n") == 5


def test_what_cannot_be_compared_is_refused(talks, texts_run, models, trained, tmp_path, monkeypatch):
    """Said before a model is loaded."""
    monkeypatch.setattr(storage, "load_model", None)
    prompt = ["--prompt", "x"]
    residual = shutil.copytree(talks["llama"] / "adapter", tmp_path / "residual")
    init = json.loads((residual / "adapter_config.json").read_text()) | {"init_lora_weights": "pissa"}
    (residual / "adapter_config.json").write_text(json.dumps(init))
    with pytest.raises(InputError, match="--init_lora_weights pissa, which changes the base"):
        run("--demo", "--run", residual)
    for runs, reason in (
        ([talks["llama"], residual], "--init_lora_weights pissa"),
        ([talks["llama"], talks["qwen"]], "have different bases .*--run"),
        ([talks["llama"], texts_run], "was trained for causal_lm"),
        ([talks["llama"], models["llama"]], "is no folder of a run"),
        ([models["llama"], talks["llama"]], "is no folder of a run"),
        ([trained("llama", "generative", "single"), "base"], "--compare does not belong to classification"),
    ):
        with pytest.raises(InputError, match=reason):
            run("--compare", *runs, *prompt)


def test_running_text_goes_on(texts_run, tmp_path, capsys):
    run("goal team", "--run", texts_run, "--max_new_tokens", 8)
    alone = capsys.readouterr().out
    rows = write_csv(tmp_path / "in.csv", [{"prompt": "goal team", "n": "7"}, {"prompt": "atom", "n": "8"}])
    out = tmp_path / "out.jsonl"
    run("--run", texts_run, "--input_file", rows, "--output_file", out, "--id_column", "n", "--max_new_tokens", 8)
    found = read_jsonl(out)
    assert [row["id"] for row in found] == ["7", "8"] and printable(found[0]["answer"]) + "\n" == alone
    run("--run", texts_run, "--demo", "--max_new_tokens", 3)
    assert capsys.readouterr().out.count("[this run]") == 3


@pytest.mark.parametrize("kind", ["chat", "text", "labels"])
def test_a_row_without_an_answer_says_why(kind, talks, texts_run, trained, tmp_path, capsys):
    """In a line of its own; the other rows are answered as without it."""
    many = "word " * 3000
    runs = {"chat": talks["llama"], "text": texts_run, "labels": trained("qwen", "generative", "single")}
    rows = {
        "chat": [{"system": system, "instruction": "goal team"} for system in ("short", many, "short")],
        "text": [{"text": text} for text in ("goal team", "", "goal team")],
        "labels": [{"text": text} for text in ("goal team", " ", "goal team")],
    }[kind]
    reason = {"chat": "room", "text": "no text", "labels": "no text"}[kind]
    more = ["--max_new_tokens", 4, "--do_sample", "false"] if kind != "labels" else []
    for name, some in (("all", rows), ("good", rows[::2])):
        file = write_jsonl(tmp_path / f"{name}.jsonl", some)
        run("--run", runs[kind], "--input_file", file, "--output_file", tmp_path / f"{name}.out.jsonl", *more)
    first, bad, last = read_jsonl(tmp_path / "all.out.jsonl")
    answer = "prediction" if kind == "labels" else "answer"
    assert bad["id"] == "1" and bad[answer] is None and reason in bad["error"] and "--" not in bad["error"]
    expected = read_jsonl(tmp_path / "good.out.jsonl")
    assert [row[answer] for row in (first, last)] == [row[answer] for row in expected] and "error" not in first
    assert "1 rows could not be answered" in capsys.readouterr().out


# --- labels


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_labels_are_those_of_evaluate(trained, combination, tmp_path, capsys):
    """The same predictions and probabilities; `--min_probability` abstains and keeps the numbers."""
    run_dir = trained("gemma", *combination)
    file = json.loads((run_dir / "splits.json").read_text())["sources"]["test"]["name"]
    with open(file, newline="") as source:
        rows = [{"text": row["text"]} for row in csv.DictReader(source)]  # without labels
    bare = write_csv(tmp_path / "bare.csv", rows)
    run("--run", run_dir, "--input_file", bare, "--output_file", tmp_path / "out.jsonl")
    expected = read_jsonl(run_dir / "eval" / "test" / "predictions.jsonl")
    found = read_jsonl(tmp_path / "out.jsonl")
    for a, b in zip(found, expected, strict=True):
        assert (a["id"], a["prediction"], a["truncated"]) == (b["id"], b["prediction"], b["truncated"])
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5) and not a["abstained"]
    several = combination[1] == "multi"
    sure = [
        min(max(p, 1 - p) for p in row["probabilities"].values()) if several else max(row["probabilities"].values())
        for row in found
    ]
    middle = sorted(set(sure))[len(set(sure)) // 2 - 1 :][:2]
    limit = sum(middle) / 2  # between two rows: what is written of a probability is rounded
    run("--run", run_dir, "--input_file", bare, "--output_file", tmp_path / "some.jsonl", "--min_probability", limit)
    some = read_jsonl(tmp_path / "some.jsonl")
    assert [row["abstained"] for row in some] == [value < limit for value in sure]
    assert 0 < sum(row["abstained"] for row in some) < len(some)
    for a, b in zip(some, found, strict=True):
        assert a["prediction"] == (None if a["abstained"] else b["prediction"])
        assert a["probabilities"] == b["probabilities"]
    capsys.readouterr()
    run(rows[3]["text"], "--run", run_dir)
    shown = capsys.readouterr().out.splitlines()
    prediction = found[3]["prediction"]
    assert shown[0] == (", ".join(prediction) or "(no label)" if several else prediction) and len(shown) == 4
    run(rows[3]["text"], "--run", run_dir, "--min_probability", 1)
    assert capsys.readouterr().out.startswith("(abstains)\n")


def test_a_base_model_with_labels(models, capsys):
    run("goal striker", "--run", models["qwen"], "--labels", "sport", "music", *PLAIN)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] in ("sport", "music") and len(shown) == 3
    assert sum(float(line.split()[0]) for line in shown[1:]) == pytest.approx(1, abs=2e-3)


# --- files of answers


def batch(folder: Path, model: Path, rows: str, out: str, *more) -> list[str]:
    """Options of a chat over a file: drawn answers, so that batches and seeds matter."""
    files = ["--input_file", rows, "--output_file", str(folder / out)]
    return ["--run", str(model), *BASE, *files, "--temperature", "1.3", "--per_device_eval_batch_size", "2",
            *map(str, more)]  # fmt: skip


@pytest.fixture
def questions(tmp_path) -> str:
    return write_jsonl(tmp_path / "in.jsonl", [{"text": f"goal {'team ' * (i * 7 % 11)}number {i}"} for i in range(45)])


def test_a_killed_run_goes_on_to_the_same_file(models, questions, tmp_path):
    """SIGKILL while it writes; whatever half line is left is repaired; the rows that are there are not asked again."""
    options = ["--max_new_tokens", 40]
    run(*batch(tmp_path, models["qwen"], questions, "whole.jsonl", *options))
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    command = [
        sys.executable,
        str(ROOT / "inference.py"),
        *batch(tmp_path, models["qwen"], questions, "cut.jsonl", *options),
    ]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (cut.exists() and cut.stat().st_size):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    before = cut.read_bytes()
    assert 0 < before.count(b"\n") < 45 and whole.read_bytes().startswith(before)
    cut.write_bytes(before + b'{"id": "1')
    run(*batch(tmp_path, models["qwen"], questions, "cut.jsonl", *options))
    assert cut.read_bytes() == whole.read_bytes() and whole.read_bytes().count(b"\n") == 45
    assert [row["id"] for row in read_jsonl(cut)] == [str(i) for i in range(45)]


@pytest.mark.parametrize("kept", [1, 7, 8, 9, 44, 45])
def test_any_number_of_kept_rows(models, questions, tmp_path, capsys, kept):
    options = batch(tmp_path, models["mistral"], questions, "a.jsonl", "--max_new_tokens", 6)
    run(*options)
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:kept]))
    capsys.readouterr()
    run(*options)
    assert (tmp_path / "a.jsonl").read_bytes() == whole
    said = capsys.readouterr().out
    assert f"{kept} rows had been answered" in said and "rows/s" in said if kept < 45 else "all 45 rows already" in said


def test_two_processes_write_one_processes_file(talks, trained, questions, tmp_path):
    """45 rows and 3 chunks over 2 processes, drawn answers; a classifier's 9 rows and 3 chunks; both also sharded."""
    classifier = trained("qwen", "generative", "single")
    file = write_csv(tmp_path / "rows.csv", toy_rows(3))
    jobs = {}
    for name, more in (("one", []), ("two", []), ("sharded", ["--shard_model", "true"])):
        labels = ["--run", classifier, "--input_file", file, "--output_file", tmp_path / f"{name}-labels.jsonl",
                  "--per_device_eval_batch_size", 1, *more]  # fmt: skip
        text = ["--run", talks["llama"], "--input_file", questions, "--output_file", tmp_path / f"{name}.jsonl",
                "--temperature", 1.3, "--max_new_tokens", 6, "--per_device_eval_batch_size", 4, *more]  # fmt: skip
        jobs[name] = [text, labels]
    for options in jobs["one"]:
        run(*options)
    said = run_in_two_processes("inference", tmp_path, *jobs["two"], *jobs["sharded"])
    assert said.count("The base is sharded: a process holds") == 2
    for name in ("two", "sharded"):
        assert read_jsonl(tmp_path / f"{name}.jsonl") == read_jsonl(tmp_path / "one.jsonl")
        labelled = [read_jsonl(tmp_path / f"{each}-labels.jsonl") for each in ("one", name)]
        for one, two in zip(*labelled, strict=True):  # sums of floats follow the number of threads a process gets
            assert two.pop("probabilities") == pytest.approx(one.pop("probabilities"), abs=1e-6)
            assert two == one
        assert len(read_jsonl(tmp_path / f"{name}.jsonl")) == 45 and len(labelled[1]) == 9


def test_an_answer_file_belongs_to_its_input(models, questions, tmp_path, monkeypatch):
    """Known by the hash of the input, of the weights, and by the options; a file of anything else is left alone."""
    options = batch(tmp_path, models["gemma"], questions, "a.jsonl", "--max_new_tokens", 4)
    run(*options)
    written = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(written[:40])
    run(*options, "--num_threads", 1)  # says nothing about the answers
    assert (tmp_path / "a.jsonl").read_bytes() == written
    monkeypatch.setattr(base_model, "load_base", None)  # what follows is said before a model is loaded
    with pytest.raises(InputError, match="other options.*Delete it, or name another --output_file"):
        run(*options, "--seed", 1)
    with pytest.raises(InputError, match="made otherwise"):
        run(*options, "--system_prompt", "Be brief")
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "goal"}])
    with pytest.raises(InputError, match="other input file"):
        run(*batch(tmp_path, models["gemma"], other, "a.jsonl", "--max_new_tokens", 4))
    assert (tmp_path / "a.jsonl").read_bytes() == written
    (tmp_path / "none.jsonl").write_text("")  # stopped before the first answer: nothing is lost
    (tmp_path / "none.jsonl.source.json").write_text('{"options": "others"}')
    assert AnswerFile(tmp_path / "none.jsonl", ["0"], lambda: {"options": "mine"}).done == 0
    (tmp_path / "one.jsonl").write_text('{"id": "0"}\n')  # by a base that has to be fetched again first
    (tmp_path / "one.jsonl.source.json").write_text('{"base": "abc"}')
    out = AnswerFile(tmp_path / "one.jsonl", ["0", "1"], lambda: {"base": ""})
    out.note("base", "abc")
    with pytest.raises(InputError, match=r"made otherwise \(other base;"):
        out.note("base", "other")
    (tmp_path / "notes.jsonl").write_text("mine\n")
    with pytest.raises(InputError, match="was not written by inference.py"):
        run(*batch(tmp_path, models["gemma"], questions, "notes.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(reversed(written.splitlines())) + b"\n")
    with pytest.raises(InputError, match="line 1: not the answer to this row"):
        run(*options)


SHAPES = [
    ({"instruction": "Hi"}, ["user: Hi"]),
    ({"instruction": "Hi", "response": "Ho", "input": "There"}, ["user: Hi\n\nThere"]),
    ({"instruction": "Hi", "input": "you", "output": "Ho", "system": "S"}, ["system: S", "user: Hi\n\nyou"]),
    ({"prompt": "Hi", "completion": "Ho"}, ["user: Hi"]),
    ({"prompt": [{"role": "user", "content": "Hi"}], "completion": []}, ["user: Hi"]),
    ({"text": "Hi"}, ["user: Hi"]),
    ({"q": "Hi"}, ["user: Hi"]),
    ({"messages": '[{"role": "user", "content": "Hi"}]'}, ["user: Hi"]),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, ["user: Hi"]),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"},
                   {"role": "user", "content": "Bye"}]}, ["user: Hi", "assistant: Ho", "user: Bye"]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "turns"), SHAPES)
def test_what_a_row_asks(row, turns):
    found = read_question(row, "row", {"instruction": "q"} if "q" in row else {}, "Default" if "text" in row else None)
    expected = ["system: Default"] * ("text" in row) + turns
    assert [f"{turn['role']}: {turn['content']}" for turn in found] == expected


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".parquet"])
def test_other_formats(models, tmp_path, suffix):
    rows, file = [{"key": "a", "text": "goal"}, {"key": "b", "text": "atom laser"}], tmp_path / f"in{suffix}"
    if suffix == ".json":
        file.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        mark = "\t" if suffix == ".tsv" else ","
        file.write_text("\n".join(mark.join(cells) for cells in (rows[0], *(row.values() for row in rows))) + "\n")
    files = ["--input_file", file, "--output_file", tmp_path / "out.jsonl", "--id_column", "key"]
    run("--run", models["qwen"], *BASE, *files, "--max_new_tokens", 3)
    found = read_jsonl(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == ["a", "b"] and {"answer", "stopped", "tokens", "shortened"} < set(found[0])


# --- what is refused


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--input_file", "gone.csv", "--output_file", "o.jsonl"], "gone.csv: there is no such file"),
        (["--input_file", "empty.csv", "--output_file", "o.jsonl"], "empty.csv: the file has no rows"),
        (["--input_file", "in.csv"], "--input_file and --output_file need each other"),
        (["--input_file", "in.csv", "--output_file", "gone/o.jsonl"], "there is no folder gone"),
        (["--input_file", "in.csv", "--output_file", "o.csv"], "name it .jsonl"),
        (["--input_file", "blank.csv", "--output_file", "o.jsonl"], "blank.csv, data row 2: there is no question in"),
        (["--input_file", "in.csv", "--output_file", "o.jsonl", "--id_column", "n"], "there is no column 'n'"),
        (["--input_file", "in.csv", "--output_file", "o.jsonl", "--columns", "instruction=q"], "no column 'q'"),
        (["--input_file", "twice.csv", "--output_file", "o.jsonl", "--id_column", "n"], "the id is missing or occurs"),
        (["--input_file", "in.csv", "--output_file", "o.jsonl", "--prompt", "x"], "--prompt and --input_file exclude"),
        (["x", "--prompt", "y"], "The instruction is given twice"),
        (["x", "--demo"], "--prompt and --demo exclude each other"),
        (["x", "--shard_model", "true"], "several processes, which share the rows of an --input_file"),
        ([" "], "The instruction is empty"),
        (["--persona", "biling"], "There is no persona 'biling'. Did you mean billing?"),
        (["--persona", "billing", "--system_prompt", "x"], "--persona and --system_prompt exclude each other"),
        (["--temprature", "1"], "Did you mean --temperature?"),
        (["--top_p", "1.5"], "--top_p 1.5: must be at most 1"),
        (["--do_sample", "false", "--top_k", "5"], "--do_sample false does not sample"),
        (["--compare", "a"], "--compare: a is no folder of a run"),
        (["--compare", "base"], "--compare: smollm2-135m is no folder of a run"),
        (["--min_probability", "0.5"], "--min_probability does not belong to chat"),
        (["--task", "classification"], "name the labels with --labels"),
        (["--task", "classification", "--labels", "a", "b", "--persona", "order"], "does not belong to classification"),
        (["--run", "a", "--model", "b"], "--model b: give the model as --run"),
        (["--system_prompt", " "], "--system_prompt is blank"),
        (["--id_column", "x"], "are about the rows of an --input_file"),
    ],
)
def test_bad_input_is_one_paragraph_at_once(tmp_path, options, reason):
    (tmp_path / "in.csv").write_text("text\nHi\n")
    (tmp_path / "blank.csv").write_text("text,n\nHi,1\n,2\n")
    (tmp_path / "empty.csv").write_text("text\n")
    (tmp_path / "twice.csv").write_text("text,n\nHi,1\nHo,1\n")
    expect_error(run_alone(*options, script="inference.py", cwd=tmp_path), reason)


def test_what_training_settled_is_refused(talks, trained, monkeypatch):
    monkeypatch.setattr(storage, "load_model", None)
    with pytest.raises(InputError, match="--load_in_4bit was settled"):
        run("x", "--run", talks["llama"], "--load_in_4bit", "true")
    with pytest.raises(InputError, match="--temperature does not belong to classification"):
        run("x", "--run", trained("llama", "head", "single"), "--temperature", 1)
    with pytest.raises(InputError, match="--labels was settled"):
        run("x", "--run", trained("llama", "head", "single"), "--labels", "a", "b")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="Several processes share the rows of an --input_file"):
        run("x", "--run", talks["llama"])
