"""Models that write text: one run, its base, or several runs of one base."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from common.data.conversations import Message
from common.data.corpus import Block
from common.errors import InputError
from common.model import generation, lora
from common.model.base_model import precision
from common.model.losses import token_losses
from common.model.token_losses import TokenLosses
from common.options import Sampling
from common.text.batches import collate_blocks
from common.text.chat import ChatTemplate, NoRoom

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Question = list[Message] | str  # the turns of a conversation, or the text to continue
WINDOW = 512  # tokens of a block whose perplexity is measured at once


@dataclass
class TextModel:
    """A model that writes text: answers in a conversation, or the continuation of a text (template None).

    start: ids before a text to be continued. system: the system turn of conversations that have none. precision: no,
    bf16 or fp16. adapter: the one that is switched on; None: the untrained base.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    template: ChatTemplate | None
    start: list[int]
    system: str | None
    device: torch.device
    precision: str
    adapter: str | None = "default"

    def answer(self, question: Question, **settings: Any) -> str:
        """One answer to the turns of a conversation or a single question; or the continuation of a text.

        settings: of `common.options.Sampling`: temperature, top_p, top_k, max_new_tokens, do_sample, seed, ...
        Raises InputError where a prompt leaves no room for an answer.
        """
        return "".join(self.stream(question, **settings))

    def stream(self, question: Question, **settings: Any) -> Iterator[str]:
        """The pieces of `answer`, as they are written."""
        sampling = Sampling(**settings)
        torch.manual_seed(sampling.seed)
        yield from self.pieces(self.turns(question), sampling)

    def perplexity(self, text: str) -> float:
        """e to the mean loss of the text's tokens, each with at most WINDOW tokens of context before it.

        Raises InputError for a text without two tokens.
        """
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        size = min(WINDOW, (generation.positions(self.model) or WINDOW) - len(self.start))
        blocks = [Block(str(i), ids[i : i + size]) for i in range(0, len(ids), size)]
        model, end_id, pad_id = TokenLosses(self.model), self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        loss_sum, count = 0.0, 0
        for block in blocks:
            batch = collate_blocks([(block, True)], self.start, end_id, pad_id).to(self.device)
            with torch.inference_mode(), self.switched_on(), precision(self.device, self.precision):
                losses = token_losses(model, batch)
            loss_sum, count = loss_sum + losses.double().sum().item(), count + len(losses)
        if not count:
            raise InputError("A text needs at least two tokens to have a perplexity.")
        return math.exp(min(loss_sum / count, 700))  # a float ends at e^709

    def turns(self, question: Question) -> Question:
        """What this model is prompted with: a text to continue; or the turns, a single question being one.

        Turns without a system turn get the model's.
        """
        if self.template is None:
            return question
        turns: list[Message] = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        if self.system and not (turns and turns[0]["role"] == "system"):
            turns.insert(0, {"role": "system", "content": self.system})
        return turns

    def prompt_ids(self, question: Question, sampling: Sampling) -> tuple[list[int], bool]:
        """The prompt's ids, and whether early turns or text had to be left out for the answer to fit."""
        room = generation.prompt_room(self.model, sampling)
        if self.template is None:
            if not question:
                raise InputError("There is no text to continue.")
            ids = self.tokenizer(question, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            kept = ids if room is None else ids[-(room - len(self.start)) :]
            return self.start + kept, len(kept) < len(ids)
        try:
            row = self.template.prompt(cast(list[Message], question), room)
        except NoRoom as error:  # which advises an option of the training
            problem = f"The system turn and the like take {error.least} tokens, and there is room for {room}."
            raise InputError(problem) from None
        return row.ids, bool(row.dropped_turns or row.shortened)

    def pieces(self, question: Question, sampling: Sampling) -> Iterator[str]:
        """The pieces of one answer, as they are written; sets no seed."""
        ids, shortened = self.prompt_ids(question, sampling)
        if shortened:
            print("(parts of the conversation are not shown to the model, so that the answer fits)", file=sys.stderr)
        with precision(self.device, self.precision):  # the stream keeps it; held across a yield, it would leak out
            stream = generation.stream(self.model, self.tokenizer, self.template, ids, sampling, self.device)
        with self.switched_on():
            yield from stream

    def answer_rows(
        self, questions: Sequence[Question], sampling: Sampling, batch_size: int, progress: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        """The lines of an answer file; a question that cannot be answered has an error in its line."""
        prompts: dict[int, tuple[list[int], bool]] = {}
        lines: list[dict[str, Any]] = [{} for _ in questions]
        for number, question in enumerate(questions):
            try:
                prompts[number] = self.prompt_ids(question, sampling)
            except InputError as error:
                lines[number] = {"answer": None, "error": str(error)}
        with self.switched_on(), precision(self.device, self.precision):
            answers = generation.answer_prompts(
                self.model, self.tokenizer, self.template, [ids for ids, _ in prompts.values()], sampling, batch_size,
                self.device, progress,
            )  # fmt: skip
        for answer, (number, (_, shortened)) in zip(answers, prompts.items(), strict=True):
            lines[number] = {
                "answer": answer.text, "stopped": answer.stopped, "tokens": len(answer.ids), "shortened": shortened
            }  # fmt: skip
        return lines

    @contextlib.contextmanager
    def switched_on(self) -> Iterator[None]:
        """This model's adapter is on inside the block, or off if it is the base."""
        if not lora.is_adapted(self.model):
            yield
        elif self.adapter is None:
            with lora.without_adapter(self.model):
                yield
        else:
            self.model.set_adapter(self.adapter)
            yield
