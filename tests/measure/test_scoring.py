"""Label scores against one full sequence per label through plain transformers, and what batches, order and processes
must not change."""

import gc
import json
import math
import random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from helpers import ROOT
from helpers import SHARED as REAL_DATA
from helpers.models import FAMILIES
from helpers.scoring import LABELS, TEXTS, load, predicted, prompt_of
from helpers.scripts import run_script

import train_cls
from common.data.classification import Example
from common.data.files import read_rows
from common.measure import label_trie, scoring
from common.measure.label_trie import LabelChain
from common.measure.metrics import confusion_matrix, summarize
from common.model import attention, prompt_cache
from common.model.classifier import Classifier, HeadClassifier
from common.model.token_losses import TokenLosses
from common.text.batches import collate_answers, common_prefix
from common.text.prompts import AnswerRow
from common.train.loop import count_targets

PAD = SimpleNamespace(pad_token_id=2)  # a tokenizer, of which label scoring reads no more


def score(model, prompt, texts=TEXTS, batch_size=4, thresholds=None, tolerance=0.0, **options):
    """thresholds: of the chain of several labels, in place of 0.5 each."""
    prompts = [prompt.prompt(text).ids for text in texts]
    classifier = Classifier(model, prompt, PAD)

    def chain(*given, **facts):
        return LabelChain(*given, **{**facts, "thresholds": thresholds or facts["thresholds"]})

    with mock.patch.object(scoring, "LabelChain", chain):
        return scoring.score_labels(
            classifier, prompts, batch_size=batch_size, device="cpu", tolerance=tolerance, **options
        )


@torch.no_grad()
def slow(model, prompt: list[int], answer: list[int]) -> float:
    """Log-probability of `answer`: one sequence, no cache, no padding."""
    logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))


def fake_accelerator(rank: int = 0, world: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        process_index=rank, num_processes=world, is_main_process=rank == 0, device=torch.device("cpu"),
        autocast=torch.no_grad,
    )  # fmt: skip


both_ways = pytest.mark.parametrize("packs", [True, False], ids=["packs", "plain"])


@both_ways
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_one_sequence_per_label(models, family, packs):
    """1e-4 in log-probability, 1e-5 in normalized probability, which sum to 1; best first, to 1e-6 more."""
    model, tokenizer = load(models, family, packs)
    prompt = prompt_of(tokenizer)
    lengths = [len(ids) for ids in prompt.first_ids]
    assert min(lengths) == 1 < max(lengths) and prompt.first_ids[1][0] == prompt.first_ids[0][0]
    texts = [" ".join(TEXTS), *TEXTS]  # in a row as long as the first, several have room
    prompts = [prompt.prompt(text).ids for text in texts]
    own = [len(ids) - common_prefix(prompts) for ids in prompts]
    assert len(prompt_cache.fill_rows(own)) < len(prompts)
    expected = torch.tensor([[slow(model, ids, prompt.answer([k])) for k in range(len(LABELS))] for ids in prompts])
    answers = score(model, prompt, texts, 16)
    logs = torch.tensor([a.probabilities for a in answers]).log()
    assert (logs - expected.log_softmax(1)).abs().max() < 1e-4
    assert (torch.tensor([a.probabilities for a in answers]) - expected.softmax(1)).abs().max() < 1e-5
    assert [a.labels for a in answers] == [(k,) for k in expected.argmax(1).tolist()]
    assert all(abs(sum(a.probabilities) - 1) < 1e-12 for a in answers)
    for answer, quick in zip(answers, score(model, prompt, texts, 16, tolerance=scoring.TOLERANCE), strict=True):
        assert quick.labels == answer.labels
        assert quick.probabilities == pytest.approx(answer.probabilities, abs=2e-6)
    assert [a.labels for a in score(model, prompt, texts, 16, tolerance=math.inf)] == [a.labels for a in answers]
    assert expected.exp().sum(1).max() <= 1  # with its end, no label is a part of another


@pytest.mark.skipif(not REAL_DATA.exists(), reason="real data lie beside the project")
def test_scores_of_real_rows_equal_one_sequence_per_label(models):
    """500 questions to a bank, labels of which many begin alike: scores to 1e-4, the same answer in every row."""
    rows = read_rows(str(REAL_DATA / "banking77" / "test.csv"))
    model, tokenizer = load(models, "llama")
    labels = sorted({row["label_name"] for row in rows if row["label_name"].startswith("car")})
    prompt = prompt_of(tokenizer, labels=labels, template="A question:\n{text}\nIts topic: {label}")
    answers = [prompt.answer([k]) for k in range(len(labels))]
    longest = max(map(len, answers))
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in answers])
    counts = torch.tensor([[1.0] * len(ids) + [0.0] * (longest - len(ids)) for ids in answers])
    texts = [row["text"] for row in rows[::6][:500]]
    exact, quick = score(model, prompt, texts, 32), score(model, prompt, texts, 32, tolerance=scoring.TOLERANCE)
    for text, answer, other in zip(texts, exact, quick, strict=True):
        front = torch.tensor([prompt.prompt(text).ids] * len(labels))
        with torch.no_grad():  # every label after its prompt, padded on the right, which no token sees
            logits = model(torch.cat([front, padded[:, :-1]], 1), use_cache=False, logits_to_keep=longest).logits
        logs = (logits.log_softmax(2).gather(2, padded[:, :, None])[:, :, 0] * counts).sum(1).log_softmax(0)
        assert (torch.tensor(answer.probabilities, dtype=torch.double).log() - logs).abs().max() < 1e-4
        assert answer.labels == other.labels == (logs.argmax().item(),)
        assert other.probabilities == pytest.approx(answer.probabilities, abs=2e-6)


KINDS = [("MistralConfig", True), ("Gemma3TextConfig", True), ("Qwen3_5TextConfig", False), ("DogeConfig", False)]


@pytest.mark.parametrize(("kind", "cached"), KINDS)
def test_scores_with_windows_states_and_masks_of_their_own(models, kind, cached):
    """Models that take no packs are scored all the same, and a prompt is computed once where its keys can be kept."""
    shape = json.loads((models["mistral"] / "config.json").read_text())
    shape |= {"sliding_window": 8, "num_hidden_layers": 4, "architectures": None, "model_type": None,
              "rope_parameters": None}  # which differ in shape between families and versions
    config = getattr(transformers, kind)(**{name: value for name, value in shape.items() if value is not None})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.ndim > 1):
            parameter.normal_(std=0.2)
    attention.use(model)
    assert not attention.takes_packs(model, 100)
    tokenizer = load(models, "mistral")[1]
    prompt, texts = prompt_of(tokenizer), TEXTS[2:4]
    prompts = [prompt.prompt(text).ids for text in texts]
    expected = [[slow(model, ids, prompt.answer([k])) for k in range(5)] for ids in prompts]
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _, args, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True)
    for answer, logs in zip(score(model, prompt, texts, batch_size=8), torch.tensor(expected), strict=True):
        assert answer.probabilities == pytest.approx(logs.softmax(0).tolist(), abs=1e-5)
    assert len(prompts[0]) != len(prompts[1]) and shapes[0] == (2, max(map(len, prompts)))
    assert len(shapes) > 1 and (max(width for _, width in shapes[1:]) < 8 < shapes[0][1]) == cached


def phi(models, border: int, kind: str = "AutoModelForCausalLM", **changes) -> transformers.PreTrainedModel:
    """Phi-3's rotary embeddings: in a pass with more than `border` positions, those of all tokens are others."""
    shape = json.loads((models["llama"] / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id")  # fmt: skip
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0, 9.0, 27.0, 81.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": border, **factors}
    config = transformers.Phi3Config(
        **{name: shape[name] for name in names}, original_max_position_embeddings=border, rope_parameters=rope,
        pad_token_id=2, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, kind).from_config(config).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.ndim > 1):
            parameter.normal_(std=0.2)
    attention.use(model)
    return model


@pytest.mark.parametrize("way", ["single", "multi", "generate", "head"])
def test_no_row_gets_the_rotary_embeddings_of_a_longer_one(models, way):
    """A row in a batch is what it is alone, be it below the border, above it, or above with its answer only."""
    tokenizer = load(models, "llama")[1]
    prompt = prompt_of(tokenizer, way == "multi")
    texts = [*TEXTS[:3], "match " * 20, *TEXTS[3:5], "goal", "team"]
    lengths = [len(prompt.prompt(text).ids) for text in texts]
    answer = len(prompt.answer(range(5))) if way == "multi" else prompt.answer_tokens
    for border in (lengths[0] - 1, lengths[0] + answer - 1, lengths[0] + answer)[2 * (way == "generate") :]:
        assert min(lengths) < border < max(lengths)
        model = (
            phi(models, border, "AutoModelForSequenceClassification", num_labels=5)
            if way == "head"
            else phi(models, border)
        )
        classifier = Classifier(HeadClassifier(model, False) if way == "head" else model, prompt, tokenizer)

        def answers(texts: list[str], classifier=classifier) -> list:
            rows = [Example("", text, ()) for text in texts]
            decode = "generate" if way == "generate" else "score"
            return scoring.classify(classifier, rows, device="cpu", batch_size=8, decode=decode, labeled=False)

        for text, found in zip(texts, answers(texts), strict=True):
            (alone,) = answers([text])
            assert found.labels == alone.labels and found.text == alone.text
            assert found.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
        for text, found in zip(texts, answers(texts) if way == "single" else [], strict=False):
            ids, labels = prompt.prompt(text).ids, range(len(LABELS))
            if len(ids) > border or len(ids) + answer <= border:  # the same embeddings for all labels in any case
                logs = torch.tensor([slow(model, ids, prompt.answer([k])) for k in labels])
                assert found.probabilities == pytest.approx(logs.softmax(0).tolist(), abs=1e-5)


def test_a_model_that_returns_all_logits_is_read_at_their_ends(models, monkeypatch):
    """Some take `logits_to_keep` and do not mind it."""
    model, tokenizer = load(models, "llama", packs=False)
    prompt = prompt_of(tokenizer)
    wanted, forward = score(model, prompt), model.forward
    monkeypatch.setattr(model, "forward", lambda logits_to_keep, **inputs: forward(**inputs))
    for answer, right in zip(score(model, prompt), wanted, strict=True):
        assert answer.probabilities == pytest.approx(right.probabilities, abs=1e-6)


def decide(model, prompt, ids: list[int], thresholds: list[float]) -> tuple[tuple[int, ...], list[float]]:
    """The chain by its definition, label by label, each q_m summed over the tokens that may follow label m."""
    n, chosen, probabilities = len(prompt.labels), (), []
    while len(probabilities) < n:
        lead = prompt.label_ids(chosen)
        q = {"stop": math.exp(slow(model, ids + lead, prompt.end_ids))}
        for m in range(len(probabilities), n):
            piece = (prompt.next_ids if chosen else prompt.first_ids)[m]
            followers = {prompt.end_ids[0], *(later[0] for later in prompt.next_ids[m + 1 :])}
            q[m] = sum(math.exp(slow(model, ids + lead, [*piece, token])) for token in followers)
        for k in range(len(probabilities), n):
            later = sum(q[m] for m in range(k + 1, n))
            probabilities.append(q[k] / (q[k] + later + q["stop"]))
            if probabilities[k] >= thresholds[k]:
                chosen += (k,)
                break
    return chosen, probabilities


@both_ways
@pytest.mark.parametrize("family", FAMILIES)
def test_chain_equals_its_definition(models, family, packs):
    """Several labels: some chosen, none (thresholds above 1), all (thresholds 0); texts of unequal length."""
    model, tokenizer = load(models, family, packs)
    prompt = prompt_of(tokenizer, True)
    seen = set()
    first = score(model, prompt, TEXTS[:1], thresholds=[1.1] * 5)[0].probabilities
    some = [1.1, first[1] * 0.999, 1.1, 0.0, 1.1]  # the first text gets labels 1 and 3
    for thresholds in ([0.5] * 5, some, [1.1] * 5, [0.0] * 5):
        answers = score(model, prompt, TEXTS[:4], batch_size=3, thresholds=thresholds)
        for text, answer in zip(TEXTS, answers, strict=False):
            labels, probabilities = decide(model, prompt, prompt.prompt(text).ids, thresholds)
            assert answer.labels == labels
            assert answer.probabilities == pytest.approx(probabilities, abs=1e-5)
            assert answer.probabilities == pytest.approx(probabilities, rel=1e-3)  # many are tiny
            seen.add(labels)
        quick = score(model, prompt, TEXTS[:4], batch_size=3, thresholds=thresholds, tolerance=scoring.TOLERANCE)
        for answer, other in zip(answers, quick, strict=True):
            assert other.labels == answer.labels
            assert other.probabilities == pytest.approx(answer.probabilities, abs=2e-6)
    assert {(), (1, 3), (0, 1, 2, 3, 4)} <= seen


@both_ways
@pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_and_row_order_change_nothing(models, family, multi_label, packs, monkeypatch):
    """Rows are batched by length, and few or many nodes are wanted at a time."""
    model, tokenizer = load(models, family, packs)
    prompt = prompt_of(tokenizer, multi_label)
    thresholds = [0.05] * len(LABELS)  # low, so that a random model chooses some
    answers = score(model, prompt, batch_size=8, thresholds=thresholds)
    order = random.Random(0).sample(range(len(TEXTS)), len(TEXTS))
    shuffled = score(model, prompt, [TEXTS[i] for i in order], batch_size=2, thresholds=thresholds)
    monkeypatch.setattr(label_trie, "BUDGET", 1)
    single = score(model, prompt, batch_size=1, thresholds=thresholds)
    for i, answer in enumerate(answers):
        for other in (single[i], shuffled[order.index(i)]):
            assert other.labels == answer.labels
            assert other.probabilities == pytest.approx(answer.probabilities, abs=1e-5)


@pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])
def test_a_batch_that_outgrows_its_tokens_is_continued_in_halves(models, multi_label, monkeypatch):
    """Estimated without its labels' tokens, a batch of several rows becomes too large; the answers are the same."""
    model, tokenizer = load(models, "llama")
    prompt = prompt_of(tokenizer, multi_label)
    wanted = score(model, prompt, batch_size=8)
    monkeypatch.setattr(scoring, "BUDGET", 0)
    compute, sizes = prompt_cache.PromptCache.compute, []

    def noted(self, nodes):
        compute(self, nodes)
        sizes.append(tuple(self.prompt_columns.shape))

    monkeypatch.setattr(prompt_cache.PromptCache, "compute", noted)
    answers = score(model, prompt, batch_size=1)
    limit = max(len(prompt.prompt(text).ids) for text in TEXTS)
    assert all(rows == 1 or rows * width <= limit for rows, width in sizes)
    assert len(sizes) > 2 and 1 in {rows for rows, _ in sizes}
    for answer, other in zip(answers, wanted, strict=True):
        assert answer.labels == other.labels
        assert answer.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_short_prompts_share_a_row():
    assert prompt_cache.fill_rows([2, 7, 3, 7, 1, 6]) == [[1], [3], [5, 4], [2, 0]]


@both_ways
@pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_loss_is_the_training_loss(models, family, multi_label, packs):
    """Negative log-likelihood of the gold answer: of plain transformers, and of the loop's `loss_of`."""
    model, tokenizer = load(models, family, packs)
    prompt = prompt_of(tokenizer, multi_label)
    gold = [(), (0,), (1, 3), (0, 1, 2, 3, 4)] if multi_label else [(0,), (4,), (1,), (2,)]
    answers = score(model, prompt, TEXTS[:4], batch_size=3, gold=gold, tolerance=scoring.TOLERANCE)
    rows = [AnswerRow(prompt.prompt(t).ids, prompt.answer(g)) for t, g in zip(TEXTS, gold, strict=False)]
    for row, answer in zip(rows, answers, strict=True):
        assert answer.nll == pytest.approx(-slow(model, row.prompt, row.answer), abs=1e-4)
        with torch.no_grad():
            likeliest = model(torch.tensor([row.prompt + row.answer])).logits[0].argmax(-1)
        right = (likeliest[len(row.prompt) - 1 : -1] == torch.tensor(row.answer)).sum().item()
        assert (answer.targets, answer.correct) == (len(row.answer), right)
    batch = collate_answers([(row, True) for row in rows], pad_id=2)
    with torch.no_grad():
        loss = train_cls.loss_of(TokenLosses(model), batch) / count_targets([batch])
    assert summarize(answers, gold, LABELS)["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_in_a_batch_is_that_of_each_row_alone(models, family):
    """Answers do not depend on the batch; nor on the tokenizer's padding side or the checkpoint's sampling settings."""
    model, tokenizer = load(models, family)
    prompt = prompt_of(tokenizer, answer_tokens=12)
    prompts = [prompt.prompt(text).ids[: -1 - i] for i, text in enumerate(TEXTS[:8])]  # each ends in another token
    assert len({len(ids) for ids in prompts}) > 2

    classifier = Classifier(model, prompt, tokenizer)

    def texts(batch_size: int) -> list[str]:
        answers = scoring.generate_answers(classifier, prompts, batch_size=batch_size, device="cpu")
        return [answer.text for answer in answers]

    alone = texts(1)
    assert texts(8) == alone and len(set(alone)) > 1
    before, side = model.generation_config, tokenizer.padding_side
    model.generation_config = transformers.GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1)
    tokenizer.padding_side = "right"
    try:
        assert texts(8) == alone
        assert tokenizer.padding_side == "right"
    finally:
        model.generation_config, tokenizer.padding_side = before, side


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_answer_outside_the_labels_is_kept(models, family, monkeypatch):
    """It has its text, and its own column of the confusion matrix."""
    model, tokenizer = load(models, family)
    prompt = prompt_of(tokenizer)
    examples = [Example(str(i), text, (i % 5,)) for i, text in enumerate(TEXTS)]
    classifier = Classifier(model, prompt, tokenizer)
    real = model.generate
    right = iter(sorted(range(9), key=lambda i: -len(prompt.prompt(TEXTS[i]).ids)))  # rows in the order of batches

    def answer_some(input_ids, **options):  # the right label for even rows, the random model's own text for others
        output = real(input_ids=input_ids, **options)
        for row in range(len(input_ids)):
            if (i := next(right)) % 2 == 0:
                ids = prompt.answer(examples[i].labels)
                output[row, input_ids.shape[1] :] = 2
                output[row, input_ids.shape[1] : input_ids.shape[1] + len(ids)] = torch.tensor(ids)
        return output

    monkeypatch.setattr(model, "generate", answer_some)
    answers = scoring.predict(classifier, examples, fake_accelerator(), 4, "test", "generate")
    assert [answer.labels for answer in answers] == [e.labels if i % 2 == 0 else None for i, e in enumerate(examples)]
    assert all(answer.text for answer in answers)
    gold = [example.labels for example in examples]
    metrics = summarize(answers, gold, LABELS)
    assert metrics["outside_label_set"] == 4 and metrics["accuracy"] == pytest.approx(5 / 9)
    matrix = confusion_matrix(gold, [answer.labels for answer in answers], 5, False)
    assert matrix[:, -1].sum() == 4 and matrix.sum() == 9


def head_of(models, family: str, outputs: int = 5) -> HeadClassifier:
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(models[family], num_labels=outputs)
    return HeadClassifier(base, False)


@pytest.mark.parametrize("outputs", [1, 5])  # 1: a regression
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_of_a_head_are_those_of_each_row_alone(models, family, outputs):
    """In the order of the rows, whatever their lengths; a text may end with the pad id."""
    model, prompt = head_of(models, family, outputs), prompt_of(load(models, family)[1])
    ids = [prompt.prompt(text).ids + [2] * (i % 3) for i, text in enumerate(TEXTS)]
    found = scoring.head_outputs(model, ids, 2, batch_size=2, device="cpu")
    assert found.shape == (9, outputs) and found.dtype == torch.float and not found.requires_grad
    base = model.model
    with torch.no_grad():
        for row, values in zip(ids, found, strict=True):
            hidden = getattr(base, base.base_model_prefix)(torch.tensor([row])).last_hidden_state[0, -1]
            assert values.tolist() == pytest.approx(base.score(hidden).tolist(), abs=1e-5)
    assert scoring.head_outputs(model, [], 2, batch_size=2, device="cpu").shape == (0, outputs)


def test_outputs_of_a_head_read_as_probabilities():
    """Probabilities and losses by hand; without the right labels, no losses."""
    outputs = torch.tensor([[0.0, math.log(3.0), 0.0], [math.log(2.0), -math.log(4.0), 0.0]])
    one, two = scoring.head_answers(outputs, False, [(0,), (0,)])
    assert (one.labels, two.labels, one.correct, two.correct, one.targets) == (None, None, 0, 1, 1)
    assert one.probabilities == pytest.approx([0.2, 0.6, 0.2]) and one.nll == pytest.approx(math.log(5.0))
    one, two = scoring.head_answers(outputs, True, [(), (0, 1)])
    assert one.probabilities == pytest.approx([0.5, 0.75, 0.5]) and two.probabilities[:2] == pytest.approx([2 / 3, 0.2])
    assert one.nll == pytest.approx(math.log(16.0)) and two.nll == pytest.approx(math.log(1.5 * 5.0 * 2.0))
    assert (one.correct, two.correct, one.targets) == (2, 2, 3)
    for multi_label in (False, True):
        for answer in scoring.head_answers(outputs, multi_label):
            assert (answer.nll, answer.correct, answer.targets) == (0.0, 0, 0) and len(answer.probabilities) == 3
        assert scoring.head_answers(outputs[:0], multi_label, []) == []


@pytest.mark.parametrize("way", ["score", "multi", "generate", "head"])
def test_unlabeled_rows_are_classified_as_labeled_ones(models, way):
    """By this process alone, without an Accelerator; `predict` gives the same, and the losses."""
    model, tokenizer = load(models, "llama")
    net = head_of(models, "llama") if way == "head" else model
    classifier = Classifier(net, prompt_of(tokenizer, way == "multi"), tokenizer)
    rows = [Example(str(i), text, ()) for i, text in enumerate(TEXTS)]
    gold = [Example(row.id, row.text, (i % 5,)) for i, row in enumerate(rows)]
    decode, done = "generate" if way == "generate" else "score", []
    answers = scoring.classify(
        classifier, rows, device="cpu", batch_size=4, progress=done.append, decode=decode, labeled=False
    )
    expected = scoring.predict(classifier, gold, fake_accelerator(), 4, "test", decode)
    assert sum(done) == 9 and len(done) > 1
    for answer, other in zip(answers, expected, strict=True):
        assert (answer.labels, answer.text) == (other.labels, other.text)
        assert answer.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        assert answer.targets == 0 and (other.targets > 0) == (way != "generate")


@pytest.mark.parametrize("way", ["score", "generate", "head"])
def test_evaluation_holds_no_tensor_from_batch_to_batch(models, way):
    """After each batch as many numbers are alive as after the first, and answers hold none."""
    for family in FAMILIES:
        model, tokenizer = load(models, family)
        prompt = prompt_of(tokenizer)
        ids = [[7 + i, *prompt.prompt(TEXTS[0]).ids] for i in range(10)]  # five batches of one shape
        alive = []

        def after_batch(rows, alive=alive):
            gc.collect()
            alive.append(sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor))

        options = {"batch_size": 2, "device": "cpu", "progress": after_batch}
        classifier = Classifier(model, prompt, tokenizer)
        gc.freeze()  # only what is made from here on is looked at
        if way == "score":
            answers = scoring.score_labels(classifier, ids, gold=[(0,)] * 10, **options)
        elif way == "generate":
            answers = scoring.generate_answers(classifier, ids, **options)
        else:
            outputs = scoring.head_outputs(head_of(models, family), ids, 2, **options)
            answers = scoring.head_answers(outputs, False, [(0,)] * 10)
        gc.unfreeze()
        assert len(alive) >= 5 and max(alive) == alive[0], alive
        assert not any(isinstance(value, torch.Tensor) for answer in answers for value in vars(answer).values())


SHARED = """
import json, os, sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from helpers.models import FAMILIES
from helpers.scoring import predicted
from accelerate import Accelerator
from common.measure.metrics import summarize

accelerator = Accelerator(cpu=True)
models = {family: Path(sys.argv[3]) / family for family in FAMILIES}
found = {f"{family} {rows}": predicted(models, family, rows, accelerator) for family in FAMILIES for rows in (7, 1)}
with open(f"{sys.argv[4]}.{accelerator.process_index}", "w") as file:
    json.dump(found, file)
accelerator.wait_for_everyone()
accelerator.end_training()
"""


def near(one, other) -> bool:
    """Equal, with floating-point numbers to 1e-5."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(near(value, other[name]) for name, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(near, one, other))
    return one == (pytest.approx(other, rel=1e-5, abs=1e-5) if isinstance(one, float) else other)


def test_two_processes_predict_what_one_does(models, tmp_path):
    """7 rows (1 row) over 2 processes: every row once, in order, and the same metrics, on both."""
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    folder = models["llama"].parent
    run_script(str(script), str(ROOT), str(ROOT / "tests"), str(folder), str(tmp_path / "found"), processes=2)
    both = [json.loads((tmp_path / f"found.{rank}").read_text()) for rank in range(2)]
    assert both[0] == both[1]
    for family in FAMILIES:
        for rows in (7, 1):
            alone = predicted(models, family, rows, fake_accelerator())
            shared = both[0][f"{family} {rows}"]
            assert len(shared["score"]) == len(shared["generate"]) == rows
            assert near(alone, shared)
            counts = ("accuracy", "f1_micro", "f1_macro", "rows", "outside_label_set", "intervals_95", "per_label")
            for way in ("score", "multi", "generate", "head"):
                one, two = alone[f"{way} metrics"], shared[f"{way} metrics"]
                assert all(one[name] == two[name] for name in counts)
