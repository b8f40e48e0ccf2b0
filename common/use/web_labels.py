"""The page of a classification run: probabilities as bars, the decision, and the answers to a file."""

import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import fields, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from common.data.classification import Example
from common.disk import to_json
from common.errors import printable
from common.use import web_look
from common.use.answer_file import CHUNK
from common.use.label_models import LabelModel, Prediction
from common.use.model_queue import ModelQueue, Waiting
from common.use.questions import read_input
from common.use.runs import Run
from common.use.web_sessions import Sessions, Turn

BARS = 10  # of the likeliest labels
ROWS = 200  # of a file's answers, shown on the page
FILES = [".csv", ".tsv", ".json", ".jsonl", ".parquet"]
EMPTY = web_look.empty("No text yet", "Write or paste one: the probabilities of the labels appear here.")
COLUMNS = ["id", "text", "answer", "certainty"]


class LabelPage:
    """The page of a classifier. config: of inference.py."""

    def __init__(self, config: Any, run: Run, model: LabelModel) -> None:
        self.config, self.run, self.model = config, run, model
        self.queue, self.sessions = ModelQueue(), Sessions(Turn)

    def build(self) -> gr.Blocks:
        """Lays the page out."""
        with web_look.blocks(self.run) as built:
            web_look.top(self.run, "Classify")
            with gr.Row(equal_height=False):
                with gr.Column(scale=1, min_width=320):
                    self._text_fields()
                with gr.Column(scale=1, min_width=320):
                    self.result = gr.HTML(EMPTY, elem_id="answer")
            with gr.Accordion("A file of texts", open=False, elem_id="file"):
                self._file_fields()
            web_look.bottom(self.run)
            self._connect(built)
        return built

    def _text_fields(self) -> None:
        bounds = {item.name: item.metadata for item in fields(self.config)}["min_probability"]
        self.box = gr.Textbox(
            label="Text", placeholder="Write or paste a text", lines=10, max_lines=20, autofocus=True, elem_id="box"
        )
        self.least = gr.Slider(
            bounds["at_least"], bounds["at_most"], value=self.config.min_probability or 0, step=0.01,
            label="Least certainty", info="No answer where the model is less certain.", elem_id="least",
        )  # fmt: skip
        with gr.Row():
            self.clear = gr.Button("Clear", elem_id="clear")
            self.go = gr.Button("Classify", variant="primary", elem_id="go")

    def _file_fields(self) -> None:
        with gr.Row(equal_height=True):
            self.upload = gr.File(label="CSV, TSV, JSON, JSONL or Parquet", file_types=FILES, height=150, scale=2)
            with gr.Column(scale=1, min_width=200):
                self.start = gr.Button("Classify the file", variant="primary", elem_id="start")
                self.stop_button = gr.Button("Stop", interactive=False, elem_id="stop")
                self.download = gr.DownloadButton("Download the answers", interactive=False, elem_id="download")
        self.note = gr.HTML(web_look.note(), elem_id="note")
        self.table = gr.Dataframe(
            headers=COLUMNS, visible=False, interactive=False, wrap=True, max_height=420, elem_id="table",
            column_widths=["12%", "50%", "24%", "14%"], show_label=False, buttons=[],
        )  # fmt: skip

    def _connect(self, built: gr.Blocks) -> None:
        asked = {"show_progress": "hidden", "concurrency_limit": None}
        aside = {"queue": False, "show_progress": "hidden"}
        self.go.click(self.classify, [self.box, self.least], self.result, api_name="classify", **asked)
        self.clear.click(lambda: ("", EMPTY), None, [self.box, self.result], api_visibility="private", **aside)
        outputs = [self.note, self.table, self.download, self.stop_button, self.start]
        self.start.click(self.classify_file, [self.upload, self.least], outputs, api_name="classify_file", **asked)
        self.stop_button.click(self.stop, api_name="stop", **aside)
        built.unload(self.stop)

    def classify(self, request: gr.Request, text: str, least: float) -> Iterator[str]:
        """The answer to one text, as HTML; before, what is waited for."""
        if not text.strip():
            yield EMPTY
            return

        def answer() -> Generator[str, None, None]:
            yield answer_html(self.model, self.model.classify([text], 1, least)[0], least)

        try:
            with self.sessions.of(request) as turn:
                for found in self.queue.in_turn(answer, turn.stopped):
                    yield web_look.note(str(found)) if isinstance(found, Waiting) else found
        except web_look.FAILURES as error:
            gr.Warning(web_look.error_text(error), title="No answer")

    def classify_file(self, request: gr.Request, path: str | None, least: float) -> Iterator[list[Any]]:
        """The page while the rows of a file are answered, and their answers as a file of lines."""
        if path is None:
            gr.Warning("Choose a file first.")
            return
        try:
            with self.sessions.of(request) as turn:
                ids, examples = read_input(replace(self.config, input_file=path), self.run)
                lines = list[dict[str, Any]]()
                yield self._look(f"{len(ids):,} rows.", running=True)
                for found in self.queue.in_turn(lambda: self._chunks(examples, least), turn.stopped):
                    lines += [] if isinstance(found, Waiting) else found
                    text = f"{len(lines):,} of {len(ids):,} rows answered."
                    yield self._look(str(found) if isinstance(found, Waiting) else text, running=True)
                written = [{"id": id, **line} for id, line in zip(ids, lines, strict=False)]
                rows = [table_row(self.model, *pair) for pair in zip(written[:ROWS], examples, strict=False)]
                text = f"{len(lines):,} of {len(ids):,} rows answered." + f" The first {ROWS}:" * (len(lines) > ROWS)
                yield self._look(text, file=write_lines(path, written), rows=rows)
        except web_look.FAILURES as error:
            text = web_look.error_text(error).replace(escape(path), escape(Path(path).name))
            yield self._look(f'<span class="error">{text}</span>')

    def stop(self, request: gr.Request) -> None:
        """Stops what this browser has asked for."""
        self.sessions.of(request).stop()

    def _chunks(self, examples: Sequence[Example], least: float) -> Generator[list[dict[str, Any]], None, None]:
        """The lines of the answers, in the batches of `inference.py --input_file`, so that they are the same."""
        size = self.config.per_device_eval_batch_size
        for first in range(0, len(examples), CHUNK * size):
            yield self.model.answer_rows(examples[first : first + CHUNK * size], size, least or None)

    def _look(self, text: str, running: bool = False, file: str | None = None, rows: Any = None) -> list[Any]:
        """What the outputs of a file show."""
        table = gr.update(value=rows, visible=True) if rows else gr.update(visible=False)
        download = gr.update(value=file, interactive=file is not None)
        buttons = gr.update(interactive=running), gr.update(interactive=not running)
        return [web_look.note(text), table, download, *buttons]


def write_lines(upload: str, lines: Sequence[dict[str, Any]]) -> str:
    """Writes the lines of an answer file, and returns its path. upload: the path of what they answer."""
    folder = tempfile.mkdtemp(dir=Path(upload).parent)
    path = Path(folder) / f"{Path(upload).stem}-answers.jsonl"
    path.write_text("".join(to_json(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def certainty_of(model: LabelModel, probabilities: dict[str, float]) -> float:
    """What a limit is compared with: `Decision.certainty`."""
    return float(model.decision.certainty(np.array([list(probabilities.values())]))[0])


def answer_text(found: Prediction) -> str:
    """The answer in a few words."""
    if found.error:
        return found.error.capitalize()
    if found.abstained:
        return "No answer"
    names = found.prediction if isinstance(found.prediction, list) else [str(found.prediction)]
    return ", ".join(names) or "No label"


def reason(model: LabelModel, found: Prediction, least: float) -> str:
    """Why there is no answer, or how certain it is."""
    sure, cut = certainty_of(model, found.probabilities), model.decision.cut or 0
    if not found.abstained:
        return f"Certainty {sure:.2f}" + (". The text was too long and was cut." if found.truncated else "")
    limit = f"the fitted limit of {cut:.2f}" if cut >= least else f"the least certainty of {least:.2f}"
    return f"Abstained: the certainty, {sure:.2f}, is below {limit}."


def answer_html(model: LabelModel, found: Prediction, least: float) -> str:
    """The decision, and the likeliest labels as bars; of several labels per row, with their thresholds."""
    chosen = found.prediction if isinstance(found.prediction, list) else [found.prediction]
    several = model.decision.multi_label
    thresholds = dict(zip(found.probabilities, model.decision.thresholds, strict=True)) if several else {}
    bars = []
    for label, p in sorted(found.probabilities.items(), key=lambda pair: -pair[1])[:BARS]:
        mark = f'<u style="left: {thresholds[label]:.1%}" title="threshold"></u>' if several else ""
        bars.append(
            f'<span class="name">{web_look.plain(label)}</span>'
            f'<span class="bar{" chosen" * (label in chosen)}"><i style="width: {p:.1%}"></i>{mark}</span>'
            f'<span class="p">{p:.3f}</span>'
        )
    more = len(found.probabilities) - BARS
    rest = f'<div class="note">and {more} less likely labels</div>' if more > 0 else ""
    return (
        f'<div class="answer{" none" * found.abstained}"><b>{web_look.plain(answer_text(found))}</b>'
        f'<span class="note">{reason(model, found, least)}</span></div>'
        f'<div class="bars">{"".join(bars)}</div>{rest}'
    )


def table_row(model: LabelModel, line: dict[str, Any], example: Example) -> list[str]:
    """The cells of COLUMNS."""
    found = Prediction(**{"error": None, **{name: value for name, value in line.items() if name != "id"}})
    sure = "" if found.error else f"{certainty_of(model, found.probabilities):.3f}"
    text = example.text if len(example.text) <= 200 else example.text[:199] + "…"
    return [printable(cell) for cell in (str(line["id"]), text, answer_text(found), sure)]
