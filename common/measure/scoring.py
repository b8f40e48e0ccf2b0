"""Answers of classifiers: by the probability of every label string after a prompt, by a head, or by generated text.

Label scoring computes what all prompts begin with once, then each prompt, then the tokens of the labels after it, the
likeliest branches first and as far as they can matter (common/measure/label_trie.py has a worked example).
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from common.data.classification import Example
from common.log import Progress
from common.measure.decisions import Decision
from common.measure.label_answer import Answer
from common.measure.label_trie import BUDGET, LabelChain, OneLabel, label_trie
from common.memory import give_back
from common.model import attention
from common.model.classifier import Classifier, HeadClassifier
from common.model.prompt_cache import Node, PaddedPrompts, PromptCache, TokenScorer, prefix_states
from common.model.sharding import lock_step
from common.text.batches import collate_head, common_prefix, pad_left
from common.text.prompts import HeadRow

TOLERANCE = 1e-6  # of a probability
WRITTEN = 0.5  # probability from which on one of several labels is written, so that those after it depend on it
ROWS_AT_ONCE = 8  # times the batch size, at most
NODES_AT_ONCE = 12  # per row, in a pass on a CPU


def predict(
    classifier: Classifier,
    examples: Sequence[Example],
    accelerator: Accelerator,
    batch_size: int,
    what: str,
    decode: Literal["score", "generate"] = "score",
    probabilities: bool = True,
    decision: Decision | None = None,
) -> list[Answer]:
    """The answers to `examples`, in their order, on every process; options as of `classify`.

    Processes share the rows, and results are gathered by row number, so that none is counted twice.
    what: the progress bar's caption.
    """
    answer = partial(classify, classifier, decode=decode, probabilities=probabilities, decision=decision)
    return _share_out(answer, classifier.model, examples, accelerator, batch_size, what)


def predict_outputs(
    classifier: Classifier, examples: Sequence[Example], accelerator: Accelerator, batch_size: int, what: str
) -> torch.Tensor:
    """What a head puts out for `examples`, in their order, on every process: fp32 [rows, outputs], as for `predict`."""

    model: Any = classifier.model

    def outputs(some: Sequence[Example], **options: Any) -> torch.Tensor:
        prompts = _rendered(classifier, some)
        return head_outputs(model, prompts, classifier.tokenizer.pad_token_id, **options)

    return torch.stack(_share_out(outputs, model, examples, accelerator, batch_size, what))


def _share_out(
    answer: Callable[..., Iterable[Any]],
    model: nn.Module,
    examples: Sequence[Example],
    accelerator: Accelerator,
    batch_size: int,
    what: str,
) -> list[Any]:
    """`answer` by the model of all examples, in their order, on every process, each of which answers its share."""
    share = range(accelerator.process_index, len(examples), accelerator.num_processes)
    progress = Progress(accelerator, what, len(share))
    give_back(accelerator.device.type, at_once=True)  # of what came before, as training
    with accelerator.autocast(), lock_step(model):
        answers = answer([examples[i] for i in share], device=accelerator.device, batch_size=batch_size,
                         progress=progress)  # fmt: skip
    give_back(accelerator.device.type, at_once=True)  # before what comes now, as baselines and pictures
    gathered = gather_object(list(zip(share, answers, strict=True)))
    return [answer for _, answer in sorted(gathered, key=lambda pair: pair[0])]


def classify(
    classifier: Classifier,
    examples: Sequence[Example],
    *,
    device: torch.device | str,
    batch_size: int,
    progress: Callable[[int], None] = lambda rows: None,
    decode: Literal["score", "generate"] = "score",
    labeled: bool = True,
    probabilities: bool = True,
    decision: Decision | None = None,
) -> list[Answer]:
    """The answers to `examples`, in their order, by this process alone and under its caller's autocast.

    progress: called with the number of rows done, after each batch. decode: `score` the labels, or `generate` text
    greedily. labeled: the examples have a gold answer, for the losses. probabilities: as of `score_labels`. decision:
    what answers are made of probabilities; unset: the unfitted one.
    """
    model: Any = classifier.model
    prompt, pad_id = classifier.prompt, classifier.tokenizer.pad_token_id
    prompts = _rendered(classifier, examples)
    gold = [example.labels for example in examples] if labeled else None
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "progress": progress}
    if classifier.head:
        answers = head_answers(head_outputs(model, prompts, pad_id, **options), prompt.multi_label, gold)
    elif decode == "generate":
        answers = generate_answers(classifier, prompts, **options)
    else:
        tolerance = TOLERANCE if probabilities else math.inf
        answers = score_labels(classifier, prompts, gold=gold, tolerance=tolerance, **options)
    decision = decision or Decision.unfitted(prompt.multi_label, len(prompt.labels))
    return decision.decide(answers, [example.text for example in examples])


def _rendered(classifier: Classifier, examples: Sequence[Example]) -> list[list[int]]:
    return [rendered.ids for rendered in classifier.prompt.prompts([example.text for example in examples])]


def batches(
    lengths: Sequence[int], size: int, longest: int | None = None, apart: Collection[int] = ()
) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, longest first.

    A batch has up to ROWS_AT_ONCE x size rows and, padded, the tokens of `size` rows of length `longest` (unset: the
    greatest).
    apart: rows that are never in a batch with others.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    longest = longest or max(lengths, default=0)
    for some in ([i for i in order if i in apart], [i for i in order if i not in apart]):
        while some:
            rows = max(1, min(ROWS_AT_ONCE * size, size * longest // max(1, lengths[some[0]])))
            yield some[:rows]
            some = some[rows:]


def _beyond(model: Any, prompts: Sequence[list[int]], answer_tokens: int = 0) -> set[int]:
    """The rows whose tokens, in a batch with others, would change the rotary embeddings of the others."""
    border = attention.rotary_border(model)
    return {i for i, ids in enumerate(prompts) if len(ids) + answer_tokens > border}


@torch.inference_mode()
def score_labels(
    classifier: Classifier,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    device: torch.device | str,
    gold: Sequence[Sequence[int]] | None = None,
    tolerance: float = TOLERANCE,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Answer]:
    """The answers of a generative classifier to rendered `prompts`, in their order.

    One label per row: probabilities are those of the label strings, their end included, normalized over the set; the
    answer is the likeliest. Several: `LabelChain`.
    batch_size: a batch holds as many tokens as this many of the longest prompts, its labels' tokens included, and up to
    eight times as many rows. gold: the right labels, for the loss. tolerance: how far a probability may be off; 0: as
    exact as the model; infinite: the same answers with less work, and for one label per row no probabilities.
    """
    model: Any = classifier.model.eval()
    prompt = classifier.prompt
    longest = max(map(len, prompts), default=0)
    answer_tokens = len(prompt.answer(range(len(prompt.labels)))) if prompt.multi_label else prompt.answer_tokens
    packs = attention.takes_packs(model, longest + answer_tokens)
    keep_keys = attention.keeps_keys(model, longest + answer_tokens)
    shared = common_prefix(prompts) if packs and len(prompts) > 1 else 0
    prefix = prefix_states(model, prompts[0][:shared], device) if shared else ()
    pieces = [*prompt.first_ids, *prompt.next_ids, prompt.end_ids]
    alphabet = sorted({token for ids in pieces for token in ids})
    scorer = TokenScorer(model, alphabet, classifier.tokenizer.pad_token_id, device)
    trie = cache(partial(label_trie, prompt))
    new_search: Callable[..., OneLabel | LabelChain] = partial(OneLabel, trie=trie(), tolerance=tolerance)
    if prompt.multi_label:
        new_search = partial(
            LabelChain, trie=trie, thresholds=[WRITTEN] * len(prompt.labels), tolerance=min(tolerance, TOLERANCE)
        )
    most = sum(map(len, pieces))  # tokens that may be computed after a prompt
    # Rows that want fewer are padded: on a CPU that costs what tokens cost, on a GPU less than another pass.
    width = NODES_AT_ONCE if packs and torch.device(device).type == "cpu" else most
    likely = min(most, 4 * BUDGET) if packs else most  # if there are more, `run_searches` halves the batch
    beyond = _beyond(model, prompts, answer_tokens)
    answers: dict[int, Answer] = {}
    for rows in batches([len(ids) - shared + likely for ids in prompts], batch_size, longest, beyond):
        some, positions = [prompts[i] for i in rows], attention.rotary_border(model) + 1 if rows[0] in beyond else 0
        batch = PromptCache(scorer, some, prefix) if packs else PaddedPrompts(scorer, some, keep_keys, positions)
        gold_ids = [prompt.label_ids(gold[i] if gold is not None else ()) for i in rows]
        searches = [new_search(root, also=ids) for root, ids in zip(batch.roots, gold_ids, strict=True)]
        run_searches(batch, searches, width, batch_size * longest)
        for i, root, search, ids in zip(rows, batch.roots, searches, gold_ids, strict=True):
            answers[i] = Answer(*search.answer())
            if gold is not None:
                _add_loss(answers[i], root, ids, prompt.end_ids)
        del batch, searches  # with the keys and values, before the next ones are made
        progress(len(rows))
        give_back(torch.device(device).type)
    return [answers[i] for i in range(len(prompts))]


def run_searches(
    batch: PromptCache | PaddedPrompts, searches: Sequence[OneLabel | LabelChain], width: int, most: int
) -> None:
    """Computes what the searches of a batch's rows want, all at once, until none wants more.

    width: nodes of a row in a pass at most. A batch that becomes more than `most` tokens is continued in halves.
    """
    waiting: dict[int, list[Node]] = {row: [] for row in batch.rows}
    work = [batch]
    while work:
        batch = work.pop()
        for row in batch.rows:
            waiting[row] = waiting[row] or searches[row].next_nodes()
        wanted = {row: waiting[row][:width] for row in batch.rows if waiting[row]}
        if other := batch.split(wanted, most):
            work += [other, batch]
        elif wanted:
            batch.compute(wanted)
            waiting |= {row: waiting[row][width:] for row in wanted}
            work.append(batch)


def _add_loss(answer: Answer, root: Node, ids: Sequence[int], end_ids: Sequence[int]) -> None:
    """The negative log-likelihood of the gold answer, and how many of its tokens are the likeliest."""
    node = root
    for token in ids:
        answer.nll -= node.log_probs[token]
        answer.correct += node.likeliest == token
        node = node.descend([token])
    answer.nll -= node.log_prob_of_any(end_ids)
    answer.correct += node.likeliest in end_ids
    answer.targets = len(ids) + 1


@torch.no_grad()
def head_outputs(
    model: HeadClassifier,
    prompts: Sequence[list[int]],
    pad_id: int,
    *,
    batch_size: int,
    device: torch.device | str,
    progress: Callable[[int], None] = lambda rows: None,
) -> torch.Tensor:
    """A head's outputs for `prompts`, in their order: fp32 [rows, outputs] on the CPU.

    `head_answers` reads them as labels; for a regression they are the answers.
    """
    config: Any = model.eval().model.config
    outputs = torch.zeros(len(prompts), config.num_labels)
    for rows in batches([len(ids) for ids in prompts], batch_size, apart=_beyond(model.model, prompts)):
        some = [(HeadRow(prompts[i], target=0), True) for i in rows]  # nothing reads the target
        batch = collate_head(some, pad_id, encoder=model.encoder).to(device)
        outputs[rows] = model(**batch.inputs).float().cpu()
        progress(len(rows))
        give_back(torch.device(device).type)
    return outputs


def head_answers(
    outputs: torch.Tensor,  # [rows, labels], logits
    multi_label: bool,
    gold: Sequence[Sequence[int]] | None = None,
) -> list[Answer]:
    """A head's outputs as probabilities, undecided, with their losses if the right labels are given.

    One label per row: softmax. Several: sigmoids.
    """
    logits = outputs.double()
    answers = [Answer(None, row) for row in (logits.sigmoid() if multi_label else logits.softmax(1)).tolist()]
    if gold is None:
        return answers
    right = torch.zeros_like(logits)
    for row, chosen in zip(right, gold, strict=True):
        row[list(chosen)] = 1.0
    if multi_label:
        losses = F.binary_cross_entropy_with_logits(logits, right, reduction="none").sum(1)
        correct = ((logits > 0) == (right > 0)).sum(1)
    else:
        losses = F.cross_entropy(logits, right.argmax(1), reduction="none")
        correct = logits.argmax(1) == right.argmax(1)
    for answer, loss, count in zip(answers, losses.tolist(), correct.tolist(), strict=True):
        answer.nll, answer.correct, answer.targets = loss, int(count), logits.shape[1] if multi_label else 1
    return answers


@torch.inference_mode()
def generate_answers(
    classifier: Classifier,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    device: torch.device | str,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Answer]:
    """Greedy answers as free text; one that is not in the label set has `labels` None and is kept."""
    prompt, tokenizer = classifier.prompt, classifier.tokenizer
    model: Any = classifier.model.eval()
    answers: dict[int, Answer] = {}
    beyond = _beyond(model, prompts, prompt.answer_tokens)
    for rows in batches([len(ids) for ids in prompts], batch_size, apart=beyond):
        inputs = pad_left([prompts[i] for i in rows], tokenizer.pad_token_id)
        output = model.generate(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            max_new_tokens=prompt.answer_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # a checkpoint's own settings would punish the labels, which the prompt has
            no_repeat_ngram_size=0,
            use_cache=True,
            eos_token_id=prompt.end_ids,
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, ids in zip(rows, output[:, inputs["input_ids"].shape[1] :], strict=True):
            text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            answers[i] = Answer(prompt.parse(text), [], text=text)
        progress(len(rows))
        give_back(torch.device(device).type)
    return [answers[i] for i in range(len(prompts))]
