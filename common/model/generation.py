"""Answers of a model: in batches, or piece by piece as one is written; both ways give the same text.

An answer ends at a stop id of the chat template, or where the model itself begins another turn of the conversation.
"""

import contextlib
import copy
import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from common.errors import InputError
from common.memory import end_waiting_threads
from common.options import Sampling
from common.text.batches import pad_left
from common.text.chat import ChatTemplate

NEW_TOKENS = 256  # of an answer, where neither the options nor the model's generation_config say


@dataclass(frozen=True)
class Generated:
    """An answer. text: without special tokens; with a chat template also without the blanks around it.

    ids: the new tokens, the stop id included. stopped: whether the model ended the answer itself, with a stop id.
    """

    text: str
    ids: list[int]
    stopped: bool


def end_ids(model: PreTrainedModel, template: ChatTemplate | None) -> list[int]:
    """The tokens that end an answer: those of the template, and those that the model's generation_config names."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([*(template.stop_ids if template else ()), *own]))


class StopRule:
    """Where an answer ends, and what its text is.

    template: None for running text, which ends at the tokenizer's end token. more_ids: further tokens that end it.
    stop_ids: all tokens that end an answer. turn_ids, turn_texts: what turns begin with by the template, as a special
    token where it has one, else as text (after a line break, if the template has one there): a model that writes the
    user's next turn has finished its own.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, more_ids: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.turn_ids: list[int] = []
        self.turn_texts: list[str] = []
        eos = tokenizer.eos_token_id
        own_ids = template.stop_ids if template else [] if eos is None else [eos]
        self.stop_ids = list(dict.fromkeys([*own_ids, *more_ids]))
        for opening in _turn_openings(template) if template else ():
            if special := template.encoder.special.search(opening):
                self.turn_ids.append(tokenizer.convert_tokens_to_ids(special[0]))  # type: ignore[arg-type]
            elif text := opening.strip():
                self.turn_texts.append("\n" + text if "\n" in opening.partition(text)[0] else text)
        self.ids = list(dict.fromkeys([*self.stop_ids, *self.turn_ids]))  # all at which generation stops
        # As many tokens as may spell the beginning of a turn, if each is a byte.
        self._window = max((len(text.encode()) for text in self.turn_texts), default=0) + 2

    def begins_turn(self, ids: Sequence[int]) -> bool:
        """Whether the last of the tokens completed the beginning of a turn in the text."""
        if not self.turn_texts:
            return False
        tail = self._decode(ids[-self._window :])
        return any(turn.strip() in tail for turn in self.turn_texts) and self._turn_start(self._decode(ids)) is not None

    def text(self, ids: Sequence[int], ended: bool = True) -> str:
        """The text of an answer; of one that has not ended, only what will stay whatever follows."""
        text = self._decode([token for token in ids if token not in self.stop_ids])  # not all are marked as special
        prefix = self.template.answer_prefix if self.template else ""
        if prefix and text.lstrip().startswith(prefix):
            text = text.lstrip().removeprefix(prefix)
        elif prefix and not ended and prefix.startswith(text.lstrip()):
            return ""
        end = self._turn_start(text)
        if end is None and not ended:
            end = len(text) - self._undecided(text)
        return text[:end].strip() if self.template else text[:end]  # a blank at the end shows once something follows it

    def finish(self, ids: list[int]) -> Generated:
        """The answer in the new tokens of a row, which end at the first stop."""
        ids = ids[: next((i for i, token in enumerate(ids) if token in self.ids), len(ids)) + 1]
        if self._turn_start(self._decode(ids)) is not None:  # after it comes padding, often with the end token
            ids = ids[: next(n for n in range(1, len(ids) + 1) if self.begins_turn(ids[:n]))]
        return Generated(self.text(ids), ids, bool(ids) and ids[-1] in self.stop_ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _turn_start(self, text: str) -> int | None:
        """Where a turn begins in the text; if the template has a line break there, only at the start of a line."""
        patterns = [
            f"(?:^|\n)[ \t]*{re.escape(turn[1:])}" if turn[0] == "\n" else re.escape(turn) for turn in self.turn_texts
        ]
        found = re.search("|".join(patterns), text) if patterns else None
        return found.start() if found else None

    def _undecided(self, text: str) -> int:
        """How many characters at the text's end may still change, or become the beginning of a turn."""
        half = len(text) - len(text.rstrip("\ufffd"))  # bytes of a character whose other bytes follow
        held = [n for turn in self.turn_texts for n in range(1, len(turn)) if text.endswith(turn[:n])]
        line = text.rpartition("\n")[2]
        if any(turn[0] == "\n" and turn[1:].startswith(line.lstrip(" \t")) for turn in self.turn_texts):
            held.append(len(line) + 1)
        return min(len(text), max([half, *held]))


def _turn_openings(template: ChatTemplate) -> list[str]:
    """What the template writes before a user's turn that follows an answer, and before an answer."""
    user, answer, again = (
        {"role": role, "content": f"x{name}x"}
        for role, name in (("user", "user"), ("assistant", "answer"), ("user", "again"))
    )
    before_answer = template.text_of([user]).rpartition("xuserx")[2]
    before_user = template.text_of([user, answer, again]).partition("xanswerx")[2].partition("xagainx")[0]
    return [opening.replace(template.end, "") for opening in (before_user, before_answer)]


def generation_settings(
    model: PreTrainedModel, sampling: Sampling, stop_rule: StopRule, pad_id: int | None
) -> GenerationConfig:
    """The model's own generation settings, with those that `sampling` sets.

    Any setting of sampling turns sampling on, unless do_sample or temperature 0 says otherwise.
    """
    settings = copy.deepcopy(model.generation_config)
    given = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k")}
    wanted = any(value is not None for value in given.values()) or settings.do_sample
    settings.do_sample = (
        bool(wanted if sampling.do_sample is None else sampling.do_sample) and sampling.temperature != 0
    )
    for name, value in {**given, "repetition_penalty": sampling.repetition_penalty}.items():
        if value is not None:
            setattr(settings, name, value)
    settings.max_new_tokens = sampling.max_new_tokens or settings.max_new_tokens or NEW_TOKENS
    settings.num_beams, settings.num_return_sequences, settings.use_cache = 1, 1, True
    settings.eos_token_id, settings.pad_token_id = stop_rule.ids or None, pad_id
    return settings


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model can see, prompt and answer; None: any number."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def prompt_room(model: PreTrainedModel, sampling: Sampling) -> int | None:
    """The tokens that a prompt may have so that an answer fits after it: at least half of the model's positions."""
    total = positions(model)
    wanted = sampling.max_new_tokens or model.generation_config.max_new_tokens or NEW_TOKENS
    return None if total is None else max(total - wanted, total // 2)


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int,
    device: torch.device | str,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Generated]:
    """The answers to `prompts` (token ids), in their order; template: None continues running text.

    Rows are padded on the left, with mask and positions, so greedy answers do not depend on the batch (in fp32; lower
    precisions round differently with the shape). Sampled ones depend on seed and batch. Longest prompts come first; one
    whose answer could reach the end of the model's positions goes alone. Sets the seed.
    Raises InputError where a prompt leaves no room for an answer.
    """
    model.eval()  # in training mode, gradient checkpointing would drop the keys and values, and change the text
    torch.manual_seed(sampling.seed)
    stop_rule = StopRule(tokenizer, template, end_ids(model, template))
    settings = generation_settings(model, sampling, stop_rule, tokenizer.pad_token_id)
    total = positions(model)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    crowded = [i for i in order if total is not None and len(prompts[i]) + settings.max_new_tokens > total]
    roomy = [i for i in order if i not in set(crowded)]
    answers: dict[int, Generated] = {}
    for rows in [[i] for i in crowded] + [roomy[k : k + batch_size] for k in range(0, len(roomy), batch_size)]:
        with torch.inference_mode(), _precision(model, device):
            output = _generate(model, [prompts[i] for i in rows], settings, stop_rule, device)
        answers |= {i: stop_rule.finish(ids) for i, ids in zip(rows, output.tolist(), strict=True)}
        progress(len(rows))
    return [answers[i] for i in range(len(prompts))]


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    prompt: Sequence[int],
    sampling: Sampling,
    device: torch.device | str,
) -> Iterator[str]:
    """The text of one answer in pieces, as it is written; together they are what `answer_prompts` gives for the prompt.

    Closing the iterator, or an exception in it (Ctrl-C), ends the generation at the next token. It sets no seed, so
    that the same question gets another sample. `generate` hands its tokens to a callback and returns once it is done,
    so it runs in a thread, and a queue turns the callback into an iterator.
    """
    model.eval()
    stop_rule = StopRule(tokenizer, template, end_ids(model, template))
    settings = generation_settings(model, sampling, stop_rule, tokenizer.pad_token_id)
    precision = _precision(model, device)  # autocast belongs to a thread: as it is in the caller's
    tokens: queue.Queue[int | BaseException | None] = queue.Queue()
    closed = threading.Event()

    def on_token(ids: Sequence[int]) -> bool:
        tokens.put(ids[-1])
        return closed.is_set()

    def generate() -> None:
        try:
            with torch.inference_mode(), precision:
                _generate(model, [prompt], settings, stop_rule, device, on_token)
            tokens.put(None)
        except BaseException as error:  # for the caller's thread
            tokens.put(error)

    def pieces() -> Iterator[str]:
        thread = threading.Thread(target=generate, daemon=True)
        end_waiting_threads()
        thread.start()
        ids: list[int] = []
        shown = 0  # characters
        try:
            while isinstance(token := tokens.get(), int):
                ids.append(token)
                if piece := stop_rule.text(ids, ended=False)[shown:]:
                    shown += len(piece)
                    yield piece
            if token is not None:
                raise token
            if piece := stop_rule.finish(ids).text[shown:]:
                yield piece
        finally:
            closed.set()
            thread.join()

    return pieces()


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    stop_rule: StopRule,
    device: torch.device | str,
    on_token: Callable[[Sequence[int]], bool] | None = None,
) -> torch.Tensor:
    """The new tokens of every row, [rows, tokens], with anything after the first stop.

    on_token: called with the new tokens of the first row after each; True ends the generation.
    """
    longest = max(map(len, prompts))
    if (total := positions(model)) is not None:
        if longest >= total:
            raise InputError(
                f"A prompt of {longest} tokens leaves no room for an answer: the model sees {total}. Shorten it."
            )
        settings = copy.deepcopy(settings)
        settings.max_new_tokens = min(settings.max_new_tokens, total - longest)
    inputs = pad_left(prompts, settings.pad_token_id)
    # Padding repeats a row's own first token, for a repetition penalty that counts it: transformers 5.23 itself does
    # not, other versions may, and the pad token is often the end token.
    first = torch.tensor([ids[0] for ids in prompts])[:, None]
    inputs["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], first)

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            new = input_ids[:, longest:].tolist()
            over = on_token is not None and on_token(new[0])
            return torch.tensor([over or stop_rule.begins_turn(ids) for ids in new], device=input_ids.device)

    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    watched = on_token or stop_rule.turn_texts  # else the stop ids are enough, and no token leaves the device
    stopping = StoppingCriteriaList([Stop()] if watched else [])
    output = model.generate(**inputs, generation_config=settings, stopping_criteria=stopping)  # type: ignore[operator]
    return output[:, longest:]


def _precision(model: PreTrainedModel, device: torch.device | str) -> contextlib.AbstractContextManager:
    """The context that the model works in: the caller's autocast, else one in the dtype of a bf16 or fp16 base.

    Such a base with an adapter works under autocast only (common/model/lora.py, leave_casts_to_autocast).
    """
    kind = torch.device(device).type
    dtype: Any = model.get_input_embeddings().weight.dtype
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, torch.get_autocast_dtype(kind))
    return torch.autocast(kind, dtype) if dtype in (torch.bfloat16, torch.float16) else contextlib.nullcontext()
