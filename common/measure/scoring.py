"""Label scoring: the log-probability of every label string after a prompt, so that no answer is outside the set.

What all prompts begin with runs once, each prompt once after it, and then the tokens of the labels as a tree behind
each, best first (common/trie.py), as far as they can matter.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import nn

from common.data.classification import Example
from common.log import Progress
from common.measure.label_trie import BUDGET, Search, Trie, build_trie
from common.model import attention
from common.model.classifier import Classifier
from common.model.prompt_cache import Node, PlainPrompts, Prompts, log_sum, prefix_states
from common.text.batches import HeadRow, collate_head, common_prefix, pad_left, to_device
from common.text.prompts import ClassificationPrompt

TOLERANCE = 1e-6  # of a probability
NODES_AT_ONCE = 12  # of a row, in a pass on a CPU


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


def predict(
    classifier: Classifier,
    examples: Sequence[Example],
    accelerator: Any,
    batch_size: int,
    what: str,
    decode: str = "score",
    probabilities: bool = True,
) -> list[Answer]:
    """The answers to `examples`, in their order, on every process.

    Processes share the rows, and results are gathered by row number, so that none is counted twice. decode: `score`
    the labels, or `generate` text greedily. probabilities: as of `score_labels`.
    """
    share = range(accelerator.process_index, len(examples), accelerator.num_processes)
    answers = classify(
        classifier,
        [examples[i] for i in share],
        accelerator,
        batch_size,
        Progress(accelerator, what, len(share)),
        decode,
        probabilities=probabilities,
    )
    gathered = gather_object(list(zip(share, answers, strict=True)))
    return [answer for _, answer in sorted(gathered, key=lambda pair: pair[0])]


def classify(
    classifier: Classifier,
    examples: Sequence[Example],
    accelerator: Any,
    batch_size: int,
    progress: Callable[[int], None] = lambda rows: None,
    decode: str = "score",
    labelled: bool = True,
    probabilities: bool = True,
) -> list[Answer]:
    """The answers of this process alone to `examples`, in their order; labelled: they have a gold answer."""
    prompt, pad_id = classifier.prompt, classifier.tokenizer.pad_token_id
    model = accelerator.unwrap_model(classifier.model)
    ids = [prompt.prompt(example.text).ids for example in examples]
    gold = [example.labels for example in examples] if labelled else None
    options = {"batch_size": batch_size, "device": accelerator.device, "progress": progress}
    with accelerator.autocast():
        if classifier.head:
            targets = [prompt.target(labels) for labels in gold or [(0,)] * len(ids)]
            rows = [(HeadRow(row, target), True) for row, target in zip(ids, targets, strict=True)]
            options |= {"thresholds": classifier.thresholds, "pad_id": pad_id}
            return score_head(model, rows, encoder=classifier.encoder, **options)
        if decode == "generate":
            return generate_answers(model, classifier.tokenizer, prompt, ids, **options)
        options |= {"thresholds": classifier.thresholds, "pad_id": pad_id}
        return score_labels(model, prompt, ids, gold=gold, probabilities=probabilities, **options)


def batches(lengths: Sequence[int], size: int, longest: int | None = None) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, longest first.

    A batch has up to 8 x size rows and, padded, the tokens of `size` rows of length `longest` (unset: the greatest).
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        longest = longest or lengths[order[0]]
        rows = max(1, min(8 * size, size * longest // max(1, lengths[order[0]])))
        yield order[:rows]
        order = order[rows:]


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
    exhaustive: bool = False,
    probabilities: bool = True,
) -> list[Answer]:
    """The answers of a generative classifier to rendered `prompts`, in their order.

    One label a row: probabilities are those of the label strings, their end included, normalised over the set; the
    answer is the likeliest. Several: `_chain`. Probabilities are right to TOLERANCE; exhaustive: to the model's own
    precision. probabilities false: the same answers with less work, and of one label a row no probabilities.
    gold: the right labels, for the loss. batch_size: a batch holds as many tokens as so many of the longest
    prompts, its labels' tokens included, and up to eight times as many rows.
    """
    model.eval()
    longest = max(map(len, prompts), default=0)
    answer = len(prompt.answer(range(len(prompt.labels)))) if prompt.multi_label else prompt.answer_tokens
    packs = attention.takes_packs(model, longest + answer)
    shared = common_prefix(prompts) if packs and len(prompts) > 1 else 0
    prefix = prefix_states(model, prompts[0][:shared], device) if shared else ()
    pieces = [*prompt.first_ids, *prompt.next_ids, prompt.end_ids]
    options = {"alphabet": sorted({token for ids in pieces for token in ids}), "pad_id": pad_id, "device": device}
    if packs:
        ask = functools.partial(Prompts, model, prefix=prefix, **options)
    else:
        ask = functools.partial(PlainPrompts, model, cached=attention.keeps_keys(model, longest + answer), **options)
    tries = functools.cache(functools.partial(_trie, prompt))
    tolerance = 0.0 if exhaustive else TOLERANCE if probabilities or prompt.multi_label else math.inf
    answers: list[Answer | None] = [None] * len(prompts)
    most = sum(len(ids) for ids in pieces)  # tokens that may be computed behind a prompt
    # Rows that ask for less are padded: on a CPU that costs what tokens cost, on a GPU less than a further pass.
    width = NODES_AT_ONCE if packs and torch.device(device).type == "cpu" else most
    likely = min(most, 4 * BUDGET) if packs else most  # if they are more, `_settle` halves the batch
    for rows in batches([len(ids) - shared + likely for ids in prompts], batch_size, longest):
        batch = ask([prompts[i] for i in rows])
        roots, talks = batch.roots, {}
        for j, (i, root) in enumerate(zip(rows, roots, strict=True)):
            known = root.walk(prompt.label_ids(gold[i])).path() if gold is not None else []
            if prompt.multi_label:
                talks[j] = _chain(root, thresholds, tries, known, tolerance)
            else:
                talks[j] = _single(root, tries(0, False), known, tolerance)
        for j, answer in _settle(batch, talks, {}, width, batch_size * longest):
            answers[rows[j]] = answer
            if gold is not None:
                _note_loss(answer, roots[j], prompt.label_ids(gold[rows[j]]), prompt.end_ids)
        del batch, talks  # with the keys and values, before the next ones are made
        progress(len(rows))
    return answers


def _settle(
    batch: Prompts | PlainPrompts,
    talks: dict[int, Iterator[list[Node]]],
    queues: dict[int, list[Node]],
    width: int,
    most: int,
) -> Iterator[tuple[int, Answer]]:
    """The answers at which the talks of a batch's prompts arrive, each with its prompt's number.

    What they ask for is computed for all at once, `width` nodes of each at most; queues: what waits. A batch of more
    than `most` tokens goes on in halves.
    """
    while talks:
        for j, talk in list(talks.items()):
            try:
                queues[j] = queues.get(j) or next(talk)
            except StopIteration as end:
                yield j, end.value
                del talks[j]
        wanted = {j: queues[j][:width] for j in talks}
        if other := batch.split(wanted, most):
            for half in (batch, other):
                yield from _settle(half, {j: talks[j] for j in half.rows}, queues, width, most)
            return
        if wanted:
            batch.compute(wanted)
            queues |= {j: queues[j][width:] for j in talks}


def _trie(prompt: ClassificationPrompt, first: int, going_on: bool) -> Trie:
    """One label: all of them. Several: labels from `first` on, behind others if `going_on`, and then stopping."""
    if not prompt.multi_label:
        return build_trie([(ids, prompt.end_ids) for ids in prompt.first_ids])
    pieces, candidates = prompt.next_ids if going_on else prompt.first_ids, []
    for k in range(first, len(prompt.labels)):
        followers = {ids[0] for ids in prompt.next_ids[k + 1 :]} | set(prompt.end_ids)
        candidates.append((pieces[k], sorted(followers)))
    return build_trie([*candidates, ([], prompt.end_ids)])


def _single(root: Node, trie: Trie, known: list[Node], tolerance: float) -> Iterator[list[Node]]:
    search = Search(root, trie)
    yield from search.run(tolerance, known)
    if tolerance == math.inf:
        return Answer((search.best(),), [])
    logs = search.scores()
    total = log_sum(logs)
    return Answer((search.best(),), [math.exp(log - total) for log in logs])


def _chain(
    root: Node, thresholds: Sequence[float], tries: Callable[..., Trie], known: list[Node], tolerance: float
) -> Iterator[list[Node]]:
    """Several labels: an answer is a chain of yes / no decisions in label order.

    With q_m the probability that label m comes next (then a separator or the end) after those already chosen, and
    q_stop that of the end, p_k = q_k / (q_k + sum of q_m over later m + q_stop); p_k at or above its threshold adds k.
    The p_k are the reported probabilities.
    """
    node, chosen, probabilities = root, (), []
    while len(probabilities) < len(thresholds):
        first = len(probabilities)
        search = Search(node, tries(first, bool(chosen)))
        limit, left, least = tolerance, math.inf, 0.0
        while left > tolerance * least:  # of what the last decision was made among
            yield from search.run(limit, known)
            logs = search.scores()
            top = max(logs)
            q = [math.exp(log - top) for log in logs]  # of labels first, first + 1, ..., and of stopping
            left, found = math.exp(search.left_out() - top), []
            while len(found) < len(q) - 1 and not (found and found[-1] >= thresholds[first + len(found) - 1]):
                least = sum(q[len(found) :])
                found.append(q[len(found)] / least if least else 0.0)
            limit *= least / sum(q) / 2
        probabilities += found
        last = len(probabilities) - 1
        if found[-1] >= thresholds[last]:
            chosen += (last,)
            node = search.node(len(found) - 1)
    return Answer(chosen, probabilities)


def _note_loss(answer: Answer, root: Node, ids: Sequence[int], end_ids: Sequence[int]) -> None:
    """The negative log-likelihood of the gold answer, and how many of its tokens are the likeliest."""
    node = root
    for token in ids:
        answer.nll -= node.logs[token]
        answer.correct += node.likeliest == token
        node = node.walk([token])
    answer.nll -= node.log_any(end_ids)
    answer.correct += node.likeliest in end_ids
    answer.targets = len(ids) + 1


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
