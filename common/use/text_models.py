"""Models that write text, for inference.py: one run, its base, or several runs of one base."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import disk
from common.data.conversations import Message
from common.errors import InputError
from common.model import base_model, generation, lora, storage
from common.options import Sampling
from common.text.chat import ChatTemplate, choose_template

Asked = list[Message] | str  # the turns of a chat, or the text to go on with


@dataclass
class Writer:
    """A model that writes text: answers in a chat, or more of a text (template None, behind the ids of `start`).

    adapter: the one that is switched on; None: the untrained base.
    """

    model: Any
    tokenizer: Any
    template: Any
    start: list[int]
    system: str | None
    device: Any
    adapter: str | None = "default"

    def ids(self, asked: Asked, sampling: Sampling) -> tuple[list[int], bool]:
        """The prompt's ids, and whether early turns or text had to be left out for the answer to fit."""
        room = generation.prompt_room(self.model, sampling)
        if self.template is None:
            ids = self.tokenizer(asked, add_special_tokens=False)["input_ids"]
            kept = ids if room is None else ids[-(room - len(self.start)) :]
            if not self.start + kept:
                raise InputError("There is no text to go on with.")
            return self.start + kept, len(kept) < len(ids)
        row = self.template.prompt(asked, room)
        return row.ids, bool(row.dropped_turns or row.shortened)

    def ask(self, text: str) -> Asked:
        """What a single text asks, behind the system turn."""
        if self.template is None:
            return text
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": text}]

    def stream(self, asked: Asked, sampling: Sampling) -> Iterator[str]:
        """The pieces of one answer."""
        ids, shortened = self.ids(asked, sampling)
        if shortened:
            print("(not all of what was said is shown to the model, for the answer to fit)", file=sys.stderr)
        with self.switched():
            yield from generation.stream(self.model, self.tokenizer, self.template, ids, sampling, self.device)

    def answers(
        self, asked: Sequence[Asked], sampling: Sampling, batch_size: int, progress: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        """The lines of an answer file."""
        prompts = [self.ids(one, sampling) for one in asked]
        ids = [ids for ids, _ in prompts]
        with self.switched():
            found = generation.answer_prompts(
                self.model, self.tokenizer, self.template, ids, sampling, batch_size, self.device, progress
            )
        return [
            {"answer": answer.text, "stopped": answer.stopped, "tokens": len(answer.ids), "shortened": shortened}
            for answer, (_, shortened) in zip(found, prompts, strict=True)
        ]

    @contextlib.contextmanager
    def switched(self) -> Iterator[None]:
        """This writer's adapter is on inside the block."""
        if not lora.is_adapted(self.model):
            yield
        elif self.adapter is None:
            with lora.without_adapter(self.model):
                yield
        else:
            self.model.set_adapter(self.adapter)
            yield


def load_writer(config: Any, folder: Path | None, task: dict[str, Any], path: str, accelerator: Any) -> Writer:
    """The writer of a run, or of a base model in `path`."""
    device, chat = accelerator.device, task["task"] == "chat"
    if folder is None:
        tokenizer = base_model.load_tokenizer(path, config)
        template = choose_template(tokenizer, config.chat_template) if chat else None
        model = base_model.load_base(path, config, device=device)[0].eval()
    elif chat:
        model, tokenizer, template = storage.load_chat_model(
            folder, device, config.mixed_precision, config.chat_template
        )
    else:
        (model, tokenizer), template = storage.load_language_model(folder, device, config.mixed_precision), None
    start = task.get("start", base_model.start_ids(tokenizer)) if template is None else []
    system = config.system_prompt or task.get("system_prompt")
    return Writer(model, tokenizer, template, start, system, device)


def load_compared(
    first: Writer, folder: Path, others: Sequence[tuple[str, Path | None]], config: Any
) -> list[tuple[str, Writer]]:
    """(name, writer) of each of the (name, weights folder; None for the base) of runs that share a base.

    first: the writer of the run in `folder`; the adapters of the others are loaded beside its own.
    """
    writers: list[tuple[str, Writer]] = []
    for number, (run, other) in enumerate(others):
        if other is None:
            writers.append((run, replace(first, adapter=None)))
        elif other == folder:
            writers.append((run, first))
        else:
            found = disk.load_task(other)
            tokenizer = base_model.load_tokenizer(str(other), storage.trained_options(found))
            template = first.template
            if template and not config.chat_template:
                template = ChatTemplate(tokenizer, found["chat_template"], f"the chat template of {other}")
            system = config.system_prompt or found.get("system_prompt")
            storage.add_adapter(first.model, other, f"run{number}")
            start = found.get("start", [])
            writers.append((run, replace(first, tokenizer=tokenizer, template=template, start=start, system=system,
                                         adapter=f"run{number}")))  # fmt: skip
    return writers
