"""--shard_model true: the same run as with the whole base in one process, of which each of two holds half."""

import json
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.models import build_model
from helpers.rows import toy_options
from helpers.runs import assert_same_bits, assert_same_updates, run_evaluate, train, train_chat, train_text
from helpers.scripts import run_script
from helpers.texts import prose

from common.errors import InputError

# Name -> bytes in fp32 that each process holds whole: a vocabulary head of 600 tokens, which may be the embeddings too,
# and the last norm; of a classification head, the untrained copy that PEFT keeps, and the norm.
WHOLE = {"generative": 601 * 32 * 4, "head": 4 * 32 * 4, "text": 601 * 32 * 4, "chat": 601 * 32 * 4,
         "nf4": 601 * 64 * 4}  # fmt: skip
TWO_PROCESSES = """
import json, os, sys
sys.path[:0] = sys.argv[1:3]
import pytest
from torch.distributed.tensor import DTensor
from helpers import runs
from common.measure import scoring
from common.train import loop

jobs = json.loads(open(sys.argv[3]).read())
prepare, finite_mean, seen = loop.prepare, loop.finite_mean, {}

def keep_model(accelerator, module, *args):
    seen["base"] = sum(p.nbytes for p in module.parameters() if not p.requires_grad)
    seen["model"] = module
    return prepare(accelerator, module, *args)

def count_bytes(*args):  # after the backward pass
    frozen = [p for p in seen["model"].parameters() if not p.requires_grad]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in frozen]
    seen["here"] = sum(p.untyped_storage().nbytes() for p in local)
    seen["layers"] = sum(p.nbytes for p in frozen if isinstance(p, DTensor))
    return finite_mean(*args)

loop.prepare, loop.finite_mean = keep_model, count_bytes
scoring.ROWS_AT_ONCE = 1  # with --per_device_eval_batch_size 1, two processes with 8 and 7 rows make unequal passes
for name, script, options, stopped in jobs:
    folder = options[options.index("--output_dir") + 1]
    train = getattr(runs, script)
    if stopped:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(runs.Stopped):
            runs.stop_at(patch, loop, "finite_mean", stopped)
            train(*options)
        options += ["--resume_from_checkpoint", "latest"]
    train(*options, last=name == jobs[-1][0])
    with open(f"{folder}/bytes_{os.environ['RANK']}.json", "w") as file:
        json.dump({k: v for k, v in seen.items() if k != "model"}, file)
"""


@pytest.fixture(scope="module")
def runs(models, chat_files, toy_files, tmp_path_factory) -> Path:
    """Folder of runs of one process (one/) and of two that share the base out (two/), by task."""
    folder = tmp_path_factory.mktemp("sharded")
    wide = build_model(folder / "wide", "llama", hidden_size=64, head_dim=16, intermediate_size=128)
    texts = []
    for seed, name in enumerate(("train", "validation", "test")):
        (folder / f"{name}.txt").write_text(prose(9, seed), encoding="utf-8")
        texts += [f"--{name}_file", folder / f"{name}.txt"]
    save = ["--save_strategy", "steps", "--save_steps", 2]
    evaluate = ["--baselines", "true", "--per_device_eval_batch_size", 1]
    toy = toy_options(toy_files)
    given = {
        "generative": (train, ["--model", models["llama"], *toy, *evaluate[2:]]),
        "head": (train, ["--model", models["gemma"], "--approach", "head", *toy, *evaluate]),
        "text": (train_text, ["--model", models["qwen"], *texts, *save]),
        "chat": (train_chat, ["--model", models["mistral"], *chat_files, *evaluate]),
        "nf4": (train, ["--model", wide, *toy, "--load_in_4bit", "true", "--gradient_checkpointing", "true",
                        "--validation_fraction", 0, "--eval_strategy", "no"]),
    }
    jobs = []
    for name, (script, options) in given.items():
        options = [*options, "--max_steps", 6, "--per_device_train_batch_size"]
        script(*options, 4, "--output_dir", folder / "one" / name)
        sharded = [*map(str, options), "2", "--shard_model", "true", "--output_dir", str(folder / "two" / name)]
        jobs.append((name, script.__name__, sharded, 0))
        if name == "text":
            jobs.append(("resumed", script.__name__, [*sharded[:-1], str(folder / "two" / "resumed")], 4))
    (folder / "two.py").write_text(TWO_PROCESSES)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = [folder / "two.py", ROOT, ROOT / "tests", folder / "jobs.json"]
    print(run_script(*map(str, script), processes=2, timeout=180).stdout)
    return folder


@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_with_a_shared_base_train_what_one_does(runs, name):
    """In losses, gradient norms, weights, and in what is measured of them and of the untrained base."""
    one, two = runs / "one" / name, runs / "two" / name
    assert_same_updates(one, two)
    for file in ("metrics.json", "baselines.json"):
        if (one / "eval/test" / file).exists():
            first, second = (json.loads((run / "eval/test" / file).read_text()) for run in (one, two))
            for known, found in zip(*(_measured(values) for values in (first, second)), strict=True):
                assert found == pytest.approx(known, rel=1e-4)


def _measured(values: dict) -> list[float]:
    if "eval_loss" in values:
        return [values[name] for name in ("eval_loss", "perplexity", "accuracy") if name in values]
    return [part for value in values.values() if isinstance(value, dict) for part in _measured(value)]


@pytest.mark.parametrize("name", WHOLE)
def test_each_process_holds_half_of_the_layers(runs, name):
    """Counted after a backward pass."""
    for rank in (0, 1):
        held = json.loads((runs / "two" / name / f"bytes_{rank}.json").read_text())
        assert held["base"] - held["layers"] == WHOLE[name] and held["layers"] > 16_000
        assert held["here"] == held["layers"] / 2 + WHOLE[name]


def test_a_sharded_run_is_resumed(runs):
    """Stopped in update 4, and continued after update 2: the same bits as without a stop."""
    assert_same_bits(runs / "two" / "text", runs / "two" / "resumed")


@pytest.mark.parametrize("name", ["generative", "head", "text"])
def test_what_was_saved_is_used_by_one_process(runs, name):
    """evaluate.py finds the figures that the sharded run has measured."""
    run = runs / "two" / name
    before = json.loads((run / "eval/test/metrics.json").read_text())
    run_evaluate("--run", run, "--output_dir", runs / "again" / name)
    after = json.loads((runs / "again" / name / "metrics.json").read_text())
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([], "needs several processes"),
        (["--full_finetuning", "true"], "drop --full_finetuning"),
        (["--load_in_8bit", "true", "--load_in_4bit", "false"], "drop --full_finetuning and --load_in_8bit"),
        (["--torch_compile", "true"], "exclude each other"),
    ],
)
def test_what_cannot_be_sharded_is_refused(models, toy_files, tmp_path, given, why):
    """Before the model is loaded."""
    with pytest.raises(InputError, match=why):
        train("--model", models["llama"], *toy_options(toy_files), "--shard_model", "true", *given,
              "--output_dir", tmp_path / "run")  # fmt: skip
