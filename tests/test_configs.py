"""The reference configurations, the launch profiles, and the demo data."""

import csv
import json
import re
import shlex
import subprocess
from collections import Counter
from inspect import signature
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from helpers import ROOT
from helpers.runs import PLAIN, quick

import train_clm
import train_sft
from common import prepare
from common.data import builders
from common.data.classification import load_classification
from common.data.conversations import load_conversations
from common.data.splits import SPLITS
from common.errors import InputError
from common.options import parse_config
from train_cls import Config

RUNS = sorted((ROOT / "configs").glob("*_llama.yaml"))
TEXT_RUNS = sorted((ROOT / "configs").glob("wikitext_*.yaml"))
CHAT_RUNS = sorted((ROOT / "configs").glob("sft_*.yaml"))
PROFILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
AMAZON = ["books", "music", "electronics", "toys & games", "movies & tv"]


def write_source(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def prepared(tmp_path, monkeypatch, capsys) -> list[str]:
    """The data of both reference set-ups, built from stand-ins where `configs/` expects them; the printed commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text = {"title": "A title", "abstract": "An abstract."}
    arxiv = [{**text, "primary_category": name} for name in ("cs.CL", "cs.CV", "cs.LG", "hep-ph", "math.CO") * 20]
    amazon = [
        {"title": f"Item {i}", "content": "Good.", "labels": [AMAZON[i % 5], AMAZON[(i // 5) % 5]]} for i in range(100)
    ]
    printed = []
    for name, rows in (("arxiver", arxiv), ("amazoncat13k", amazon)):
        prepare.main([name, "--source", str(write_source(tmp_path / f"{name}_source", rows))])
        printed.append(capsys.readouterr().out.splitlines()[-1])
    return printed


def test_arxiv_set_up_is_the_reference(prepared):
    """configs/arxiv_llama.yaml: the reference's options, accepted, on the files that the builder writes."""
    config = parse_config(Config, ["--config", str(ROOT / "configs" / "arxiv_llama.yaml")])
    assert (config.model, config.approach) == ("meta-llama/Llama-3.2-1B", "generative")
    assert (config.lora_r, config.lora_alpha, config.learning_rate) == (2, 2, 2e-4)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (8, 2)
    assert (config.num_train_epochs, config.max_length) == (1, 512)
    data = load_classification(config)
    assert len(data.labels) == 5 and not data.multi_label and all(data.splits.values())
    same = parse_config(Config, shlex.split(prepared[0])[3:])
    assert {k: getattr(same, k) for k in ("train_file", "validation_file", "test_file", "text_fields")} == {
        k: getattr(config, k) for k in ("train_file", "validation_file", "test_file", "text_fields")
    }


def test_amazon_set_up_is_the_reference(prepared):
    """configs/amazon_llama.yaml, added to the command that the builder prints, and with its labels alone."""
    options = ["--config", str(ROOT / "configs" / "amazon_llama.yaml")]
    printed = shlex.split(prepared[1])[3:]
    labels = printed[printed.index("--label_columns") + 1 :]
    assert sorted(labels) == sorted(AMAZON)
    config = parse_config(Config, [*printed, *options])
    assert config == parse_config(Config, [*options, "--label_columns", *labels])
    assert (config.model, config.approach, config.max_length) == ("meta-llama/Llama-3.2-1B", "head", 1024)
    assert (config.lora_r, config.lora_dropout, config.optim) == (2, 0.05, "adamw_8bit")
    assert config.target_modules == [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (4, 8)
    assert (config.early_stopping_patience, config.metric_for_best_model) == (2, "f1_micro")
    assert config.seeds == [1, 3, 4, 5]
    data = load_classification(config)
    assert data.labels == labels and data.multi_label and all(data.splits.values())
    with pytest.raises(InputError, match="label_column"):  # without the labels: an error that says so, not a wrong run
        load_classification(parse_config(Config, options))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_configuration_is_accepted_and_explained(path):
    """Each parses and passes the checks; its comment says what it reproduces, from what data, and that none was run."""
    parse_config(Config, ["--config", str(path)])
    comment = path.read_text().split("\n\n")[0]
    for text in ("python -m common.prepare", str(path.relative_to(ROOT)), "Reported elsewhere", "not been run here"):
        assert text in comment.replace("\n# ", " ").replace("  ", " ")


def test_configurations_are_listed():
    """The parametrised tests see the files."""
    assert [path.stem for path in RUNS] == ["amazon_llama", "arxiv_llama"]
    assert [path.stem for path in CHAT_RUNS] == ["sft_bitext", "sft_finetome", "sft_mistral"]
    assert [path.stem for path in PROFILES] == ["cpu", "multi_gpu", "multi_node", "one_gpu"]


@pytest.mark.parametrize("path", TEXT_RUNS, ids=lambda path: path.stem)
def test_set_ups_on_running_text_are_accepted(path):
    """Each file of options fits train_clm.py, and its comment shows the command."""
    config = parse_config(train_clm.Config, ["--config", str(path)])
    assert (config.block_size, config.learning_rate) == (128, 2e-4)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (4, 8)
    assert str(path.relative_to(ROOT)) in path.read_text()


def chat_commands(name: str) -> list[list[str]]:
    """The commands in the comment of a set-up on conversations: what stands behind `python -m` and the script."""
    comment = (ROOT / "configs" / f"{name}.yaml").read_text().replace("\\\n#", "")
    lines = re.findall(r"^#   (?:python -m|accelerate launch) (.*)", comment, re.M)
    return [shlex.split(line)[1:] for line in lines]


def read_command(options: list[str]) -> train_sft.Config:
    """The options as seen from the repository, checked."""
    at = options.index("--config") + 1
    config = parse_config(train_sft.Config, [*options[:at], str(ROOT / options[at]), *options[at + 1 :]])
    return config


def test_set_ups_on_conversations_are_the_reference():
    """In the order of the commands in the comments; every value of the set-up stands in the file or the command."""
    mistral, own_rows = map(read_command, chat_commands("sft_mistral"))
    assert mistral.model == "mistralai/Mistral-7B-v0.1" and mistral.max_length == 512
    assert (mistral.lora_r, mistral.lora_alpha, mistral.num_train_epochs) == (16, 32, 3)
    assert mistral.lr_scheduler_type == "cosine" and mistral.warmup_ratio > 0 and not mistral.max_steps
    assert (mistral.train_file, own_rows.train_file) == (None, "alpaca.json")
    source, *finetome = chat_commands("sft_finetome")
    small, large = map(read_command, finetome)
    assert source == ["finetome"] and signature(builders.BUILDERS["finetome"]).parameters["max_rows"].default == 1000
    assert (small.model, small.lora_r) == ("meta-llama/Llama-3.2-1B", 8)
    assert (large.model, large.lora_r) == ("meta-llama/Llama-3.2-3B", 16)
    assert [(run.max_steps, run.save_strategy, run.save_steps) for run in (small, large)] == [
        (100, "steps", 25), (150, "steps", 50)
    ]  # fmt: skip
    source, command = chat_commands("sft_bitext")
    assert source == ["bitext"] and signature(builders.BUILDERS["bitext"]).parameters["max_rows"].default == 5000
    bitext = read_command(command)
    assert bitext.max_steps == 200
    for run in (mistral, small, large, bitext):
        assert (run.learning_rate, run.per_device_train_batch_size, run.gradient_accumulation_steps) == (2e-4, 2, 4)


def test_set_ups_on_conversations_train(models, tmp_path, monkeypatch, capsys):
    """On the files that the builders write from stand-ins, with a tiny model in place of the gated one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    turns = [{"from": "human", "value": "Frage"}, {"from": "gpt", "value": "Answer"}]
    finetome = [{"conversations": turns, "source": "s", "score": 4.5} for _ in range(40)]
    bitext = [{"instruction": f"q{i}", "response": "a", "category": "ORDER", "intent": "ab"[i % 2]} for i in range(40)]
    for name, rows in (("finetome", finetome), ("bitext", bitext)):
        prepare.main([name, "--source", str(write_source(tmp_path / f"{name}_source", rows))])
        written = shlex.split(capsys.readouterr().out.splitlines()[-1])[3:]
        command = chat_commands(f"sft_{name}")[1]
        printed, config = parse_config(train_sft.Config, written), read_command(command)
        assert {split: getattr(config, f"{split}_file") for split in SPLITS} == {
            split: getattr(printed, f"{split}_file") for split in SPLITS
        }
        small = ["--model", models["llama"], "--max_length", "96", "--max_steps", "2", "--output_dir", tmp_path / name]
        config = read_command([*command, *PLAIN[: PLAIN.index("--lora_r")], *map(str, small)])
        with quick():
            figures = train_sft.train(config, load_conversations(config), config.model)
        assert figures["rows"] == 4


@pytest.mark.parametrize("path", CHAT_RUNS, ids=lambda path: path.stem)
def test_set_ups_on_conversations_are_explained(path):
    comment, options = path.read_text().split("\n\n", 1)
    assert "not been run here" in comment and str(path.relative_to(ROOT)) in comment
    assert "not in the reference" in options


def test_ranks_are_swept(tmp_path):
    """configs/lora_ranks.sh: one run a way and rank, then the table; what is finished stays, the rest goes on."""
    calls = tmp_path / "calls"
    for name in ("accelerate", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\n')
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "out"
    for name in ("lora_r16_a32", "nf4_r8_a16"):  # one is finished, one was interrupted
        (out / name / "eval" / "test").mkdir(parents=True)
        (out / name / "config.yaml").touch()
    (out / "lora_r16_a32" / "eval" / "test" / "metrics.json").touch()
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "OUT": str(out), "RANKS": "8:16 16:32"}
    command = ["bash", str(ROOT / "configs" / "lora_ranks.sh"), "--config", "configs/wikitext_small.yaml"]
    subprocess.run(command, env=environment, check=True, timeout=60)
    *runs, last = calls.read_text().splitlines()
    assert last == f"python -m common.report table {out}"
    assert [Path(run.split()[-1]).name for run in runs] == ["full", "lora_r8_a16", "nf4_r8_a16", "nf4_r16_a32"]
    assert ["--resume_from_checkpoint" in run for run in runs] == [False, False, True, False]
    for run in runs:
        words = run.split()
        assert words[:3] == ["accelerate", "launch", "train_clm.py"]
        parse_config(train_clm.Config, words[3:])


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_launch_profiles_are_valid(path):
    """`accelerate launch --config_file` takes each, as its comment writes it, and means what its name says."""
    load_config_from_file(str(path))
    command = re.match(r"# (accelerate launch .*)", path.read_text())[1]
    words = shlex.split(command)[2:]
    assert words[:2] == ["--config_file", str(path.relative_to(ROOT))]
    args = launch_command_parser().parse_args(["--config_file", str(path), *words[2:]])
    args, _, _ = _validate_launch_command(args)
    assert args.training_script == "train_cls.py"
    expected = {"cpu": (False, True, 1), "one_gpu": (False, False, 1), "multi_gpu": (True, False, 4),
                "multi_node": (True, False, 4)}[path.stem]  # fmt: skip
    assert (bool(args.multi_gpu), args.use_cpu, args.num_processes) == expected


# --- the demo data


@pytest.fixture(scope="module")
def demo() -> dict[str, list[dict[str, str]]]:
    """split -> rows."""
    rows = {}
    for split in SPLITS:
        with open(ROOT / "data" / "arxiv_demo" / f"{split}.csv", encoding="utf-8", newline="") as file:
            rows[split] = list(csv.DictReader(file))
    return rows


def words_of(row: dict[str, str]) -> list[str]:
    return re.findall(r"\w+", f"{row['title']} {row['abstract']}".lower())


def test_demo_has_40_10_10_rows_a_label(demo):
    """Five labels in equal numbers."""
    labels = ("cs.CL", "cs.CV", "cs.LG", "hep-ph", "quant-ph")
    for split, count in zip(SPLITS, (40, 10, 10), strict=True):
        assert Counter(row["label"] for row in demo[split]) == dict.fromkeys(labels, count)


def test_demo_categories_contain_the_label(demo):
    """The multi-label variant names the same labels, the row's own among them, and some rows have several."""
    rows = [row for split in SPLITS for row in demo[split]]
    labels = {row["label"] for row in rows}
    several = [[name.strip() for name in row["categories"].split(";")] for row in rows]
    assert all(row["label"] in names and labels.issuperset(names) for row, names in zip(rows, several, strict=True))
    assert sum(len(names) > 1 for names in several) > len(rows) / 5


def test_demo_texts_are_not_copies(demo):
    """No text twice, and no run of six words in two rows: no templates, no near-duplicates between splits."""
    rows = [row for split in SPLITS for row in demo[split]]
    assert len({" ".join(words_of(row)) for row in rows}) == len(rows)
    seen: dict[tuple, int] = {}
    for number, row in enumerate(rows):
        words = words_of(row)
        for run in {tuple(words[i : i + 6]) for i in range(len(words) - 5)}:
            assert seen.setdefault(run, number) == number, f"rows {seen[run]} and {number}: {' '.join(run)}"


def test_demo_texts_do_not_name_their_label(demo):
    """No label string, nor its part after the dot, stands in a text."""
    labels = {row["label"] for row in demo["train"]}
    for split in SPLITS:
        for row in demo[split]:
            text = f"{row['title']} {row['abstract']}".lower()
            for label in labels:
                assert label.lower() not in text
                assert label.startswith("cs.") is False or label[3:].lower() not in words_of(row)
