"""Fixtures of several test files: tiny models and small data files, made once a session, and a fresh accelerator."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.models import FAMILIES, build_encoder, build_model
from helpers.rows import chats, task_options, toy_rows, write_csv, write_jsonl
from helpers.runs import QUANTIZED, train

os.environ.setdefault("OMP_NUM_THREADS", "1")  # test files run side by side
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Each worker has its share of the cores: training takes a thread for each of its own, and waiting threads spin.
    number, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[number % len(cores) :: count])
LONGEST = ("test_embedded.py", "test_base_model.py", "test_checkpoints.py", "test_generation.py", "test_export.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one state a process, which would hold on to the first test's precision."""
    yield
    state = sys.modules.get("accelerate.state")  # a test that did not import it pays nothing for it
    if state:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """family -> folder of a tiny random model."""
    base = tmp_path_factory.mktemp("models")
    return {family: build_model(base / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> dict[str, Path]:
    """bert and distilbert -> folder of a tiny random model."""
    base = tmp_path_factory.mktemp("encoders")
    return {family: build_encoder(base / family, family) for family in ("bert", "distilbert")}


@pytest.fixture(scope="session")
def toy_files(tmp_path_factory) -> dict[str, str]:
    """train, validation and test CSV files of an easy three-label task."""
    base = tmp_path_factory.mktemp("toy")
    return {
        "train": str(write_csv(base / "train.csv", toy_rows(14))),
        "validation": str(write_csv(base / "validation.csv", toy_rows(4, start=20))),
        "test": str(write_csv(base / "test.csv", toy_rows(5, start=30))),
    }


@pytest.fixture(scope="session")
def chat_files(tmp_path_factory) -> list[str]:
    """Options that name train, validation and test files of conversations."""
    base = tmp_path_factory.mktemp("chats")
    sizes = {"train": (11, 0), "validation": (5, 20), "test": (7, 30)}
    return [
        part
        for name, size in sizes.items()
        for part in (f"--{name}_file", write_jsonl(base / f"{name}.jsonl", chats(*size)))
    ]


@pytest.fixture(scope="session")
def trained(models, tmp_path_factory) -> Callable[..., Path]:
    """(family, approach, kind, *options) -> run folder of a few updates of train_cls.py; trained once, not changed."""
    done: dict[tuple, Path] = {}

    def make(family: str, approach: str, kind: str, *options: str) -> Path:
        key = (family, approach, kind, *options)
        if key not in done:
            base = tmp_path_factory.mktemp("drawn" if options == QUANTIZED else "trained")
            few = ["--max_steps", "4", "--learning_rate", "1e-2", "--output_dir", str(base / "run")]
            task = ["--model", models[family], "--approach", approach, *task_options(kind, base / "data")]
            train(*task, *few, *options, draw=options == QUANTIZED)
            done[key] = base / "run"
        return done[key]

    return make
