"""Kills runs at random moments, resumes them, and compares what they end with, byte by byte, on the CPU.

    python benchmarks/kill_resume.py --kills 30

Each training script runs once whole, on a tiny random model. Then runs are killed (SIGKILL) two times each: the first
time at a moment drawn over the length of a run, every part of it in turn, the second time while they are resumed; then
they are resumed to their end. Moments are counted in CPU seconds, as others may use the machine, and runs are forked
from a process that has imported torch, so that a moment is never in an import (Linux). The trained weights, metrics,
predictions and baselines must be those of the whole run; only times and memory may differ. A run that is killed before
it has a run folder is started again by the same command.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.data.report import table  # noqa: E402
from common.disk import read_json, read_lines  # noqa: E402
from common.errors import cli_errors  # noqa: E402

TEXT = Path(__file__).parents[1] / "README.md"
RESUME = ["--resume_from_checkpoint", "latest"]
KILLS_OF_A_RUN = 2
UPDATES = 12
PHASES = ("before a checkpoint", "in training", "after it")  # where a run is killed
# Validation and checkpoints at other updates, so that a checkpoint is neither always the best one nor never.
COMMON = ["--load_in_4bit", "false", "--mixed_precision", "no", "--num_threads", "1", "--report_to", "none",
          "--lora_dropout", "0.1", "--learning_rate", "1e-3", "--logging_steps", "1", "--metric_for_best_model",
          "eval_loss", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
          "--max_steps", str(UPDATES), "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy",
          "steps", "--save_steps", "3", "--max_eval_samples", "8", "--max_baseline_samples", "8"]  # fmt: skip
TASKS = {  # script -> its options; data are the demos, and the README as running text
    "train_cls": ["--max_train_samples", "48", "--validation_fraction", "0.05", "--test_fraction", "0.05"],
    "train_sft": ["--max_train_samples", "48", "--chat_template", "plain"],
    "train_clm": ["--block_size", "64"],
}  # fmt: skip
OWN = ("runtime", "per_second", "peak_memory", "source", "weights", "seconds")  # of a run: times, memory, its folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=30, help="of all scripts together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output_dir", type=Path, help="where runs and their output stay, else nowhere")
    options = parser.parse_args()
    from common.measure import baselines  # noqa: F401  imports torch, peft and the like, once for all runs

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.output_dir or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        model = tiny_model(folder / "model")
        shutil.copy(TEXT, folder / "text.txt")
        TASKS["train_clm"] += ["--train_file", str(folder / "text.txt")]
        kills = -(-options.kills // len(TASKS))
        rows = [tried(script, model, kills, random.Random(options.seed), folder / script) for script in TASKS]
    print("\n" + table(list(rows[0]), [list(map(str, row.values())) for row in rows]))
    sys.exit(any(row["runs"] != row["equal to the whole run"] for row in rows))


def tiny_model(folder: Path) -> str:
    """The folder of a random Llama with two layers and a small tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    shape = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT.read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)
    return str(folder)


def tried(script: str, model: str, kills: int, draw: random.Random, folder: Path) -> dict[str, Any]:
    """A row of the table: where the script's runs were killed, and how many ended as the whole one did."""
    module = __import__(script)
    folder.mkdir(exist_ok=True)
    options = ["--model", model, *COMMON, *TASKS[script]]

    def ends(run: Path, after: float | None = None) -> bool:
        """Starts or resumes a run; whether it came to its end. after: CPU seconds until it is killed."""
        given = [*options, *(RESUME if (run / "config.yaml").exists() else []), "--output_dir", str(run)]
        with open(run.with_suffix(".txt"), "ab") as output:
            return forked(partial(called, module, given), output.fileno(), after)

    ends(folder / "warm_up")  # what a first run alone does is no part of the length
    before, whole = cpu_seconds(), folder / "whole"
    if not ends(whole):
        raise RuntimeError(f"{script} failed:\n{whole.with_suffix('.txt').read_text()[-3000:]}")
    seconds, expected = cpu_seconds() - before, results(whole)
    parts = -(-kills // KILLS_OF_A_RUN)
    where, runs, equal = dict.fromkeys(PHASES, 0), 0, 0
    while sum(where.values()) < kills:
        run, left = folder / f"run_{runs}", seconds
        for again in range(min(KILLS_OF_A_RUN, kills - sum(where.values()))):
            moment = draw.uniform(0, left) if again else seconds * (runs % parts + draw.random()) / parts
            if ends(run, moment):
                break
            where[phase(run)] += 1
            left -= moment
        finished = "finished" in read_json(run / "environment.json") or ends(run)
        found = results(run) if finished else {}
        different = [name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]
        if different:
            reason = f"differs in {', '.join(sorted(different))}" if finished else "was not resumed"
            print(f"{run} {reason}:\n{run.with_suffix('.txt').read_text()[-1500:]}", file=sys.stderr)
        runs, equal = runs + 1, equal + (not different)
        print(f"{script}: {sum(where.values())} of {kills} kills, {equal} of {runs} runs equal", flush=True)
    return {"script": script, "CPU s of a run": f"{seconds:.1f}", "kills": kills, **where, "runs": runs,
            "equal to the whole run": equal}  # fmt: skip


def called(module: ModuleType, given: list[str]) -> None:
    """What `python SCRIPT GIVEN` does."""
    sys.argv = [f"{module.__name__}.py", *given]
    with cli_errors():
        module.main()


def forked(work: Callable[[], None], output: int, after: float | None) -> bool:
    """Whether `work` came to its end in a process of its own, which prints to `output`.

    after: CPU seconds until it is killed.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            os.dup2(output, 1)
            os.dup2(output, 2)
            work()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    statistics = Path(f"/proc/{child}/stat")
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        if after is not None:
            user, system = statistics.read_text().rpartition(")")[2].split()[11:13]
            if (int(user) + int(system)) / os.sysconf("SC_CLK_TCK") >= after:
                os.kill(child, signal.SIGKILL)
                after = None
        time.sleep(0.002)


def cpu_seconds() -> float:
    """Of all processes so far that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def phase(run: Path) -> str:
    """Where a run was killed."""
    steps = [int(path.parent.name[5:]) for path in run.glob("checkpoints/step_*/state.json")]
    return PHASES[0] if not steps else PHASES[1] if max(steps) < UPDATES else PHASES[2]


def results(run: Path) -> dict[str, Any]:
    """name -> what a run ended with: whole files, and JSON without what is the run's own."""
    found: dict[str, Any] = {}
    for path in sorted(run.glob("adapter/*.safetensors")) + sorted(run.glob("eval/test/*")):
        if path.suffix in (".safetensors", ".csv", ".jsonl"):
            found[str(path.relative_to(run))] = path.read_bytes()
    for name in ("adapter/task.json", "eval/test/metrics.json", "eval/test/baselines.json"):
        if (run / name).exists():
            found[name] = timeless(read_json(run / name))
    found["metrics.jsonl"] = timeless(read_lines(run / "metrics.jsonl"))
    return found


def timeless(value: Any) -> Any:
    """JSON without times, memory and the names of a run's own files."""
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if not any(part in name for part in OWN)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
