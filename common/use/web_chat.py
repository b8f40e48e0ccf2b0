"""The page of a chat: personas, their examples, an answer as it is written; several models answer side by side."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gradio as gr

from common.errors import printable
from common.options import CHAT
from common.use import web_look
from common.use.model_queue import ModelQueue
from common.use.personas import Persona, read_personas
from common.use.questions import demo_questions
from common.use.runs import Run
from common.use.web_sessions import OWN, Conversations, Models, Sessions

HEIGHT = 500  # pixels of a chat
EXAMPLES = 3  # of a model without a persona


class ChatPage:
    """The page of one model, or of several that answer side by side. config: of inference.py."""

    def __init__(self, config: Any, run: Run, models: Models) -> None:
        queue, self.sampling = ModelQueue(), web_look.sampling_of(config)
        self.run, self.models = run, models
        self.sessions = Sessions(lambda: Conversations(queue, models, self.sampling, config.persona or OWN))
        title = "As trained" if run.folder else "No persona"
        own = Persona(OWN, f"{title} - the model's own system turn", "", tuple(demo_questions(CHAT)[:EXAMPLES]))
        self.personas = {OWN: own, **read_personas()}
        self.chosen = self.personas[config.persona or OWN]
        self.most = max(len(persona.examples) for persona in self.personas.values())

    def build(self) -> gr.Blocks:
        """Lays the page out."""
        with web_look.blocks(self.run) as built:
            web_look.top(self.run, "Compare" if len(self.models) > 1 else "Chat")
            with gr.Row():
                with gr.Column(scale=1, min_width=240, elem_classes="side"):
                    self._persona_fields()
                with gr.Column(scale=3, min_width=320):
                    self._chat_fields()
            web_look.bottom(self.run)
            self._connect(built)
        return built

    def _persona_fields(self) -> None:
        self.persona = gr.Radio(
            [(persona.title, name) for name, persona in self.personas.items()], value=self.chosen.name,
            label="Persona", elem_id="persona",
        )  # fmt: skip
        with gr.Column(elem_classes="examples"):
            gr.HTML('<div class="heading">Examples</div>')
            self.examples = [gr.Button(size="sm", elem_classes="example", **look) for look in self._looks(self.chosen)]
        with gr.Accordion("System turn", open=False, elem_id="turn"):
            self.system = gr.Textbox(
                self._system_text(self.chosen), lines=4, max_lines=12, interactive=False, show_label=False,
                container=False, elem_id="system",
            )  # fmt: skip

    def _chat_fields(self) -> None:
        with gr.Row():
            self.panes = [
                gr.Chatbot(
                    label=Path(name).name,
                    show_label=len(self.models) > 1,
                    height=HEIGHT,
                    elem_classes="chat",
                    placeholder=placeholder(self.chosen),
                    render_markdown=False,
                    buttons=[],
                    layout="bubble",
                    min_width=220,
                    latex_delimiters=[],
                    allow_tags=False,
                )  # fmt: skip
                for name, _ in self.models
            ]
        self.box = gr.Textbox(
            placeholder="Write a message", show_label=False, autofocus=True, lines=1, max_lines=8, submit_btn=True,
            elem_id="box",
        )  # fmt: skip
        with gr.Row(equal_height=True):
            self.note = gr.HTML(web_look.note(), elem_id="note")
            self.retry = gr.Button("Retry", size="sm", scale=0, min_width=90, elem_id="retry")
            self.clear = gr.Button("Clear", size="sm", scale=0, min_width=90, elem_id="clear")
        with gr.Accordion("Settings of the answers", open=False, elem_id="settings"), gr.Row():
            self.settings = web_look.sampling_fields(self.sampling)

    def _connect(self, built: gr.Blocks) -> None:
        shown = [*self.panes, self.box, self.note, self.retry]
        streamed = {"outputs": shown, "show_progress": "hidden", "concurrency_limit": None}
        aside = {"queue": False, "show_progress": "hidden"}
        of_persona = [self.system, *self.examples, *self.panes]
        built.load(self.choose, self.persona, of_persona, api_visibility="private", **aside)
        self.persona.change(self.choose, self.persona, of_persona, api_name="persona", **aside)
        self.box.submit(self.ask, [self.box, *self.settings], api_name="ask", **streamed)
        for example in self.examples:
            example.click(self.ask, [example, *self.settings], api_visibility="private", **streamed)
        self.retry.click(self.ask_again, self.settings, api_name="retry", **streamed)
        self.box.stop(self.stop, api_name="stop", **aside)
        cleared = [self.clear.click, *[pane.clear for pane in self.panes]]
        gr.on(cleared, self.forget, None, shown, api_name="clear", **aside)
        built.unload(self.stop)

    def ask(self, request: gr.Request, question: str, *settings: Any) -> Iterator[list[Any]]:
        """The page while an answer is written. settings: the fields of the settings."""
        if question.strip():
            yield from self._answer(request, question, settings)

    def ask_again(self, request: gr.Request, *settings: Any) -> Iterator[list[Any]]:
        """As `ask`, with the last question."""
        yield from self._answer(request, None, settings)

    def stop(self, request: gr.Request) -> None:
        """Stops the answer of this browser, if one is being written."""
        self.sessions.of(request).turn.stop()

    def forget(self, request: gr.Request) -> list[Any]:
        """An empty page."""
        session = self.sessions.of(request)
        session.clear()
        return self._look(session, False, box={"value": ""})

    def choose(self, request: gr.Request, name: str) -> list[Any]:
        """What the page shows of a persona, which answers from now on."""
        persona = self.personas[name]
        self.sessions.of(request).use_persona(name)
        looks = [gr.update(**look) for look in self._looks(persona)]
        return [self._system_text(persona), *looks, *[gr.update(placeholder=placeholder(persona)) for _ in self.panes]]

    def _answer(self, request: gr.Request, question: str | None, settings: Sequence[Any]) -> Iterator[list[Any]]:
        session = self.sessions.of(request)
        box = {"value": ""} if question else {}  # the question leaves the box, and comes back if it failed
        try:
            for text in session.answer(question, web_look.sampling_texts(settings)):
                yield self._look(session, True, text, box)
                box = {}
        except web_look.FAILURES as error:
            gr.Warning(web_look.error_text(error), title="No answer")
            box = {"value": question} if question else {}
        yield self._look(session, False, "Stopped." if session.turn.stopped() else "", box)

    def _look(
        self, session: Conversations, running: bool, text: str = "", box: Any = MappingProxyType({})
    ) -> list[Any]:
        """What the outputs of `_connect` show. running: an answer is being written, so that it can be stopped."""
        parts = web_look.text_part
        chats = [[{**turn, "content": parts(turn["content"])} for turn in chat] for chat in session.shown()]
        box_look = gr.update(submit_btn=not running, stop_btn=running, **box)
        return [*chats, box_look, web_look.note(text), gr.update(interactive=not running)]

    def _looks(self, persona: Persona) -> list[dict[str, Any]]:
        """How the buttons of the examples look: a question each, hidden where there are no more."""
        texts = [printable(text) for text in persona.examples]
        return [{"value": "".join(texts[i : i + 1]), "visible": i < len(texts)} for i in range(self.most)]

    def _system_text(self, persona: Persona) -> str:
        """The system turn: the persona's, else the models' own."""
        own = dict.fromkeys(model.system or "(none)" for _, model in self.models)
        return printable(persona.system_prompt or "\n\n".join(own))


def placeholder(persona: Persona) -> str:
    """What an empty chat shows."""
    what = persona.description.partition(" - ")[2]
    return web_look.empty(persona.title, f"{what[:1].upper()}{what[1:]}. Write a message, or choose an example.")
