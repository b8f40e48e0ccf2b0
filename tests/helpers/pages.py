"""The pages of inference.py --web, in this process."""

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import inference
from common.use import web
from helpers.runs import quick

PLAIN = {"load_in_4bit": False, "mixed_precision": "no"}
CHAT = {**PLAIN, "chat_template": "plain", "task": "chat"}
QUIET = [  # what pandas says of Gradio
    pytest.mark.filterwarnings(f"ignore:.*{text}.*") for text in ("no_silent_downcasting", "The copy keyword")
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def open_page(folder: Any, password: str | None = None, **given: Any) -> Iterator[tuple[str, Any]]:
    """The page that `inference.py --web` shows for these options: its address, and its model or models."""
    with mock.patch.dict(os.environ, {"GRADIO_TEMP_DIR": str(folder)}), quick():
        compared = given.get("compare")
        config, run, others = inference.read_options({"web": True, **given})
        run.resolve(config)
        cpu = torch.device("cpu")
        if run.task == "classification":
            models = run.load_classifier(config, cpu)
        else:
            model = run.load_text_model(config, cpu)
            models = [("model", model)]
            if compared:
                models = list(zip(compared, inference.load_compared(model, run, others, config), strict=True))
        page = web.build(config, run, models)
        try:
            yield web.launch(page, "127.0.0.1", free_port(), password), models
        finally:
            page.close(verbose=False)
