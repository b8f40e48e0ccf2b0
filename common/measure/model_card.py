"""The end of a model card, written when the test figures are there: results, training and limits of a run."""

from pathlib import Path
from typing import Any

from common.data.report import markdown
from common.disk import load_task, read_json, weights_folder
from common.errors import printable
from common.measure.metrics import headlines
from common.measure.report import results_table
from common.options import CAUSAL_LM, CHAT, CLASSIFICATION, TrainingConfig, read_saved

RESULTS = "\n## Results\n"
LIMITS = {
    CLASSIFICATION: "It answers every text with its labels, however little the text has to do with them.",
    CAUSAL_LM: "It continues a text and answers nothing; what it writes may be untrue.",
    CHAT: "What it answers may be untrue, and is not filtered.",
}


def complete_card(run: Path) -> None:
    """Adds to the model card of a run what was measured, from the files of its folder; names no path of this machine.

    An earlier end is replaced.
    """
    folder = weights_folder(run)
    file, task = folder / "README.md", load_task(folder)
    config = TrainingConfig(**read_saved(run))
    metrics = read_json(run / "eval" / "test" / "metrics.json")
    facts = read_json(run / "environment.json")
    text = file.read_text(encoding="utf-8").partition(RESULTS)[0]
    file.write_text(printable(text + RESULTS + _results(run, task["task"], metrics)
                              + _training(config, metrics, facts, read_json(run / "data_report.json"))
                              + _limits(task["task"], config)), encoding="utf-8")  # fmt: skip


def _results(run: Path, task: str, metrics: dict[str, Any]) -> str:
    if not metrics:
        return "\nNot measured: the run had no test rows.\n"
    unit = {CAUSAL_LM: "blocks", CHAT: "conversations"}.get(task, "rows")
    count = metrics.get("units" if task == CHAT else "rows")  # a long conversation has several rows
    rows = f"{count} test {unit}" if count else f"test {unit}"
    source = markdown(Path(metrics.get("source", {}).get("name", "")).name)
    results = {"this model": metrics, **read_json(run / "eval" / "test" / "baselines.json")}
    shown = results_table(results, "test", headlines(task))
    return f"\nOn the {rows} of {source}, with 95 % intervals:\n\n{shown}\n"


def _training(config: TrainingConfig, metrics: dict[str, Any], facts: dict[str, Any], report: dict[str, Any]) -> str:
    names = ", ".join(markdown(Path(source["name"]).name) for source in report.get("files", {}).values())
    counts = report.get("rows", {}).items()
    rows = ", ".join(f"{count['used']} {split}" for split, count in counts if "used" in count)
    done = [f"{metrics['epochs']:.3g} passes"] if "epochs" in metrics else []
    done += [f"learning rate {config.learning_rate:g}, seed {config.seed}"]
    done += [f"{metrics['train_runtime']:.0f} s of updates"] if "train_runtime" in metrics else []
    memory = metrics.get("train_peak_memory_bytes")
    done += [f"{memory / 1e9:.1f} GB of memory at most"] if memory else []
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    return (
        f"\n## Training\n\n- Data: {names}{f' ({rows} rows)' if rows else ''}\n- {'; '.join(done)}\n"
        f"- On {facts.get('gpu') or facts.get('processor')}, {facts.get('processes', 1)} process(es); {versions}\n"
    )


def _limits(task: str, config: TrainingConfig) -> str:
    length = f"- Texts are cut to fit {config.max_length} tokens.\n" if task == CLASSIFICATION else ""
    said = f"- {LIMITS[task]}\n" if task in LIMITS else ""
    return (
        f"\n## Limits\n\n{said}{length}- The figures are those of the test rows. Measure it again on data of another "
        "origin.\n- The license of the base model applies to it.\n"
    )
