"""The page of a run on running text: a text is continued, by one model or by several side by side."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from common.errors import printable
from common.options import CAUSAL_LM
from common.use import web_look
from common.use.model_queue import ModelQueue
from common.use.questions import demo_questions
from common.use.runs import Run
from common.use.web_sessions import Conversations, Models, Sessions


class TextPage:
    """The page of one model, or of several whose continuations stand side by side. config: of inference.py."""

    def __init__(self, config: Any, run: Run, models: Models) -> None:
        queue, self.sampling = ModelQueue(), web_look.sampling_of(config)
        self.run, self.models = run, models
        self.sessions = Sessions(lambda: Conversations(queue, models, self.sampling))

    def build(self) -> gr.Blocks:
        """Lays the page out."""
        with web_look.blocks(self.run) as built:
            web_look.top(self.run, "Compare" if len(self.models) > 1 else "Continue a text")
            with gr.Row(elem_classes="examples"):
                texts = demo_questions(CAUSAL_LM)
                self.examples = [gr.Button(text, size="sm", elem_classes="example") for text in texts]
            self.box = gr.Textbox(
                placeholder="Write the beginning of a text", label="Beginning", lines=4, max_lines=10, autofocus=True,
                elem_id="box",
            )  # fmt: skip
            with gr.Row(equal_height=True):
                self.note = gr.HTML(web_look.note(), elem_id="note")
                self.clear = gr.Button("Clear", size="sm", scale=0, min_width=90, elem_id="clear")
                self.stop_button = gr.Button(
                    "Stop", size="sm", scale=0, min_width=90, elem_id="stop", interactive=False
                )
                self.go = gr.Button("Continue", size="sm", variant="primary", scale=0, min_width=110, elem_id="go")
            with gr.Row():
                self.panes = [
                    gr.Textbox(
                        label=Path(name).name if len(self.models) > 1 else "Text",
                        lines=12,
                        max_lines=24,
                        interactive=False,
                        placeholder="The text appears here.",
                        buttons=["copy"],
                        min_width=280,
                        elem_classes="text",
                    )  # fmt: skip
                    for name, _ in self.models
                ]
            with gr.Accordion("Settings of the text", open=False, elem_id="settings"), gr.Row():
                self.settings = web_look.sampling_fields(self.sampling)
            web_look.bottom(self.run)
            self._connect(built)
        return built

    def _connect(self, built: gr.Blocks) -> None:
        shown = [*self.panes, self.note, self.stop_button, self.go]
        aside = {"queue": False, "show_progress": "hidden"}
        self.go.click(
            self.continue_text, [self.box, *self.settings], shown, api_name="ask", show_progress="hidden",
            concurrency_limit=None,
        )  # fmt: skip
        for example in self.examples:
            example.click(lambda text: text, example, self.box, api_visibility="private", **aside)
        self.stop_button.click(self.stop, api_name="stop", **aside)
        self.clear.click(self.forget, None, [self.box, *shown], api_name="clear", **aside)
        built.unload(self.stop)

    def continue_text(self, request: gr.Request, text: str, *settings: Any) -> Iterator[list[Any]]:
        """The page while the text is continued. settings: the fields of the settings."""
        if not text.strip():
            return
        session = self.sessions.of(request)
        try:
            for note in session.answer(text, web_look.sampling_texts(settings), anew=True):
                yield self._look(session, True, note)
        except web_look.FAILURES as error:
            gr.Warning(web_look.error_text(error), title="Not continued")
        yield self._look(session, False, "Stopped." if session.turn.stopped() else "")

    def stop(self, request: gr.Request) -> None:
        """Stops the text of this browser, if one is being written."""
        self.sessions.of(request).turn.stop()

    def forget(self, request: gr.Request) -> list[Any]:
        """An empty page."""
        session = self.sessions.of(request)
        session.clear()
        return ["", *self._look(session, False)]

    def _look(self, session: Conversations, running: bool, note: str = "") -> list[Any]:
        """What the outputs show. running: a text is being written, so that it can be stopped."""
        texts = [printable("".join(turn["content"] for turn in turns)) for turns in session.shown()]
        return [*texts, web_look.note(note), gr.update(interactive=running), gr.update(interactive=not running)]
