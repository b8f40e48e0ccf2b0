"""The README is true: its commands parse, its files exist, its examples load, its worked changes apply and train."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState, GradientState
from conftest import FAMILIES, ROOT, toy_options

import evaluate
import inference
import train_clm
import train_cls
import train_sft
from common import prepare
from common.config import (
    check_answers,
    check_causal,
    check_classification,
    check_instructions,
    check_loop,
    check_sampling,
    from_texts,
    parse_config,
    parse_given,
)
from common.data import load_classification
from common.personas import read_personas
from common.prompts import GENERATIVE_TEMPLATE, ClassificationPrompt

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)  # (language, content)
DIFFS = [content for language, content in BLOCKS if language == "diff"]
INLINE = [code for _, code in re.findall(r"(`+)(.+?)\1", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S), re.S)]
DEMO = "pip install -r requirements.txt && accelerate launch train_cls.py"
TEST = "pip install -r requirements-dev.txt && pytest"
LAUNCHERS = {"num_processes", "config_file", "nproc_per_node"}  # options of accelerate launch and torchrun
INSTALLERS = {"seed"}  # of uv
YAML_LIST = re.search(r"lists as `(.*?)`", README)[1]
CHANGES = ("focal", "upper_half", "brier")  # the worked changes, in the README's order


def commands() -> list[list[str]]:
    """Every command line in the README as words, split at `&&`."""
    bash = "".join(content for language, content in BLOCKS if language == "bash").replace("\\\n", " ")
    starts = ("accelerate ", "python ", "pip ", "torchrun ", "uv ")
    lines = [*bash.splitlines(), *(code for code in INLINE if code.startswith(starts))]
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [line for line in words if line]


def script_options(script: str) -> list[list[str]]:
    """The options that the README's commands give to `script`."""
    return [line[line.index(script) + 1 :] for line in commands() if script in line]


def write_examples(folder: Path) -> None:
    """The README's example files, each in the block, or the inline code, behind its name."""
    for name, content in re.findall(r"`(\w+\.csv)`[^`]*:\n\n```\n(.*?)^```$", README, re.M | re.S):
        (folder / name).write_text(content, encoding="utf-8")
    for name, content in re.findall(r"`(\w+\.jsonl)`[^`]*: `(.*?)`", README):
        (folder / name).write_text(content + "\n", encoding="utf-8")


def test_first_screen_has_the_two_commands():
    """Issue 2: the two commands stand in the first screen, alone, and CI runs the same."""
    screen = "\n".join(README.splitlines()[:30])
    assert re.findall(r"```bash\n(.*?)```", screen, re.S) == [f"{DEMO}\n", f"{TEST}\n"]
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert DEMO in workflow and TEST in workflow
    assert "requirements-dev.txt && pytest" in (ROOT / ".ci" / "run").read_text()
    torch_version = re.search(r"^torch==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert f"torch {torch_version}" in " ".join(screen.split())
    assert len(README.splitlines()) < 450


@pytest.mark.parametrize("line", script_options("train_cls.py"), ids=lambda line: " ".join(line) or "none")
def test_training_commands_are_accepted(line, tmp_path, monkeypatch):
    """Each `train_cls.py` command: its options exist and do not contradict each other; its local data load."""
    if "--help" in line:
        with pytest.raises(SystemExit):
            parse_config(train_cls.Config, line)
        return
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path)
    (tmp_path / "run.yaml").write_text(f"train_file: tickets.csv\ntext_fields: {YAML_LIST}\nlabel_column: queue\n")
    config = parse_config(train_cls.Config, line)
    check_loop(config)
    check_classification(config)
    if config.train_file:  # the examples are too short to be split
        config.validation_fraction = config.test_fraction = 0
    if not config.dataset_name:
        data = load_classification(config)
        assert data.splits["train"] and len(data.labels) > 1
        assert data.multi_label == bool(config.label_columns or config.label_delimiter or config.label_column == "tags")


def test_both_forms_of_several_labels_are_the_same(tmp_path, monkeypatch):
    """A delimited column and a JSON list give the same labels to the same text; a row of zeros has none."""
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path)
    uncut = ["--validation_fraction", "0", "--test_fraction", "0", "--train_file"]

    def load(*options):
        data = load_classification(parse_config(train_cls.Config, [*uncut, *options]))
        return [(row.text, [data.labels[k] for k in row.labels]) for row in data.splits["train"]]

    delimited = load("tags.csv", "--label_column", "tags", "--label_delimiter", ";")
    assert delimited[1] == load("tags.jsonl", "--label_column", "tags")[0]
    assert load("posts.csv", "--label_columns", "sports", "politics", "art")[0] == ("A quiet morning.", [])
    assert load("tickets.csv", "--text_fields", "subject", "body", "--label_column", "queue")[0] == (
        "Cannot log in.", ["access"],
    )  # fmt: skip


def test_other_commands_are_accepted():
    """Each `evaluate.py` and `common.prepare` command names options that exist; each launcher command is one."""
    lines = script_options("evaluate.py")
    assert lines
    for line in lines:
        check_classification(parse_config(evaluate.Config, line))
    for name, *options in (line for line in script_options("common.prepare") if line):
        known = {*signature(prepare.BUILDERS[name]).parameters, "output_dir"}
        assert {option[2:] for option in options if option.startswith("--")} <= known
    builders = re.search(r"`python -m common.prepare` \|.*", README)[0]
    assert re.findall(r"`(\w+)`", builders) == list(prepare.BUILDERS)


@pytest.mark.parametrize("line", script_options("train_sft.py"), ids=lambda line: " ".join(line) or "none")
def test_commands_on_conversations_are_accepted(line):
    """Every `train_sft.py` command names options that exist and fit each other."""
    config = parse_config(train_sft.Config, line)
    check_loop(config)
    check_instructions(config)


@pytest.mark.parametrize("line", script_options("inference.py"), ids=lambda line: " ".join(line) or "none")
def test_commands_that_answer_are_accepted(line):
    """Every `inference.py` command names options that exist and fit each other; its persona exists."""
    given = parse_given(inference.Config, line)
    if "..." in given.values():  # stands for the options of the text around it
        return
    if "instruction" in given:
        given["prompt"] = given.pop("instruction")
    config = from_texts(inference.Config, given)
    check_sampling(config)
    check_answers(config)
    assert config.persona in (None, *read_personas())


@pytest.mark.parametrize("line", script_options("train_clm.py"), ids=lambda line: " ".join(line) or "none")
def test_commands_on_running_text_are_accepted(line):
    """Every `train_clm.py` command names options that exist and fit each other."""
    config = parse_config(train_clm.Config, line)
    check_loop(config)
    check_causal(config)


def test_every_option_exists():
    """An option that the README mentions anywhere is one of a script, a builder or a launcher."""
    known = {
        field.name
        for cls in (train_cls.Config, train_clm.Config, train_sft.Config, evaluate.Config, inference.Config)
        for field in fields(cls)
    }
    known |= set(prepare.OPTIONS) | LAUNCHERS | INSTALLERS | {"config", "help"}
    mentioned = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", README))
    assert mentioned - known == set()
    assert mentioned >= LAUNCHERS | INSTALLERS  # no stale exceptions


def test_every_file_exists():
    """Links, requirement and configuration files in commands, and the layout; planned scripts are still missing."""
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    words = [word for line in commands() for word in line] + INLINE
    ours = r"(configs|common|tests|data|benchmarks)/[\w./]+|requirements[\w-]*\.txt|[A-Z]+\.(md|cff)"
    named = [word for word in words if re.fullmatch(ours, word)]
    layout = next(content for _, content in BLOCKS if content.startswith("train_cls.py"))
    paths = [line.split()[0] for line in layout.splitlines()]
    missing = [path for path in {*links, *named, *paths} if not (ROOT / path).exists()]
    assert not missing
    modules = {f"common/{path.name}" for path in (ROOT / "common").glob("*.py")} - {"common/__init__.py"}
    assert modules <= set(paths)
    (planned,) = re.findall(r"^Planned, and not there yet: (.*)$", README, re.M)
    assert "export" in planned and not (ROOT / "common" / "export.py").exists()
    assert "web page" in planned and "web" not in {field.name for field in fields(inference.Config)}


def test_prompts_are_as_shown():
    """The default template is the code's; the example of another one is accepted."""
    plain = [content.removesuffix("\n") for language, content in BLOCKS if not language]
    assert GENERATIVE_TEMPLATE in plain
    (template,) = [content for content in plain if "{label}" in content and content != GENERATIVE_TEMPLATE]
    prompt = ClassificationPrompt(
        lambda text: list(text.encode()), ["a", "b"], False, template=template, start=[], end=[0], max_length=200
    )
    assert (
        prompt.text_of("It broke.") == "You sort support tickets. Answer with one of: a, b.\nTicket: It broke.\nQueue:"
    )


def test_citation_and_licence():
    """CITATION.cff has what the format requires, the package's version, and the licence that LICENSE is."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
    licence = (ROOT / "LICENSE").read_text()
    assert citation["license"] == "Apache-2.0" and "Apache License\n" in licence and "Version 2.0, January" in licence
    assert "Copyright 2026 The plainlora authors" in licence


# --- the worked changes


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Precision and process state are kept by Accelerate for the whole process; other tests have other ones."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> dict[str, object]:
    """change -> train_cls.py with that change applied, as a module."""
    modules = {}
    for name, diff in zip(CHANGES, DIFFS, strict=True):
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(ROOT / "train_cls.py", folder)
        git = ["git", "-c", "core.autocrlf=false", "apply", "--whitespace=error", "-"]
        subprocess.run(git, input=diff, text=True, cwd=folder, check=True, timeout=60)
        spec = importlib.util.spec_from_file_location(f"train_cls_{name}", folder / "train_cls.py")
        modules[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return modules


def train(module, model: Path, files: dict, folder: Path, monkeypatch, *options: str) -> list[dict]:
    """One pass of a changed script over the toy rows; the lines of metrics.jsonl."""
    common = ["--load_in_4bit", "false", "--mixed_precision", "no", "--num_train_epochs", "1", "--max_length", "128"]
    common += ["--logging_steps", "1", "--baselines", "false", "--model", str(model), "--output_dir", str(folder)]
    monkeypatch.setattr(sys, "argv", ["train_cls.py", *common, *toy_options(files), *options])
    module.main()
    AcceleratorState._reset_state(reset_partial_state=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_worked_changes_are_short():
    """At most ten changed lines each."""
    assert len(DIFFS) == len(CHANGES)
    for diff in DIFFS:
        assert len(re.findall(r"^[+-](?!--|\+\+)", diff, re.M)) <= 10


def test_focal_loss_is_the_papers(changed):
    """(1 - p)^2 x -log p of the right answer, summed with the weights, for both kinds of head."""
    logits, weights = torch.randn(4, 3), torch.tensor([1.0, 2.0, 0.0, 1.0])

    def loss(targets, weights):
        batch = {"inputs": {"pool": None}, "targets": targets, "weights": weights}
        return changed["focal"].loss_of(lambda pool: logits, batch)

    p = logits.softmax(1)[range(4), [0, 2, 1, 1]]
    expected = (-((1 - p) ** 2) * p.log() * weights).sum()
    torch.testing.assert_close(loss(torch.tensor([0, 2, 1, 1]), weights), expected)
    several = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0.0]])
    p = torch.where(several > 0, logits.sigmoid(), (-logits).sigmoid())
    expected = (-((1 - p) ** 2) * p.log() * weights[:, None]).sum()
    torch.testing.assert_close(loss(several, weights[:, None].expand(4, 3)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_focal_loss_trains(family, changed, models, toy_files, tmp_path, monkeypatch):
    """Applied and run: the first update's loss is below cross-entropy's on the same rows and weights."""
    first = [
        train(module, models[family], toy_files, tmp_path / name, monkeypatch, "--approach", "head")[0]["loss"]
        for name, module in (("focal", changed["focal"]), ("plain", train_cls))
    ]
    assert 0 < first[0] < first[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_upper_half_trains(family, changed, models, toy_files, tmp_path, monkeypatch):
    """Applied and run: the adapter of the lower layer stays at its start (B = 0), the upper one's is trained."""
    from safetensors.torch import load_file

    train(changed["upper_half"], models[family], toy_files, tmp_path / "run", monkeypatch)
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    lower, upper = ([v for k, v in weights.items() if f".layers.{i}." in k and "lora_B" in k] for i in (0, 1))
    assert lower and upper
    assert not any(weight.any() for weight in lower) and all(weight.any() for weight in upper)


@pytest.mark.parametrize("family", FAMILIES)
def test_brier_score_is_logged(family, changed, models, toy_files, tmp_path, monkeypatch):
    """Applied and run: validation lines have the score, it chooses the weights, and it fits the predictions.

    The run folder has what the README says a run leaves.
    """
    run = tmp_path / "run"
    lines = train(
        changed["brier"], models[family], toy_files, run, monkeypatch, "--metric_for_best_model", "brier_loss"
    )
    assert [0 <= line["brier_loss"] <= 2 for line in lines if line.get("split") == "validation"] == [True]
    predictions = [json.loads(line) for line in (run / "eval" / "test" / "predictions.jsonl").read_text().splitlines()]
    gold = [F.one_hot(torch.tensor(list(row["probabilities"]).index(row["gold"])), 3) for row in predictions]
    given = [torch.tensor(list(row["probabilities"].values())) for row in predictions]
    expected = sum(((p - g) ** 2).sum() for p, g in zip(given, gold, strict=True)) / len(predictions)
    metrics = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    assert metrics["brier_loss"] == pytest.approx(expected.item(), rel=1e-5)

    listing = next(content for _, content in BLOCKS if content.startswith("config.yaml"))
    named = [line.split()[0].replace("<n>", "*") for line in listing.splitlines()]
    assert len(named) == 10 and [path for path in named if not list(run.glob(path.rstrip("/")))] == []
    evaluation = [line for line in listing.splitlines() if line.startswith("eval/test/")]
    for name in re.findall(r"\w+\.\w+", evaluation[0]):
        assert (run / "eval" / "test" / name).is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_is_evaluated_as_shown(family, models, tmp_path, monkeypatch, capsys):
    """The command for an untrained base model runs, with a tiny model in the place of the hub's."""
    (line,) = [line for line in script_options("evaluate.py") if "--labels" in line]
    line[line.index("--run") + 1] = str(models[family])
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *line, "--load_in_4bit", "false", "--mixed_precision", "no"])
    evaluate.main()
    assert "0 of 2 answers outside the label set" in capsys.readouterr().out
