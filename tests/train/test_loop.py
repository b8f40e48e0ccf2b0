"""One update is one update, however its rows are cut into micro-batches and processes."""

import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from helpers import ROOT
from helpers.models import FAMILIES, build_model
from helpers.rows import toy_options, toy_rows, write_csv
from helpers.runs import FAMILY_APPROACHES, Stopped, log_lines, stop_at, train, weights
from helpers.scripts import run_script

from common.errors import InputError
from common.log import peak_memory, uses_gpu
from common.options import LoopConfig
from common.train import loop

APPROACHES = ("generative", "head")
NF4 = ["--load_in_4bit", "true", "--gradient_checkpointing", "true"]
# 11 rows of unequal length in updates of 4, 4 and 3; labels 6 : 3 : 2, so that balanced weights differ.
UNEVEN = toy_rows(6, ("sport",)) + toy_rows(3, ("science",), start=6) + toy_rows(2, ("music",), start=9)
EQUAL = ["--max_steps", 6, "--class_weights", "balanced", "--validation_fraction", 0, "--test_fraction", 0,
         "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", 2, "--lora_dropout", 0]  # fmt: skip

TWO_PROCESSES = """
import json, os, sys
sys.path[:0] = sys.argv[1:3]
import train_cls
from helpers.runs import timeless, train
from common.train import loop
from common.model import base_model
from common.model import lora

jobs = json.loads(open(sys.argv[3]).read())
census, finite_mean, seen = base_model.census, loop.finite_mean, {}

def keep_model(model):
    seen["model"] = model
    return census(model)

def check_gradients(*args):
    lacking = [name for name, p in seen["model"].named_parameters() if "lora_B" in name and not p.grad.abs().sum() > 0]
    assert not lacking, lacking
    return finite_mean(*args)

base_model.census, loop.finite_mean = keep_model, check_gradients
for options in jobs:
    figures = timeless(train(*options, last=options is jobs[-1]))
    folder = options[options.index("--output_dir") + 1]
    with open(f"{folder}/rank_{os.environ['RANK']}.json", "w") as file:
        json.dump(figures, file)
"""


def options_of(model: Path, file: str, approach: str, batch: int, accumulation: int) -> list:
    sizes = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
    return ["--model", model, "--train_file", file, "--approach", approach, *sizes, *EQUAL]


@pytest.fixture(scope="session")
def wide_models(tmp_path_factory) -> dict[str, Path]:
    """Models whose weights divide into NF4's blocks of 64."""
    base = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    return {family: build_model(base / family, family, **shape) for family in FAMILIES}


@pytest.fixture(scope="module")
def equal_runs(models, wide_models, tmp_path_factory) -> Path:
    """Folder of runs big (padded batches) and small (in this process), and two (2 processes, packs), by family and
    approach.

    Also `resumed`, runs of one process that were stopped after checkpoint 2 of 6 and resumed by two, and NF4 ones.
    """
    folder = tmp_path_factory.mktemp("equal")
    file = str(write_csv(folder / "train.csv", UNEVEN))
    jobs = []
    for family, model in models.items():
        for approach in APPROACHES:
            name = f"{family}_{approach}"
            alone = ["--shared_prefix", "off", "--output_dir", folder / "big" / name]
            train(*options_of(model, file, approach, 4, 1), *alone)
            train(*options_of(model, file, approach, 2, 2), "--output_dir", folder / "small" / name)
            packs = ["--shared_prefix", "on", "--output_dir", folder / "two" / name]
            jobs.append([*options_of(model, file, approach, 2, 1), *packs])
    for family, approach in FAMILY_APPROACHES:
        run = folder / "resumed" / family
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            from common.train import loop

            stop_at(patch, loop, "finite_mean", 4)
            train(*options_of(models[family], file, approach, 4, 1), "--output_dir", run)
        resume = ["--resume_from_checkpoint", "latest", "--output_dir", run]
        jobs.append([*options_of(models[family], file, approach, 2, 1), *resume])
        nf4 = ["--max_steps", 1, *NF4, "--output_dir", folder / "nf4" / family]
        jobs.append([*options_of(wide_models[family], file, approach, 2, 1), *nf4])
    script, list_file = folder / "two.py", folder / "jobs.json"
    script.write_text(TWO_PROCESSES)
    list_file.write_text(json.dumps(jobs, default=str))
    run_script(str(script), str(ROOT), str(ROOT / "tests"), str(list_file), processes=2)
    return folder


def close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-5 * abs(one)


@pytest.mark.parametrize("approach", APPROACHES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", ["small", "two"])
def test_accumulation_and_processes_change_nothing(equal_runs, cut, family, approach):
    """(4, 1, 1 process) == (2, 2, 1) == (2, 1, 2), unequal lengths, last update of 3 rows.

    The first without packs, the last with: they are the same training.
    """
    one, other = equal_runs / "big" / f"{family}_{approach}", equal_runs / cut / f"{family}_{approach}"
    lines, others = log_lines(one), log_lines(other)
    assert len(lines) == 6 and lines[0]["grad_norm"] > 0
    for line, same in zip(lines, others, strict=True):
        assert close(line["loss"], same["loss"]) and close(line["grad_norm"], same["grad_norm"]), (line, same)
    before, after = weights(one / "adapter"), weights(other / "adapter")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor - after[name]).norm() <= 1e-5 * tensor.norm(), name


@pytest.mark.parametrize("cut", ["small", "two"])
def test_learning_rate_does_not_depend_on_processes(equal_runs, cut):
    """A prepared scheduler would be through after half of the updates."""
    rates = [line["learning_rate"] for line in log_lines(equal_runs / "big" / "llama_head")]
    assert rates == [line["learning_rate"] for line in log_lines(equal_runs / cut / "llama_head")]
    assert rates[0] == 1e-3 and 0 < rates[-1] < 2e-4


@pytest.mark.parametrize("name", [*get_args(get_type_hints(LoopConfig)["lr_scheduler_type"])])
@pytest.mark.parametrize(("updates", "ratio", "warmup"), [(8, 0.25, 2), (8, 0.0, 0), (1, 0.1, 1)])
def test_no_update_is_made_at_a_rate_of_zero(name, updates, ratio, warmup):
    """The warm-up rises from a share of the peak to the peak, which its last update has; then nothing rises."""
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0.5)
    config = LoopConfig(learning_rate=0.5, lr_scheduler_type=name, warmup_ratio=ratio)
    scheduler = loop.make_scheduler(optimizer, config, updates)
    rates = []
    for _ in range(updates):
        rates.append(loop.learning_rates(scheduler)["learning_rate"])
        optimizer.step()
        scheduler.step()
    if name == "constant":
        warmup = 0
    assert rates[:warmup] == pytest.approx([0.5 * i / warmup for i in range(1, warmup + 1)])
    after = [0.5, *rates[warmup:]] if warmup else [*rates]
    assert after[0] == 0.5 and all(a >= b > 0 for a, b in zip(after, after[1:], strict=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_processes_report_the_same_figures(equal_runs, family):
    """Figures are sums over all ranks; and those of one process."""
    run = equal_runs / "two" / f"{family}_head"
    first, second = (json.loads((run / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert first == second and first["epochs"] == 2
    (single,) = log_lines(equal_runs / "big" / f"{family}_head", "train_loss")
    assert close(single["train_loss"], first["train_loss"]) and single["total_flos"] == first["total_flos"]


@pytest.mark.parametrize(("family", "approach"), FAMILY_APPROACHES)
def test_two_processes_resume_a_run_of_one(equal_runs, family, approach):
    """The plan needs no sampler state, so only the rows per update must stay."""
    lines = log_lines(equal_runs / "big" / f"{family}_{approach}")
    resumed = log_lines(equal_runs / "resumed" / family)
    assert [line["update"] for line in resumed] == [1, 2, 3, 4, 5, 6]
    for line, same in zip(lines, resumed, strict=True):
        assert close(line["loss"], same["loss"]) and close(line["grad_norm"], same["grad_norm"]), (line, same)


def all_lora_b(model) -> dict:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_B" in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_the_adapter_learns_in_two_processes(equal_runs, family):
    """Under DDP: every job, NF4 with checkpointing among them, checked the gradient of every lora_B."""
    assert len(log_lines(equal_runs / "nf4" / family)) == 1


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("nf4", ["true", "false"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_the_adapter_learns(wide_models, toy_files, tmp_path, monkeypatch, family, nf4, checkpointing):
    """Frozen embeddings and checkpointing can cut the graph, so that lora_B gets no gradient."""
    from common.model import base_model
    from common.train import loop

    census, finite_mean, models, norms = base_model.census, loop.finite_mean, [], {}

    def keep_model(model):
        models.append(model)
        return census(model)

    def keep_gradients(*args):
        norms.update({name: float(weight.grad.norm()) for name, weight in all_lora_b(models[0]).items()})
        return finite_mean(*args)

    monkeypatch.setattr(base_model, "census", keep_model)
    monkeypatch.setattr(loop, "finite_mean", keep_gradients)
    options = ["--load_in_4bit", nf4, "--gradient_checkpointing", checkpointing, "--max_steps", 1, "--eval_strategy"]
    data = ["--train_file", toy_files["train"], "--validation_fraction", 0, "--test_fraction", 0]
    train("--model", wide_models[family], *options, "no", *data, "--output_dir", tmp_path)
    assert len(norms) == 14 and all(norm > 0 for norm in norms.values()), norms
    layers = {type(module).__name__ for module in models[0].modules()}
    assert ("Linear4bit" in layers) == (nf4 == "true")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation_does_not_change_nf4_gradients(wide_models, family):
    """bitsandbytes repacks weights in eval mode on CPUs with AVX512-BF16; no gradient gets through them after that."""
    import torch

    from common.model import base_model, lora
    from common.options import parse_config
    from train_cls import Config

    config = parse_config(Config, ["--model", str(wide_models[family]), "--mixed_precision", "bf16"])
    base_model.resolve_options(config, encoder=False)
    torch.manual_seed(0)
    model, missing = base_model.load_base(config.model, config, device="cpu")
    model = lora.add_lora(model, config, missing, head=False)
    ids = torch.arange(5, 45).view(4, 10)

    def gradients():
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        found = {name: weight.grad.clone() for name, weight in all_lora_b(model).items()}
        model.zero_grad()
        return found

    before = gradients()
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids)
    after = gradients()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("family", "approach"), FAMILY_APPROACHES)
def test_dtypes_and_reloaded_answers(wide_models, toy_files, tmp_path, family, approach):
    """Base bf16, LoRA and head fp32 in training and on disk; the reloaded adapter answers the same."""
    import torch
    from accelerate import Accelerator

    from common.data.classification import load_classification
    from common.measure.scoring import predict
    from common.model import storage
    from common.options import parse_config
    from train_cls import Config

    options = ["--model", wide_models[family], "--approach", approach, "--mixed_precision", "bf16", "--max_steps", 4]
    train(*options, *toy_options(toy_files), "--learning_rate", 1e-2, "--output_dir", tmp_path)
    groups = json.loads((tmp_path / "environment.json").read_text())["census"]["groups"]
    wanted = {"base": "bfloat16", "LoRA": "float32", "trained in full": "float32"}
    assert [(entry["group"], entry["dtype"]) for entry in groups] == sorted(wanted.items())[: 2 + (approach == "head")]
    assert {tensor.dtype for tensor in weights(tmp_path / "adapter").values()} == {torch.float32}

    config = parse_config(
        Config, list(map(str, ["--test_file", toy_files["test"], "--train_file", toy_files["train"]]))
    )
    test = load_classification(config).splits["test"]
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    answers = predict(storage.load_classifier(tmp_path / "adapter"), test, accelerator, 16, "test")
    lines = [json.loads(line) for line in (tmp_path / "eval/test/predictions.jsonl").read_text().splitlines()]
    for answer, line in zip(answers, lines, strict=True):
        assert answer.probabilities == pytest.approx(list(line["probabilities"].values()), abs=1e-3)


@pytest.mark.parametrize(("family", "approach"), FAMILY_APPROACHES)
def test_balanced_weights_raise_minority_recall(models, tmp_path, family, approach):
    """9 : 1 rows, all of the rare label among texts that have the other one two times in three."""
    rows = [
        {"text": "melody violin" if i > 11 else "tempo team", "label": "atom" if i % 3 == 1 and i < 12 else "goal"}
        for i in range(40)
    ]
    file = write_csv(tmp_path / "rows.csv", rows)
    options = ["--model", models[family], "--approach", approach, "--train_file", file, "--test_file", file,
               "--validation_fraction", 0, "--eval_strategy", "no", "--save_strategy", "no", "--learning_rate", 1e-2,
               "--num_train_epochs", 10]  # fmt: skip
    plain = train(*options, "--output_dir", tmp_path / "plain")
    balanced = train(*options, "--class_weights", "balanced", "--output_dir", tmp_path / "balanced")
    assert plain["per_label"]["atom"]["recall"] == 0
    assert balanced["per_label"]["atom"]["recall"] == 1
    assert balanced["per_label"]["goal"]["recall"] > 0.7  # not just everything the other way round


@pytest.mark.parametrize(("family", "approach"), FAMILY_APPROACHES)
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_non_finite_update_stops_the_run(models, toy_files, tmp_path, monkeypatch, family, approach, broken):
    """The message names the update's rows; neither a weight nor a checkpoint got anything of it."""
    import train_cls

    real, calls = train_cls.loss_of, []

    def loss_of(model, batch):
        loss = real(model, batch)
        calls.append(loss)
        if len(calls) < 3:
            return loss
        return loss * float("inf") if broken == "loss" else loss + loss.detach().sub(loss).sqrt()  # slope of 0 ** 0.5

    monkeypatch.setattr(train_cls, "loss_of", loss_of)
    options = ["--model", models[family], "--approach", approach, *toy_options(toy_files), "--output_dir", tmp_path]
    with pytest.raises(FloatingPointError, match="Update 3 has") as error:
        train(*options, "--save_strategy", "steps", "--save_steps", 1)
    named = str(error.value).partition("rows: ")[2].partition(".")[0].split(", ")
    assert len(set(named)) == 8 and {int(row) for row in named} <= set(range(42))
    assert [line["update"] for line in log_lines(tmp_path)] == [1, 2]
    assert not (tmp_path / "checkpoints" / "step_3").exists()


@pytest.mark.parametrize(("family", "approach"), FAMILY_APPROACHES)
def test_an_update_without_targets_stops_the_run(models, toy_files, tmp_path, monkeypatch, family, approach):
    """Its loss is 0 / 0, and would look like success if it were called 0."""
    import train_cls
    from common.errors import InputError

    monkeypatch.setattr(train_cls, "class_weights", lambda *_: [0.0, 0.0, 0.0])
    options = ["--model", models[family], "--approach", approach, *toy_options(toy_files), "--output_dir", tmp_path]
    with pytest.raises(InputError, match=r"Update 1 has no target to learn from \(rows \d+, "):
        train(*options)


def test_the_loop_stands_between_its_marks():
    """The scripts to come hold the same text there, and a test compares them."""
    lines = (ROOT / "train_cls.py").read_text().splitlines()
    assert lines.count("    # --- loop") == lines.count("    # --- end loop") == 1
    assert lines.index("    # --- loop") < lines.index("    # --- end loop")


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_engines_that_shard_are_refused(engine, monkeypatch):
    """On a CPU, Accelerate would train without it and say nothing."""
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(InputError, match="not supported here.*multi_gpu.yaml"):
        loop.start_accelerator(None)


def test_a_launcher_may_keep_a_run_off_the_gpu(monkeypatch):
    """configs/accelerate/cpu.yaml: neither precision nor memory are the GPU's then."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert uses_gpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not uses_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert peak_memory() > 0
    with pytest.raises(InputError, match="fp16 .* needs a GPU"):
        loop.start_accelerator(LoopConfig(mixed_precision="fp16"))
