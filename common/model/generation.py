"""Free answers of a model: token by token for a chat, or in batches, the same by both ways.

An answer ends at a stop id of the chat template, or where the model begins a turn that is not its own.
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
import transformers
from torch import nn

from common.errors import InputError
from common.options import Sampling
from common.text.batches import pad_left
from common.text.chat import ChatTemplate

NEW_TOKENS = 256  # of an answer, where neither the options nor the model's generation_config say


@dataclass(frozen=True)
class Generated:
    """An answer. text: without special tokens, and without blanks around it where a chat template is used.

    ids: the new tokens, the stop id included. stopped: whether the model ended by itself, at a stop id.
    """

    text: str
    ids: list[int]
    stopped: bool


def end_ids(model: nn.Module, template: ChatTemplate | None) -> list[int]:
    """The tokens that end an answer: those of the template, and those that the model's generation_config names."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([*(template.stop_ids if template else ()), *own]))


class Ending:
    """Where an answer ends. template: None for running text, which ends at the tokenizer's end token.

    own: further tokens that the model ends at. lead: what the template writes in front of every answer, though it
    asks without it (Qwen3's empty thinking); it is no part of the answer's text.
    stop_ids: the tokens that end an answer. turn_ids and turn_texts: what turns begin with by the template, as a
    special token where it has one and as text otherwise (a line break in front, if it has one); a model that goes on
    with a turn of the user has said what it had to.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate | None, own: Sequence[int] = ()) -> None:
        self.tokenizer, self.strip = tokenizer, template is not None
        self.lead = template.lead if template else ""
        self.turn_ids: list[int] = []
        self.turn_texts: list[str] = []
        if template is None:
            self.stop_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        else:
            self.stop_ids = list(template.stop_ids)
            for opening in _openings(template):
                self._add(opening.replace(template.end, ""))
        self.stop_ids = list(dict.fromkeys([*self.stop_ids, *own]))
        # As many tokens as may spell a turn's beginning, of a byte each.
        self._window = max((len(text.encode()) for text in self.turn_texts), default=0) + 2

    def _add(self, opening: str) -> None:
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        found = [name for name in special | set(self.tokenizer.all_special_tokens) if name in opening]
        if found:
            first = min(found, key=lambda name: (opening.index(name), -len(name)))
            self.turn_ids.append(self.tokenizer.convert_tokens_to_ids(first))
        elif opening.strip():
            blank = opening[: len(opening) - len(opening.lstrip())]
            self.turn_texts.append("\n" * ("\n" in blank) + opening.strip())

    @property
    def ids(self) -> list[int]:
        """All tokens at which generation ends."""
        return list(dict.fromkeys([*self.stop_ids, *self.turn_ids]))

    def in_turn(self, ids: Sequence[int], whole: bool = False) -> bool:
        """Whether the newest of the tokens made the text begin a turn; whole: or any of them."""
        if not self.turn_texts:
            return False
        tail = self._decode(ids if whole else ids[-self._window :])
        return any(turn.strip() in tail for turn in self.turn_texts) and self._cut(self._decode(ids)) is not None

    def text(self, ids: Sequence[int], ended: bool = True) -> str:
        """The text of an answer; of one that has not ended, only what will stay whatever follows."""
        text = self._decode([token for token in ids if token not in self.stop_ids])  # not all are marked as special
        if self.lead and text.lstrip().startswith(self.lead):
            text = text.lstrip().removeprefix(self.lead)
        elif self.lead and not ended and self.lead.startswith(text.lstrip()):
            return ""
        cut = self._cut(text)
        if cut is not None:
            text = text[:cut]
        elif not ended:
            text = text[: len(text) - self._held(text)]
        if not self.strip:
            return text
        return text.strip()  # blanks at the end stay away until something follows them

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _cut(self, text: str) -> int | None:
        """Where a turn begins in the text: at the start of a line, blanks aside, if the template begins one for it."""
        ways = [
            f"(?:^|\n)[ \t]*{re.escape(turn[1:])}" if turn[0] == "\n" else re.escape(turn) for turn in self.turn_texts
        ]
        found = re.search("|".join(ways), text) if ways else None
        return found and found.start()

    def _held(self, text: str) -> int:
        """How many characters at the text's end may change, or become a turn's beginning."""
        half = len(text) - len(text.rstrip("\ufffd"))  # bytes of a character whose other bytes follow
        held = [n for turn in self.turn_texts for n in range(1, len(turn)) if text.endswith(turn[:n])]
        line = text.rpartition("\n")[2]
        if any(turn[0] == "\n" and turn[1:].startswith(line.lstrip(" \t")) for turn in self.turn_texts):
            held.append(len(line) + 1)
        return min(len(text), max([half, *held]))


def _openings(template: ChatTemplate) -> list[str]:
    """What the template writes in front of a user's turn behind an answer, and in front of an answer."""
    turns = [{"role": role, "content": f"x{role}x"} for role in ("user", "assistant")]
    asked = template.text_of(turns[:1]).rpartition("xuserx")[2]
    again = template.text_of([*turns, {"role": "user", "content": "xagainx"}])
    return [again.partition("xassistantx")[2].partition("xagainx")[0], asked]


def generation_settings(model: nn.Module, sampling: Sampling, ending: Ending, pad_id: int) -> Any:
    """transformers' GenerationConfig: the model's own, with what `sampling` sets.

    Any setting of a draw asks for drawing, unless do_sample or temperature 0 says otherwise.
    """
    settings = copy.deepcopy(model.generation_config)
    given = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k")}
    drawn = any(value is not None for value in given.values()) or settings.do_sample
    settings.do_sample = bool(drawn if sampling.do_sample is None else sampling.do_sample) and sampling.temperature != 0
    for name, value in {**given, "repetition_penalty": sampling.repetition_penalty}.items():
        if value is not None:
            setattr(settings, name, value)
    settings.max_new_tokens = sampling.max_new_tokens or settings.max_new_tokens or NEW_TOKENS
    settings.num_beams, settings.num_return_sequences, settings.use_cache = 1, 1, True
    settings.eos_token_id, settings.pad_token_id = ending.ids or None, pad_id
    return settings


def positions(model: nn.Module) -> int | None:
    """How many tokens the model can see, prompt and answer; None: as many as there are."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def prompt_room(model: nn.Module, sampling: Sampling) -> int | None:
    """The tokens that a prompt may have so that an answer fits behind it: at least half of the model's positions."""
    total = positions(model)
    wanted = sampling.max_new_tokens or model.generation_config.max_new_tokens or NEW_TOKENS
    return None if total is None else max(total - wanted, total // 2)


def answer_prompts(
    model: nn.Module,
    tokenizer: Any,
    template: ChatTemplate | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int,
    device: Any,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Generated]:
    """The answers to `prompts` (token ids), in their order; template: None continues running text.

    Rows are padded on the left, with mask and positions, so greedy answers do not depend on the batch (in fp32; lower
    precisions round differently with the shape). Drawn ones depend on seed and batch. Longest prompts come first; one
    whose answer could reach the end of the model's positions goes alone. Sets the seed.
    Raises InputError where a prompt leaves no room for an answer.
    """
    model.eval()  # in training mode, gradient checkpointing would drop the keys and values, and change the text
    torch.manual_seed(sampling.seed)
    ending = Ending(tokenizer, template, end_ids(model, template))
    settings = generation_settings(model, sampling, ending, tokenizer.pad_token_id)
    total = positions(model)
    answers: list[Generated | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    crowded = [i for i in order if total is not None and len(prompts[i]) + settings.max_new_tokens > total]
    roomy = [i for i in order if i not in set(crowded)]
    groups = [[i] for i in crowded] + [roomy[k : k + batch_size] for k in range(0, len(roomy), batch_size)]
    for rows in groups:
        some = [prompts[i] for i in rows]
        with torch.inference_mode(), _precision(model, device)():
            output = _generate(model, some, settings, ending, device)
        for i, ids in zip(rows, output.tolist(), strict=True):
            answers[i] = _finish(ids, ending)
        progress(len(rows))
    return answers


def stream(
    model: nn.Module,
    tokenizer: Any,
    template: ChatTemplate | None,
    prompt: Sequence[int],
    sampling: Sampling,
    device: Any,
) -> Iterator[str]:
    """The text of one answer in pieces, as it comes; together they are what `answer_prompts` gives for this prompt.

    Closing the iterator, or an exception in it (Ctrl-C), ends the generation at the next token. It sets no seed, so
    that a question asked again is drawn anew.
    """
    model.eval()
    ending = Ending(tokenizer, template, end_ids(model, template))
    settings = generation_settings(model, sampling, ending, tokenizer.pad_token_id)
    precision = _precision(model, device)  # autocast belongs to a thread: as it is in the caller's
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()
    stop = threading.Event()

    def say(ids: Sequence[int], said: int, ended: bool) -> int:
        text = ending.text(ids, ended)
        if len(text) > said:
            pieces.put(text[said:])
        return max(said, len(text))

    def work() -> None:
        said = 0

        def follow(new: Sequence[int]) -> bool:
            nonlocal said
            if new[-1] not in ending.ids:
                said = say(new, said, False)
            return stop.is_set()

        try:
            with torch.inference_mode(), precision():
                output = _generate(model, [prompt], settings, ending, device, follow)
            say(_finish(output[0].tolist(), ending).ids, said, True)
            pieces.put(None)
        except BaseException as error:  # for the caller's thread
            pieces.put(error)

    def run() -> Iterator[str]:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            stop.set()
            thread.join()

    return run()


def _generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: Any,
    ending: Ending,
    device: Any,
    follow: Callable[[Sequence[int]], bool] | None = None,
) -> torch.Tensor:
    """The new tokens of every row, [rows, tokens], with anything behind the first stop.

    follow: called with the new tokens of the first row after each; True ends the generation.
    """
    longest = max(map(len, prompts))
    if (total := positions(model)) is not None:
        if longest >= total:
            raise InputError(
                f"A prompt of {longest} tokens leaves no room for an answer: the model sees {total}. Shorten it."
            )
        if longest + settings.max_new_tokens > total:
            settings = copy.deepcopy(settings)
            settings.max_new_tokens = total - longest
    inputs = pad_left(prompts, settings.pad_token_id)
    # Padding repeats a row's own first token, for a repetition penalty that counts it: transformers 5.23 itself does
    # not, other versions may, and the pad token is often the end's.
    first = torch.tensor([ids[0] for ids in prompts])[:, None]
    inputs["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], first)

    class Stop(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            new = input_ids[:, longest:].tolist()
            over = follow is not None and follow(new[0])
            return torch.tensor([over or ending.in_turn(ids) for ids in new], device=input_ids.device)

    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    watched = follow is not None or ending.turn_texts  # else the stop ids are enough, and no token leaves the device
    stopping = transformers.StoppingCriteriaList([Stop()] if watched else [])
    output = model.generate(**inputs, generation_config=settings, stopping_criteria=stopping)
    return output[:, longest:]


def _finish(ids: list[int], ending: Ending) -> Generated:
    """The answer in the new tokens of a row, which end at the first stop."""
    stops = set(ending.ids)
    ids = ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids)) + 1]
    if ending.in_turn(ids, whole=True):  # what stands behind the turn's beginning is padding, often the end token
        ids = ids[: next(n for n in range(1, len(ids) + 1) if ending.in_turn(ids[:n]))]
    return Generated(ending.text(ids), ids, bool(ids) and ids[-1] in ending.stop_ids)


def _precision(model: nn.Module, device: Any) -> Callable[[], Any]:
    """Makes the context that the model works in: the caller's autocast, else one in the dtype of a bf16 or fp16 base.

    Such a base with an adapter works under autocast only (modeling.leave_casts_to_autocast).
    """
    kind = torch.device(device).type
    dtype = model.get_input_embeddings().weight.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext
    return lambda: torch.autocast(kind, dtype)
