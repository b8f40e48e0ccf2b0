"""Runs of the scripts inside this process, and what they left behind."""

import contextlib
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from helpers.models import FAMILIES

# Tiny and quick: no quantization, fp32, every update logged. The rest is set here so that no test hangs on a default.
PLAIN = ["--load_in_4bit", "false", "--mixed_precision", "no", "--logging_steps", "1", "--report_to", "none",
         "--baselines", "false", "--lora_r", "4", "--lora_alpha", "32", "--learning_rate", "1e-3",
         "--warmup_ratio", "0.1", "--num_train_epochs", "3", "--per_device_train_batch_size", "8"]  # fmt: skip
CHAT = [*PLAIN, "--per_device_train_batch_size", "4", "--chat_template", "plain", "--max_length", "96"]
TEXT = [*PLAIN, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--block_size", "32"]
TIMES = ("runtime", "per_second", "peak_memory")
FAMILY_APPROACHES = [("llama", "generative"), ("mistral", "head"), ("gemma", "head"), ("qwen", "generative")]
COMBINATIONS = [(approach, kind) for approach in ("generative", "head") for kind in ("single", "multi")]
# Every combination for every family; one of each also with what is the default on most machines, and with pictures.
QUANTIZED = ("--load_in_4bit", "true", "--mixed_precision", "bf16")
RUNS = [(family, *combination, ()) for family in FAMILIES for combination in COMBINATIONS]
RUNS += [(family, *combination, QUANTIZED) for family, combination in zip(FAMILIES, COMBINATIONS, strict=True)]


def name_of(run: tuple) -> str:
    """A test id."""
    return "-".join(run[:3]) + "-nf4" * bool(run[3])


class Stopped(BaseException):
    """Ends a run as a kill does: no `except Exception` sees it."""


@contextlib.contextmanager
def quick(draw: bool = False) -> Iterator[None]:
    """A script inside this process: without pictures, a long search for garbage, and the last one's precision."""
    from accelerate.state import AcceleratorState, GradientState

    from common.measure import figures

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.freeze()  # else each run's end searches all that was imported for garbage, half of a tiny run's time
    with mock.patch.object(figures, "can_draw", figures.can_draw if draw else lambda: False):
        yield


def train(*options: Any, last: bool = True, draw: bool = False) -> dict[str, Any]:
    """What `python train_cls.py OPTIONS` does for one seed, but for the pictures; the figures it returns."""
    import train_cls
    from common.data.classification import load_classification
    from common.options import parse_config

    config = parse_config(train_cls.Config, [*PLAIN, *map(str, options)])
    with quick(draw):
        return train_cls.train(config, load_classification(config), config.model, last)


def train_chat(*options: Any, last: bool = True) -> dict[str, Any]:
    """What `python train_sft.py OPTIONS` does for one seed, but for the pictures; the figures it returns."""
    import train_sft
    from common.data.conversations import load_conversations
    from common.options import parse_config

    config = parse_config(train_sft.Config, [*CHAT, *map(str, options)])
    with quick():
        return train_sft.train(config, load_conversations(config), config.model, last)


def train_text(*options: Any, last: bool = True) -> dict[str, Any]:
    """What `python train_clm.py OPTIONS` does for one seed, but for the pictures; the figures it returns."""
    import train_clm
    from common.data.corpus import open_sources
    from common.options import parse_config

    config = parse_config(train_clm.Config, [*TEXT, *map(str, options)])
    with quick():
        return train_clm.train(config, open_sources(config), config.model, last)


def run_evaluate(*options: Any, draw: bool = False) -> None:
    """What `python evaluate.py OPTIONS` does."""
    import evaluate

    with quick(draw), mock.patch.object(sys, "argv", ["evaluate.py", *map(str, options)]):
        evaluate.main()


def log_lines(run: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have `key`, without durations and speeds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [timeless(line) for line in lines if key in line]


def timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not any(part in name for part in TIMES)}


def weights(folder: Path) -> dict[str, Any]:
    """The tensors of an adapter folder, or of the folder of a full model."""
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_same_updates(one: Path, other: Path) -> None:
    """Two runs made the same updates, up to the order in which numbers are added."""
    import torch

    for a, b in zip(log_lines(one), log_lines(other), strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-5)
        assert a["learning_rate"] == b["learning_rate"]
    found = weights(other / "adapter")
    for name, tensor in weights(one / "adapter").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def assert_same_bits(one: Path, other: Path) -> None:
    """Two runs logged the same figures and ended with the same weights, bit for bit."""
    import torch

    assert log_lines(one) == log_lines(other)
    expected = weights(other / "adapter")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(one / "adapter").items())


def stop_at(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    error: BaseException | None = None,
    text: str = "",
) -> None:
    """Lets call number `call` of `owner.name` raise `error`, by default Stopped; earlier and later ones work.

    text: counts only calls in whose arguments it occurs.
    """
    real, calls = getattr(owner, name), []

    def limited(*args: Any, **kwargs: Any) -> Any:
        if text in str(args):
            calls.append(args)
            if len(calls) == call:
                raise error or Stopped
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, limited)
