"""train_clm.py: perplexity that anyone can compute again, and a run that is the same however it is cut."""

import csv
import json
import math
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from helpers import ROOT
from helpers.models import FAMILIES, build_tokenizer
from helpers.runs import TEXT, Stopped, assert_same_bits, assert_same_updates, run_evaluate, stop_at
from helpers.runs import train_text as train
from helpers.scripts import run_script
from helpers.texts import prose

import train_clm
from common import report as report_command
from common.data.corpus import Block
from common.errors import InputError
from common.measure import figures
from common.measure.run_table import write_table
from common.model.losses import token_losses
from common.model.token_losses import TokenLosses
from common.text.batches import collate_blocks

NAMES = ("train", "validation", "test")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAINLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> dict[str, str]:
    """train, validation and test text files; the last blocks are short."""
    base = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(NAMES):
        (base / f"{name}.txt").write_text(prose(14 if name == "train" else 9, seed), encoding="utf-8")
    return {name: str(base / f"{name}.txt") for name in NAMES}


def text_options(texts: dict[str, str]) -> list[str]:
    return [part for name, path in texts.items() for part in (f"--{name}_file", path)]


def by_hand(folder: Path, text: str, size: int, stride: int | None = None) -> float:
    """Perplexity in a few lines of plain transformers, one window at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    nats, count, seen = 0.0, 0, 0
    for start in range(0, len(ids), stride or size):
        window = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + size]]])
        logits = model(window).logits[0, :-1].log_softmax(-1)
        new = range(max(0, seen - start), len(window[0]) - 1)
        nats -= sum(logits[t, window[0, t + 1]].item() for t in new)
        count, seen = count + len(new), start + len(window[0]) - 1
        if seen == len(ids):
            break
    return math.exp(nats / count)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stride", [None, 10])
def test_perplexity_is_that_of_an_independent_computation(models, texts, tmp_path, family, stride):
    """Whatever the batch size; the last, short block counts by its tokens."""
    found = []
    for batch in (1, 3, 8):
        options = ["--run", models[family], "--task", "causal_lm", "--test_file", texts["test"], "--block_size", 32]
        options += ["--mixed_precision", "no", "--load_in_4bit", "false", "--per_device_eval_batch_size", batch]
        run_evaluate(*options, *(["--stride", stride] if stride else []), "--output_dir", tmp_path / str(batch))
        found.append(json.loads((tmp_path / str(batch) / "metrics.json").read_text()))
    text = Path(texts["test"]).read_text(encoding="utf-8")
    wanted = by_hand(models[family], text, 32, stride)
    assert [metrics["perplexity"] for metrics in found] == pytest.approx([wanted] * 3, rel=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[family])
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
    assert found[0]["predicted_tokens"] == tokens - (tokens % 32 == 1 and not stride)
    loss = math.log(wanted)
    assert found[0]["bits_per_byte"] == pytest.approx(loss * tokens / len(text.encode()) / math.log(2), rel=1e-5)
    assert found[0]["word_perplexity"] == pytest.approx(math.exp(loss * tokens / len(text.split())), rel=1e-4)
    low, high = found[0]["intervals_95"]["perplexity"]
    assert low < found[0]["perplexity"] < high


TWO = """
import json, os, sys
sys.path[:0] = sys.argv[1:3]
from helpers.runs import timeless, train_text
jobs = json.loads(open(sys.argv[3]).read())
for options in jobs:
    figures = timeless(train_text(*options, last=options is jobs[-1]))
    with open(options[options.index("--output_dir") + 1] + f"/rank_{os.environ['RANK']}.json", "w") as file:
        json.dump(figures, file)
"""


def test_an_update_is_the_same_however_it_is_cut(models, texts, tmp_path):
    """(4, 1, 1) == (2, 2, 1) == (2, 1, 2 processes) in loss, gradient norm and weights."""
    common = [*text_options(texts), "--max_steps", 4, "--lora_dropout", 0, "--baselines", "true"]
    jobs = []
    for family in FAMILIES:
        options = ["--model", str(models[family]), *common]
        for name, batch, accumulation in (("big", 4, 1), ("small", 2, 2)):
            sizes = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
            train(*options, *sizes, "--output_dir", tmp_path / name / family)
        jobs.append([*options, "--per_device_train_batch_size", 2, "--output_dir", str(tmp_path / "two" / family)])
    (tmp_path / "two.py").write_text(TWO)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_script(tmp_path / "two.py", str(ROOT), str(ROOT / "tests"), str(tmp_path / "jobs.json"), processes=2)
    for family in FAMILIES:
        big = tmp_path / "big" / family
        for other in (tmp_path / "small" / family, tmp_path / "two" / family):
            assert_same_updates(big, other)
            first, second = (json.loads((run / "eval/test/metrics.json").read_text()) for run in (big, other))
            assert first["perplexity"] == pytest.approx(second["perplexity"], rel=1e-5)
            assert first["predicted_tokens"] == second["predicted_tokens"]
            blocks = [(run / "eval/test/blocks.jsonl").read_text().count("\n") for run in (big, other)]
            assert blocks[0] == blocks[1] == first["rows"]


@pytest.mark.parametrize("family", FAMILIES)
def test_resuming_is_exact(models, texts, tmp_path, monkeypatch, family):
    """Killed between two checkpoints, with dropout, the run ends with the same bits."""
    options = ["--model", models[family], *text_options(texts), "--lora_dropout", 0.1, "--max_steps", 7]
    options += ["--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "steps", "--eval_steps", 3]
    train(*options, "--output_dir", tmp_path / "whole")
    from common.train import loop

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, loop, "finite_mean", 6)
        train(*options, "--output_dir", tmp_path / "cut")
    train(*options, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "latest")
    assert_same_bits(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    ("family", "extra"),
    [("llama", ()), ("mistral", ("--load_in_4bit", "true", "--mixed_precision", "bf16")),
     ("gemma", ("--document_masking", "true")), ("qwen", ("--full_finetuning", "true"))],
)  # fmt: skip
def test_a_run_learns_and_is_evaluated_again(models, texts, tmp_path, family, extra):
    options = ["--model", models[family], *text_options(texts), "--learning_rate", 1e-2, "--num_train_epochs", 6]
    figures = train(*options, "--baselines", "true", *extra, "--output_dir", tmp_path)
    baseline = json.loads((tmp_path / "eval/test/baselines.json").read_text())["untrained base"]
    assert figures["perplexity"] < 0.5 * baseline["perplexity"]
    written = json.loads((tmp_path / "eval/test/metrics.json").read_text())
    run_evaluate("--run", tmp_path, "--output_dir", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["perplexity"] == pytest.approx(written["perplexity"], rel=1e-6)  # measured again after a reload
    assert again.keys() == written.keys()
    text = (tmp_path / "eval/test/report.md").read_text()
    assert "untrained base" in text and "> In a shocking discovery," in text
    masked = "--document_masking" in extra
    assert ("wrapped packing" in (tmp_path / "data_report.md").read_text()) is not masked
    folder = tmp_path / ("model" if "--full_finetuning" in extra else "adapter")
    task = json.loads((folder / "task.json").read_text())
    assert (task["task"], task["document_masking"], task["start"]) == ("causal_lm", masked, [1])


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_are_kept_apart_when_asked(models, family):
    """A block's loss is the sum of its documents' losses; without masking, it is not."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32)
    losses = TokenLosses(model.eval())
    documents = [[*range(10, 17), 2], [*range(30, 41), 2], [50, 51, 52]]
    whole = Block("0", sum(documents, []))
    short = Block("1", documents[1])

    def nats(rows: list[Block], masking: bool) -> torch.Tensor:
        batch = collate_blocks([(row, True) for row in rows], [], 2, 2, masking)
        with torch.no_grad():
            found = token_losses(losses, batch)
        return torch.zeros(len(rows)).index_add(0, batch.rows, found)

    apart = sum(nats([Block("", tokens)], False)[0] for tokens in documents)
    together = nats([whole, short], True)  # beside a padded row
    assert together[0].item() == pytest.approx(apart.item(), rel=1e-5)
    assert together[1].item() == pytest.approx(nats([short], False)[0].item(), rel=1e-5)
    assert nats([whole], False)[0].item() != pytest.approx(apart.item(), rel=1e-2)
    batch = collate_blocks([(whole, True), (short, True)], [], 2, 2, True)
    model.train()
    token_losses(losses, batch).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_loop_is_the_same_text_in_every_script():
    def loop_of(name: str) -> str:
        text = (ROOT / name).read_text()
        return text[text.index("    # --- loop\n") : text.index("    # --- end loop\n")]

    assert loop_of("train_clm.py") == loop_of("train_cls.py") == loop_of("train_sft.py")
    assert len(loop_of("train_cls.py").splitlines()) < 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_file", "gone.txt"], "gone.txt: there is no such file"),
        (["--stride", "200"], "--stride above --block_size"),
        (["--block_size", "1"], "--block_size 1: must be at least 2"),
        (["--validation_fraction", "0", "--test_fraction", "0"], "--eval_strategy needs validation text"),
        (["--labels", "a"], "there is no such option"),
        (["--max_length", "128"], "there is no such option"),
        (["--test_file", "{test}"], "there are no training rows; give --train_file"),
        (["--model", "{llama}", "--block_size", "600"], "longer than the 512 positions"),
        (["--stride", "5", "--document_masking", "true"], "choose one"),
    ],
)
def test_bad_input_is_one_paragraph(models, texts, capsys, monkeypatch, options, message):
    options = [option.format(test=texts["test"], llama=models["llama"]) for option in options]
    monkeypatch.setattr(sys, "argv", ["train_clm.py", *options])
    with pytest.raises(InputError, match=message), mock.patch.object(figures, "can_draw", lambda: False):
        train_clm.main()


def test_other_tasks_options_are_refused_in_evaluation(models, texts, tmp_path):
    train("--model", models["llama"], *text_options(texts), "--max_steps", 1, "--output_dir", tmp_path)
    for options in (["--labels", "a"], ["--decode", "generate"], ["--max_length", 9]):
        with pytest.raises(InputError, match="does not belong to causal_lm"):
            run_evaluate("--run", tmp_path, *options)
    with pytest.raises(InputError, match="was settled"):
        run_evaluate("--run", tmp_path, "--document_masking", "true")
    Path(texts["test"]).touch()
    run_evaluate("--run", tmp_path, "--stride", 16, "--output_dir", tmp_path / "windows")
    assert "untrained" not in (tmp_path / "windows" / "report.md").read_text()


def test_runs_side_by_side(models, texts, tmp_path):
    """`python -m common.report table`: the figures of each run's own files, as Markdown, CSV and pictures."""
    runs = {"lora": (), "nf4": ("--load_in_4bit", "true"), "full": ("--full_finetuning", "true")}
    figures = {}
    for name, options in runs.items():
        options = ["--model", models["llama"], *text_options(texts), "--max_steps", 2, *options]
        figures[name] = train(*options, "--baselines", "true", "--output_dir", tmp_path / "runs" / name)
    report_command.main(["table", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert {row["run"]: row["training"] for row in rows} == {"lora": "LoRA", "nf4": "4-bit LoRA", "full": "full"}
    for row in rows:
        values = figures[row["run"]]
        assert float(row["perplexity"]) == values["perplexity"]
        assert [float(row["low_95"]), float(row["high_95"])] == values["intervals_95"]["perplexity"]
        assert float(row["tokens/s"]) == values["train_tokens_per_second"]
        assert float(row["s per epoch"]) == pytest.approx(values["train_runtime"] / values["epochs"])
        assert int(row["memory_bytes"]) == values["train_peak_memory_bytes"] and int(row["weights_bytes"]) > 1000
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.count("\n") == 2 + 3 + 2 and text.count("untrained base") == 2  # in 32 and in 4 bits
    assert (tmp_path / "out" / "quality.png").stat().st_size > 1000 < (tmp_path / "out" / "speed.png").stat().st_size
    with pytest.raises(InputError, match="no run there"):
        write_table([tmp_path / "out"], tmp_path)


def test_a_copied_adapter_is_measured_as_its_run(models, texts, tmp_path):
    """task.json tells what training settled; results on other rows or windows leave the run's own alone."""
    options = ["--model", models["llama"], *text_options(texts), "--max_steps", 2, "--document_masking", "true"]
    train(*options, "--baselines", "true", "--output_dir", tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "copy")
    before = (tmp_path / "run/eval/test/metrics.json").read_bytes()
    run_evaluate("--run", tmp_path / "run", "--test_file", texts["validation"])
    run_evaluate("--run", tmp_path / "copy", "--test_file", texts["validation"])
    one, two = (
        json.loads((tmp_path / name / "eval/test-validation/metrics.json").read_text()) for name in ("run", "copy")
    )
    assert one["perplexity"] == two["perplexity"] and one["predicted_tokens"] == two["predicted_tokens"]
    run_evaluate("--run", tmp_path / "run", "--block_size", 16)
    assert (tmp_path / "run/eval/test-windows-16-16/metrics.json").exists()
    assert (tmp_path / "run/eval/test/metrics.json").read_bytes() == before
    report_command.main(["table", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(InputError, match="longer than the 512 positions"):
        run_evaluate("--run", tmp_path / "run", "--block_size", 600)


def test_whole_experts_are_loaded_again(texts, tmp_path):
    """Full fine-tuning of a mixture of experts, whose weights are stored under other names than the model's."""
    shape = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(**shape))
    model.save_pretrained(tmp_path / "model")
    build_tokenizer(tmp_path / "model")
    options = ["--model", tmp_path / "model", *text_options(texts), "--full_finetuning", "true", "--max_steps", 2]
    figures = train(*options, "--output_dir", tmp_path / "run")
    run_evaluate("--run", tmp_path / "run", "--output_dir", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["perplexity"] == pytest.approx(figures["perplexity"], rel=1e-6)


def test_a_text_that_cannot_be_used_ends_two_processes_with_its_reason(models, tmp_path):
    """No process waits at a barrier for one that has given up, and adds the failed connection to the message."""
    (tmp_path / "rows.jsonl").write_text('{"text": "One."}\n{"text": 7', encoding="utf-8")
    options = ["--model", str(models["llama"]), "--train_file", str(tmp_path / "rows.jsonl"), *TEXT]
    found = run_script("train_clm.py", *options, cwd=tmp_path, processes=2, timeout=120, check=False)
    assert found.returncode and found.stderr.count("rows.jsonl") == 1
    assert found.stderr.count("Traceback") == 1 and "ChildFailedError" in found.stderr  # torchrun's own
