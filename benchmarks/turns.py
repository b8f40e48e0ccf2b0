"""What benchmarks beside others share: measurements in fresh processes, taken in turns; a table and a picture."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RESULT = "RESULT "


def use_device(device: str) -> None:
    """Hides the GPUs from what is started for a CPU: our scripts, and transformers' pipelines, would take one."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def start(name: str, **environment: Any) -> dict[str, Any]:
    """What this script hands over (`hand_over`) when it is started again with `--worker name`."""
    settings = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    settings |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    settings |= {key: str(value) for key, value in environment.items()}
    command = [sys.executable, *sys.argv, "--worker", name]
    done = subprocess.run(command, capture_output=True, text=True, env=settings)
    results = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not results:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(results[0].removeprefix(RESULT))


def hand_over(result: dict[str, Any]) -> None:
    """From a worker to `start`."""
    print(RESULT + json.dumps(result))


def in_turns(environments: dict[str, dict[str, Any]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """All results by name; in every round each name is measured once, so that a busy machine slows all alike."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in environments}
    for number in range(rounds):
        for name, environment in environments.items():
            results[name].append(start(name, **environment))
            shown = {key: value for key, value in results[name][-1].items() if not isinstance(value, list | dict)}
            print(f"round {number + 1}, {name}: {shown}", flush=True)
    return results


@contextlib.contextmanager
def as_others(model: Any) -> Iterator[None]:
    """Inside the block the model computes as it does for others: transformers' own layers, PEFT's casts."""
    from peft.tuners.lora import LoraLayer

    from common.model import attention

    adapted, own = [m for m in model.modules() if isinstance(m, LoraLayer)], model.config._attn_implementation

    def switch(casts: bool, name: str) -> None:
        for module in adapted:
            module.cast_input_dtype_enabled = casts
        if own in (attention.NAME, attention.ALONE):
            model.set_attn_implementation(name)

    switch(True, "sdpa")
    try:
        yield
    finally:
        switch(False, own)


def bars(names: Sequence[str], values: Sequence[float], label: str) -> Any:
    """A figure with one bar a name, the first on top."""
    from common.measure.figures import pyplot

    figure, axes = pyplot().subplots(figsize=(7, 3))
    axes.barh(names[::-1], values[::-1])
    axes.set_xlabel(label)
    figure.tight_layout()
    return figure


def write(
    config: Any, name: str, header: Sequence[str], rows: Sequence[Sequence[str]], table: Any, figure: Any
) -> None:
    """Table as Markdown, figures with options and environment as JSON, and the picture, in config.output_dir."""
    from common.data.report import table as markdown
    from common.log import describe_environment

    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(header, rows)
    content = {"environment": describe_environment(1), "options": vars(config), "table": table}
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=150)
    print(text)
