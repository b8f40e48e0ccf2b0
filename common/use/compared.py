"""`evaluate.py --compare`: finds the runs, and writes how they differ on the same rows.

    RUN_A               a run folder or adapter folder
    RECIPE_B            a folder of several seeds: RECIPE_B/seed_1, RECIPE_B/seed_2, ... of `--seeds 1 2`
    base                the untrained base of the first run, with its prompt, labels and options

Each needs no more than the same rows, so their bases may differ.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.disk import read_json, read_lines, write_json
from common.errors import InputError, printable
from common.log import BAR, is_first_process, set_threads, warn
from common.measure import figures
from common.measure.comparison import Recipe, answers_table, answers_text, comparison_text
from common.measure.comparison import compare as compared_by_rows
from common.measure.metrics import METRICS
from common.options import CHAT, Sampling
from common.use.runs import Run, best_device, open_run

BASE = "base"
PROMPTS = Path(__file__).parents[2] / "data" / "prompts.jsonl"


def runs_to_compare(given: dict[str, Any]) -> dict[str, list[Run]]:
    """Name for people -> the runs behind it, in order. given: the options of the command line.

    Raises InputError for fewer than two, for what is no trained run, and for runs of different tasks.
    """
    names = given["compare"]
    if "run" in given:
        raise InputError("--compare names its runs itself: drop --run.")
    if given.get("fit_decisions"):
        raise InputError("--compare measures, --fit_decisions fits: drop one.")
    if len(set(names)) < len(names):
        raise InputError("--compare names one twice: each is compared with the first.")
    trained = {name: [open_run(path) for path in _seed_folders(name)] for name in names if name != BASE}
    first = next((run for runs in trained.values() for run in runs), None)
    if first is None or len(names) < 2:
        raise InputError("--compare needs two: two runs, or a run and `base`.")
    for run in (run for runs in trained.values() for run in runs):
        if run.folder is None:
            raise InputError(f"--compare: {run.name} is no folder of a run. Name runs, and `base` for their base.")
        if run.task != first.task:
            raise InputError(f"--compare: {run.name} was trained for {run.task}, {first.name} for {first.task}.")
    if BASE in names and first.trained.get("approach") == "head":
        raise InputError(f"--compare: {first.name} has a classification head, which its base lacks. Drop `base`.")
    if given.get("shard_model") and first.task == CHAT:
        raise InputError("--compare: of chats, one process compares answers as well. Drop --shard_model.")
    if Path(given.get("output_dir") or ".").is_file():
        raise InputError(f"--output_dir {given['output_dir']}: this is a file. Choose another folder.")
    short = {name: Path(name).name for name in names}
    unique = len(set(short.values())) == len(names)
    base = replace(first, untrained=True)
    return {short[name] if unique else name: trained.get(name, [base]) for name in names}


def _seed_folders(name: str) -> list[str]:
    """The finished runs in a folder of several seeds, in the order of the seeds; of any other, its name alone."""
    found = {folder: re.fullmatch(r"seed_(\d+)", folder.name) for folder in Path(name).glob("seed_*")}
    seeds = {int(match[1]): folder for folder, match in found.items() if match}
    noted = {seed: read_json(folder / "environment.json") for seed, folder in seeds.items()}
    # A copied adapter has no notes.
    finished = [seeds[seed] for seed in sorted(seeds) if "finished" in noted[seed] or not noted[seed]]
    for folder in set(seeds.values()) - set(finished):
        warn(f"{folder} has not finished, so it is left out, as in the table of the seeds.")
    if seeds and not finished:
        raise InputError(f"--compare: no run in {name} has finished.")
    return [str(folder) for folder in finished] or [name]


def options_of_each(given: dict[str, Any]) -> dict[str, Any]:
    """The options of the command line that hold for each evaluation."""
    return {name: value for name, value in given.items() if name not in ("compare", "output_dir")}


def compare(
    given: dict[str, Any], folders: Mapping[str, Sequence[Path]], runs: Mapping[str, Sequence[tuple[Run, Any]]]
) -> None:
    """Prints the table of the comparison and writes comparison.json, comparison.md and comparison.png.

    given: the options of the command line. folders: name -> its evaluations. runs: name -> its runs, each with the
    options of its evaluation. Done by the first of several processes; the others are not needed any more.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not is_first_process():
        return
    trained = next(name for name, each in runs.items() if each[0][0].weights)
    run, config = runs[trained][0]
    recipes = {
        name: Recipe(folders[name], [run.options.get("seed") for run, _ in each]) for name, each in runs.items()
    }
    result = compared_by_rows(run.task, config.split, recipes)
    home = run.home if len(runs[trained]) == 1 else run.home.parent
    target = Path(given.get("output_dir") or home / "eval" / f"{folders[trained][0].name}-comparison")
    target.mkdir(parents=True, exist_ok=True)
    text, parts = comparison_text(result), []
    if figures.can_draw():
        figures.draw_differences(target / "comparison.png", _drawn(result), result["differences"][0]["from"])
        parts.append("![differences](comparison.png)")
    if run.task == CHAT:
        answers, speeds = _answers({name: each[0] for name, each in runs.items()})
        result |= {"answers": answers, "tokens_per_second": speeds}
        text += f"\n\n{answers_table(answers, speeds)}"
        parts += ["# Answers", answers_text(answers)]
    write_json(target / "comparison.json", result)
    page = printable("\n\n".join(["# Comparison", text, *parts]) + "\n")
    (target / "comparison.md").write_text(page, encoding="utf-8")
    print(printable(f"\n{text}\n\nWritten to {target}"))


def _drawn(result: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    return {
        METRICS[name].title: {
            entry["of"]: [entry[name], *entry["intervals_95"][name]] for entry in result["differences"]
        }
        for name in result["metrics"]
    }


def read_prompts() -> list[dict[str, str]]:
    """The lines of data/prompts.jsonl: category and prompt."""
    return read_lines(PROMPTS)


def _answers(runs: Mapping[str, tuple[Run, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The greedy answer of each to the prompts of data/prompts.jsonl, and its tokens per second.

    runs: name -> the run, of several seeds the first, and its options.
    """
    from accelerate.utils import release_memory

    set_threads(next(iter(runs.values()))[1].num_threads)
    rows: list[dict[str, Any]] = [{**row, "answers": {}} for row in read_prompts()]
    speeds = {}
    for name, (run, config) in runs.items():
        run.resolve(config)
        model = run.load_text_model(config, best_device())
        sampling = Sampling(do_sample=False, max_new_tokens=config.max_new_tokens)
        questions = [model.turns(row["prompt"]) for row in rows]
        bar = tqdm(desc=f"prompts, {name}", total=len(rows), leave=False, **BAR)
        started = time.perf_counter()
        lines = model.answer_rows(questions, sampling, config.per_device_eval_batch_size, bar.update)
        speeds[name] = sum(line.get("tokens", 0) for line in lines) / (time.perf_counter() - started)
        bar.close()
        for row, line in zip(rows, lines, strict=True):
            failed = {"answer": line.get("error"), "tokens": 0, "stopped": False}  # no room for an answer
            row["answers"][name] = failed if "error" in line else {key: line[key] for key in failed}
        del model
        release_memory()
    return rows, speeds
