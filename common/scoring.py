"""Label scoring: the log-probability of every label string after a prompt, so that no answer is outside the set.

Each batch of prompts runs once; its key-value cache is then expanded over the candidate answers, whose few tokens are
all that is computed per label.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import nn

from common.collate import HeadRow, collate_head, pad_left, to_device
from common.data import Example
from common.prompts import ClassificationPrompt
from common.runlog import Progress

CANDIDATES = 128  # rows of one forward pass over candidates: bounds the copies of the cache


@dataclass
class Answer:
    """What is known of one row: `probabilities` one a label; `labels` the answer (None: none of the set).

    nll and correct: negative log-likelihood of the gold answer and its greedily right tokens, of `targets` tokens.
    """

    labels: tuple[int, ...] | None
    probabilities: list[float]
    nll: float = 0.0
    correct: int = 0
    targets: int = 0
    text: str | None = None


@dataclass
class Classifier:
    """A model with what is needed to ask it: the renderer of its prompts, and how its answers are read."""

    model: nn.Module
    prompt: ClassificationPrompt
    tokenizer: Any
    head: bool
    encoder: bool
    thresholds: list[float]


def predict(
    classifier: Classifier,
    examples: Sequence[Example],
    accelerator: Any,
    batch_size: int,
    what: str,
    decode: str = "score",
) -> list[Answer]:
    """The answers to `examples`, in their order, on every process.

    Processes share the rows, and results are gathered by row number, so that none is counted twice. decode: `score`
    the labels, or `generate` text greedily.
    """
    share = range(accelerator.process_index, len(examples), accelerator.num_processes)
    prompt, pad_id = classifier.prompt, classifier.tokenizer.pad_token_id
    model = accelerator.unwrap_model(classifier.model)
    ids = [prompt.prompt(examples[i].text).ids for i in share]
    gold = [examples[i].labels for i in share]
    options = {
        "batch_size": batch_size,
        "device": accelerator.device,
        "progress": Progress(accelerator, what, len(ids)),
    }
    with accelerator.autocast():
        if classifier.head:
            rows = [(HeadRow(row, prompt.target(labels)), True) for row, labels in zip(ids, gold, strict=True)]
            options |= {"thresholds": classifier.thresholds, "pad_id": pad_id}
            answers = score_head(model, rows, encoder=classifier.encoder, **options)
        elif decode == "generate":
            answers = generate_answers(model, classifier.tokenizer, prompt, ids, **options)
        else:
            options |= {"thresholds": classifier.thresholds, "pad_id": pad_id}
            answers = score_labels(model, prompt, ids, gold=gold, **options)
    gathered = gather_object(list(zip(share, answers, strict=True)))
    return [answer for _, answer in sorted(gathered, key=lambda pair: pair[0])]


@dataclass(frozen=True)
class Candidate:
    """A continuation of prompt `row`: its log-probability is that of `ids` from `start` on, then of any of `enders`."""

    row: int
    ids: list[int]
    enders: list[int]
    start: int = 0


class PromptBatch:
    """Prompts run once, and any number of continuations scored from their cache."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int, device: Any) -> None:
        self.model, self.pad_id, self.device = model, pad_id, device
        self.inputs = {name: tensor.to(device) for name, tensor in pad_left(prompts, pad_id).items()}
        last = torch.tensor(
            [self.inputs["input_ids"].shape[1] - 1], device=device
        )  # 1 would copy the vocabulary matrix
        output = model(**self.inputs, use_cache=True, logits_to_keep=last)
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]

    def score(self, candidates: Sequence[Candidate]) -> tuple[list[float], list[int]]:
        """Log-probability of each candidate, and how many of its tokens (the end included) are the likeliest ones."""
        scores, correct = [], []
        for i in range(0, len(candidates), CANDIDATES):
            some = candidates[i : i + CANDIDATES]
            values, right = self._score(some)
            scores += values
            correct += right
        return scores, correct

    def _score(self, candidates: Sequence[Candidate]) -> tuple[list[float], list[int]]:
        rows = torch.tensor([c.row for c in candidates], device=self.device)
        longest = max(1, max(len(c.ids) for c in candidates))
        ids = torch.tensor([c.ids + [self.pad_id] * (longest - len(c.ids)) for c in candidates], device=self.device)
        mask = torch.tensor([[1] * len(c.ids) + [0] * (longest - len(c.ids)) for c in candidates], device=self.device)
        cache = copy.deepcopy(self.cache)
        cache.reorder_cache(rows)  # any row, any number of times; unlike batch_select_indices, recurrent states too
        steps = torch.arange(1, longest + 1, device=self.device)
        output = self.model(
            input_ids=ids,
            attention_mask=torch.cat([self.inputs["attention_mask"][rows], mask], 1),
            position_ids=self.inputs["position_ids"][rows, -1:] + steps,
            past_key_values=cache,
            use_cache=True,
        )
        # logits[:, i] predict token i of the candidate; those behind its last token predict the end.
        logits = torch.cat([self.logits[rows, None], output.logits], 1).float().log_softmax(-1)
        own = logits[:, :-1].gather(2, ids[:, :, None])[:, :, 0]
        likeliest = logits.argmax(-1)
        scores, correct = [], []
        for i, c in enumerate(candidates):
            n = len(c.ids)
            end = logits[i, n, c.enders].logsumexp(0)
            scores.append((own[i, c.start : n].sum() + end).item())
            correct.append(int((likeliest[i, :n] == ids[i, :n]).sum()) + (likeliest[i, n].item() in c.enders))
        return scores, correct


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for i in range(0, len(order), size):
        yield order[i : i + size]


@torch.inference_mode()
def score_labels(
    model: nn.Module,
    prompt: ClassificationPrompt,
    prompts: Sequence[Sequence[int]],
    *,
    gold: Sequence[Sequence[int]] | None = None,
    thresholds: Sequence[float],
    batch_size: int,
    pad_id: int,
    device: Any,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Answer]:
    """The answers of a generative classifier to rendered `prompts`, in their order.

    One label a row: probabilities are those of the label strings, their end included, normalised over the set; the
    answer is the likeliest. Several: `_chain`. gold: the right labels, for the loss.
    """
    model.eval()
    answers: list[Answer | None] = [None] * len(prompts)
    for rows in batches([len(ids) for ids in prompts], batch_size):
        batch = PromptBatch(model, [prompts[i] for i in rows], pad_id, device)
        if prompt.multi_label:
            found = _chain(batch, prompt, len(rows), thresholds)
        else:
            found = _single(batch, prompt, len(rows))
        if gold is not None:
            wanted = [Candidate(j, prompt.label_ids(gold[i]), prompt.end_ids) for j, i in enumerate(rows)]
            scores, correct = batch.score(wanted)
            for answer, candidate, score, right in zip(found, wanted, scores, correct, strict=True):
                answer.nll, answer.correct, answer.targets = -score, right, len(candidate.ids) + 1
        for i, answer in zip(rows, found, strict=True):
            answers[i] = answer
        progress(len(rows))
    return answers


def _single(batch: PromptBatch, prompt: ClassificationPrompt, rows: int) -> list[Answer]:
    candidates = [Candidate(row, ids, prompt.end_ids) for row in range(rows) for ids in prompt.first_ids]
    scores, _ = batch.score(candidates)
    probabilities = torch.tensor(scores, dtype=torch.double).view(rows, -1).softmax(1).tolist()
    return [Answer((max(range(len(p)), key=p.__getitem__),), p) for p in probabilities]


def _chain(batch: PromptBatch, prompt: ClassificationPrompt, rows: int, thresholds: Sequence[float]) -> list[Answer]:
    """Several labels: an answer is a chain of yes / no decisions in label order.

    With q_m the probability that label m comes next (then a separator or the end) after those already chosen, and
    q_stop that of the end, p_k = q_k / (q_k + sum of q_m over later m + q_stop); p_k at or above its threshold adds k.
    The p_k are the reported probabilities.
    """
    labels = len(prompt.labels)
    answers = [Answer((), [0.0] * labels) for _ in range(rows)]
    active = dict.fromkeys(range(rows), 0)  # row -> the label to decide next
    while active:
        candidates = []
        for row, k in active.items():
            chosen = answers[row].labels
            lead = prompt.label_ids(chosen)
            for m in range(k, labels):
                piece = prompt.next_ids[m] if chosen else prompt.first_ids[m]
                enders = sorted({ids[0] for ids in prompt.next_ids[m + 1 :]} | set(prompt.end_ids))
                candidates.append(Candidate(row, lead + piece, enders, len(lead)))
            candidates.append(Candidate(row, lead, prompt.end_ids, len(lead)))
        scores = iter(batch.score(candidates)[0])
        for row, k in list(active.items()):
            logs = [next(scores) for _ in range(labels - k + 1)]
            top = max(logs)
            q = [math.exp(value - top) for value in logs]  # of labels k, k + 1, ..., and of stopping
            first, chosen = k, False
            while k < labels and not chosen:
                answers[row].probabilities[k] = p = q[k - first] / sum(q[k - first :])
                chosen = p >= thresholds[k]
                k += 1
            if chosen:
                answers[row].labels += (k - 1,)
            active[row] = k
            if k == labels:
                del active[row]
    return answers


@torch.inference_mode()
def score_head(
    model: nn.Module,
    rows: Sequence[tuple[HeadRow, bool]],
    *,
    encoder: bool,
    thresholds: Sequence[float],
    batch_size: int,
    pad_id: int,
    device: Any,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Answer]:
    """The answers of a classification head to rows with their targets, in their order."""
    model.eval()
    answers: list[Answer | None] = [None] * len(rows)
    for numbers in batches([row.length for row, _ in rows], batch_size):
        batch = to_device(collate_head([rows[i] for i in numbers], pad_id, encoder=encoder), device)
        logits, targets = model(**batch["inputs"]).double(), batch["targets"]
        multi_label = targets.is_floating_point()
        if multi_label:
            probabilities = logits.sigmoid()
            losses = F.binary_cross_entropy_with_logits(logits, targets.double(), reduction="none").sum(1)
            correct = ((logits > 0) == (targets > 0)).sum(1)
        else:
            probabilities = logits.softmax(1)
            losses = F.cross_entropy(logits, targets, reduction="none")
            correct = logits.argmax(1) == targets
        columns = zip(numbers, probabilities.tolist(), losses.tolist(), correct.tolist(), strict=True)
        for i, p, loss, right in columns:
            if multi_label:
                labels = tuple(k for k, value in enumerate(p) if value >= thresholds[k])
            else:
                labels = (max(range(len(p)), key=p.__getitem__),)
            answers[i] = Answer(labels, p, loss, int(right), len(p) if multi_label else 1)
        progress(len(numbers))
    return answers


@torch.inference_mode()
def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    prompt: ClassificationPrompt,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    device: Any,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Answer]:
    """Greedy answers as free text; one that is not in the label set has `labels` None and is kept."""
    model.eval()
    answers: list[Answer | None] = [None] * len(prompts)
    for rows in batches([len(ids) for ids in prompts], batch_size):
        inputs = pad_left([prompts[i] for i in rows], tokenizer.pad_token_id)
        output = model.generate(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            max_new_tokens=prompt.answer_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # a checkpoint's own settings would punish the labels, which stand in the prompt
            no_repeat_ngram_size=0,
            use_cache=True,
            eos_token_id=prompt.end_ids,
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, ids in zip(rows, output[:, inputs["input_ids"].shape[1] :], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            answers[i] = Answer(prompt.parse(text), [], text=text)
        progress(len(rows))
    return answers
