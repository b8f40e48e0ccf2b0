"""Runs of train_cls.py that several test files look at: each is trained once a session, and never changed."""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import FAMILIES, WORDS, toy_options, toy_rows, write_csv
from runs import PLAIN

COMBINATIONS = [(approach, kind) for approach in ("generative", "head") for kind in ("single", "multi")]
# Every combination for every family; one of each also with what is the default on most machines, and with pictures.
QUANTISED = ("--load_in_4bit", "true", "--mixed_precision", "bf16")
RUNS = [(family, *combination, ()) for family in FAMILIES for combination in COMBINATIONS]
RUNS += [(family, *combination, QUANTISED) for family, combination in zip(FAMILIES, COMBINATIONS, strict=True)]
_done: dict[tuple, Path] = {}


def name_of(run: tuple) -> str:
    """A test id."""
    return "-".join(run[:3]) + "-nf4" * bool(run[3])


@contextlib.contextmanager
def quick(draw: bool = False) -> Iterator[None]:
    """A script inside this process: without pictures, a long search for garbage, and the last one's precision."""
    from accelerate.state import AcceleratorState, GradientState

    from common import report

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.freeze()
    with mock.patch.object(report, "can_draw", report.can_draw if draw else lambda: False):
        yield


def train(*options: Any, draw: bool = False) -> dict[str, Any]:
    """What `python train_cls.py OPTIONS` does for one seed; the figures it returns."""
    import train_cls
    from common.config import check_classification, check_loop, parse_config
    from common.data import load_classification

    config = parse_config(train_cls.Config, [*PLAIN, *map(str, options)])
    check_loop(config)
    check_classification(config)
    with quick(draw):
        return train_cls.train(config, load_classification(config), config.model)


def run_evaluate(*options: Any, draw: bool = False) -> None:
    """What `python evaluate.py OPTIONS` does."""
    import evaluate

    with quick(draw), mock.patch.object(sys, "argv", ["evaluate.py", *map(str, options)]):
        evaluate.main()


def multi_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Rows with any number of the three labels, none and all among them."""
    rows = []
    for i in range(start, start + count):
        chosen = [name for bit, name in enumerate(WORDS) if (i * 5 + 3) % 8 >> bit & 1]
        text = " ".join(word for name in chosen for word in WORDS[name].split()[i % 4 : i % 4 + 2])
        rows.append({"text": f"{text} number {i}", **{name: str(int(name in chosen)) for name in WORDS}})
    return rows


def task_options(kind: str, base: Path) -> list[str]:
    """Data options of the toy task with one label a row, or several."""
    rows = {"train": toy_rows(8), "validation": toy_rows(2, start=20), "test": toy_rows(5, start=30)}
    if kind == "multi":
        rows = {"train": multi_rows(24), "validation": multi_rows(8, 40), "test": multi_rows(13, 60)}
    base.mkdir(parents=True, exist_ok=True)
    files = {split: str(write_csv(base / f"{split}.csv", content)) for split, content in rows.items()}
    return toy_options(files) + (["--label_columns", *WORDS] if kind == "multi" else [])


@pytest.fixture(scope="session")
def trained(models, tmp_path_factory) -> Callable[..., Path]:
    """(family, approach, kind, *options) -> run folder of a few updates."""

    def make(family: str, approach: str, kind: str, *options: str) -> Path:
        key = (family, approach, kind, *options)
        if key not in _done:
            base = tmp_path_factory.mktemp("drawn" if options == QUANTISED else "trained")
            few = ["--max_steps", "4", "--learning_rate", "1e-2", "--output_dir", str(base / "run")]
            task = ["--model", models[family], "--approach", approach, *task_options(kind, base / "data")]
            train(*task, *few, *options, draw=options == QUANTISED)
            _done[key] = base / "run"
        return _done[key]

    return make
