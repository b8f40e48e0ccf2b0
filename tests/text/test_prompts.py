"""Rows to token ids: the same in training and inference, whatever the tokenizer; only the text is ever shortened."""

import copy
import dataclasses
import json
import random
import re
import string
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.models import FAMILIES, build_encoder, build_tokenizer
from helpers.rows import WORDS, toy_rows, write_csv
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as token_models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.data.classification import Example, draw_few_shot, load_classification
from common.errors import InputError
from common.model import base_model, classifier
from common.options import ClassificationDataConfig, ModelConfig
from common.text import pieces
from common.text.batches import collate_rows
from common.text.prompts import (
    GENERATIVE_TEMPLATE,
    HEAD_TEMPLATE,
    ClassificationPrompt,
    check_prompt,
    classification_rows,
    read_template,
)


@dataclass
class Config(ModelConfig, ClassificationDataConfig):
    pass


LABELS = ["music", "science", "sport"]
TEXTS = ["violin", "", "atom.  laser", "goal label: sport", " team", "é😀 tempo\nchorus", "match goal team " * 200]
KINDS = ("bytes", "no bos", "metaspace", "replaced spaces", "space in front", "bos and eos")


def build(folder: Path, kind: str) -> None:
    """Tokenizers that differ in how they treat spaces and special tokens."""
    if kind == "bytes":  # GPT-2's spaces; BOS at the start; pad == eos
        build_tokenizer(folder)
        return
    texts = [row["text"] for row in toy_rows(40)] + [", ".join(WORDS)] * 5 + [GENERATIVE_TEMPLATE] * 5
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    single, marks = "<s> $A", pre_tokenizers.Split(Regex(r"[\n.,:]"), "isolated")
    if kind == "metaspace":  # SentencePiece's unigrams: a space before every piece that is encoded alone
        tokenizer = Tokenizer(token_models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), marks])
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>")
    elif kind in (
        "replaced spaces",
        "space in front",
    ):  # Gemma's, with ▁ for spaces, and Llama 2's, which begins with one
        tokenizer = Tokenizer(token_models.BPE(unk_token="<unk>", byte_fallback=True))
        front = [normalizers.Prepend("▁")] * (kind == "space in front")
        tokenizer.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("▁", "merged_with_next"), marks])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)])
    else:  # "no bos" (Qwen's) and "bos and eos" (the end token is added to every text)
        tokenizer = Tokenizer(token_models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
        single = "$A" if kind == "no bos" else "<s> $A </s>"
    tokenizer.train_from_iterator(texts, trainer)
    pieces = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>") if token in single]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pieces)
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    if kind != "no bos":
        names["bos_token"] = "<s>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        build(base / kind, kind)
    build_encoder(base / "encoder", "bert")
    return {kind: base / kind for kind in (*KINDS, "encoder")}


@pytest.fixture(scope="module")
def tokenizers(folders) -> dict:
    return {kind: AutoTokenizer.from_pretrained(folder) for kind, folder in folders.items()}


def make(tokenizer, encoder: bool = False, **changes) -> ClassificationPrompt:
    options = {"labels": LABELS, "multi_label": False, "template": GENERATIVE_TEMPLATE, "max_length": 120, **changes}
    return classifier.classification_prompt(tokenizer, encoder, **options)


def examples(multi_label: bool) -> list[Example]:
    gold = [(), (0,), (1, 2), (0, 1, 2)] if multi_label else [(0,), (1,), (2,)]
    return [Example(str(i), text, gold[i % len(gold)]) for i, text in enumerate(TEXTS)]


def squeezed(text: str) -> str:
    return "".join(text.split())


# --- one rendering for training and inference


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_inference_see_the_same_ids(folders, tokenizers, kind, multi_label):
    """One prefix, one BOS at most, an answer that ends with eos, no row without a target."""
    tokenizer = tokenizers[kind]
    prompt = make(tokenizer, multi_label=multi_label, few_shot=[("enzyme", (1,))])
    rows = examples(multi_label)
    prompt.reserve(rows)
    trained = classification_rows(rows, prompt, None)
    names = ("labels", "multi_label", "template", "few_shot", "max_length", "answer_tokens")
    saved = json.loads(json.dumps({name: getattr(prompt, name) for name in names}))
    reloaded = make(AutoTokenizer.from_pretrained(folders[kind]), **saved)
    for example, row in zip(rows, trained, strict=True):
        rendered = reloaded.prompt(example.text)
        assert row.prompt == rendered.ids
        ids = row.prompt + row.answer
        assert ids.count(tokenizer.bos_token_id) == ids[:1].count(tokenizer.bos_token_id) == (kind != "no bos")
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        assert row.answer == reloaded.answer(example.labels)
        assert len(ids) <= prompt.max_length
        assert rendered.truncated == (len(example.text) > 1000)
        shown = tokenizer.decode(row.answer[:-1])
        assert prompt.parse(shown) == example.labels
        if not rendered.truncated and not ("é" in example.text and kind == "metaspace"):  # its alphabet lacks these
            start = tokenizer.bos_token if kind != "no bos" else ""
            assert squeezed(tokenizer.decode(ids)) == squeezed(start + prompt.text_of(example.text) + shown + "</s>")


@pytest.mark.parametrize("template", [GENERATIVE_TEMPLATE, "{text}\nOne of {labels}:{label}", "{text} is {label}"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_complete_text(tokenizers, kind, template):
    """Tokenizers that put a space in front of a text put none in front of its pieces: the few-shot examples', the
    text's, the cue's, and those of one label or several."""
    tokenizer = tokenizers[kind]
    shots = [("An atom.", (1,)), ("A coach.", (0, 2))]
    for multi_label, few_shot in ((False, []), (False, shots[:1]), (True, shots)):
        prompt = make(tokenizer, multi_label=multi_label, template=template, few_shot=few_shot)
        for labels in [(0,), (2,), (0, 1, 2)][: 2 + multi_label]:
            for text in ("A violin.", "(tempo", "a"):
                space = " " if template.endswith(" {label}") else ""
                answer = space + ", ".join(prompt.labels[k] for k in labels)
                complete = tokenizer(prompt.text_of(text) + answer)["input_ids"]
                assert prompt.prompt(text).ids + prompt.label_ids(labels) == [i for i in complete if i != 2]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_the_same_tokens_are_refused(tokenizers, kind):
    """Their probabilities would always be equal; a head does not read them."""
    tokenizer = copy.deepcopy(tokenizers[kind])
    normalizer = tokenizer.backend_tokenizer.normalizer
    lower = normalizers.Sequence([normalizers.Lowercase(), *([normalizer] if normalizer else [])])
    tokenizer.backend_tokenizer.normalizer = lower
    for multi_label in (False, True):
        with pytest.raises(InputError, match="The labels 'US' and 'us' become the same tokens"):
            make(tokenizer, labels=["US", "it", "us"], multi_label=multi_label)
    assert make(tokenizer, labels=["US", "it", "us"], template=HEAD_TEMPLATE).labels == ["US", "it", "us"]
    assert make(tokenizers[kind], labels=["US", "it", "us"]).labels == ["US", "it", "us"]


@pytest.mark.parametrize("kind", KINDS)
def test_label_masks_come_from_lengths_not_from_ids(tokenizers, kind):
    """With pad == eos the answer's end keeps its weight, and padding has none."""
    prompt = make(tokenizers[kind], multi_label=True)
    rows = examples(True)
    prompt.reserve(rows)
    trained = classification_rows(rows, prompt, None)
    batch = collate_rows([(row, True) for row in trained], pad_id=tokenizers[kind].pad_token_id)
    for i, row in enumerate(trained):
        own = batch.rows == i
        assert batch.weights[own].tolist() == [1] * len(row.answer)
        assert batch.targets[own].tolist() == row.answer
        assert batch.input_ids.flatten()[batch.positions[own] + 1].tolist() == row.answer
        assert row.answer[-1] == tokenizers[kind].eos_token_id
        assert batch.attention_mask[i].sum() == row.length
        assert batch.input_ids[i, -row.length :].tolist() == row.prompt + row.answer


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_text_is_shortened_and_the_length_is_used_up(tokenizers, kind):
    """Instruction, cue, answer and eos stay complete; --max_length is the length really used."""
    tokenizer = tokenizers[kind]
    prompt = make(tokenizer)
    longest = max(range(3), key=lambda k: len(prompt.answer((k,))))

    def ids_of(text: str) -> list[int]:
        lead, both = tokenizer(["\n", f"\n {text}"], add_special_tokens=False)["input_ids"]
        return both[len(lead) :]

    for count in range(1, 200, 9):
        text = TEXTS[-1][: 3 * count]
        whole = ids_of(text)
        rendered = prompt.prompt(text)
        head, tail = len(prompt.instruction_ids), len(prompt.cue_ids)
        assert rendered.ids[:head] == prompt.instruction_ids and rendered.ids[-tail:] == prompt.cue_ids
        middle = rendered.ids[head:-tail]
        assert middle == whole[: len(middle)]
        assert rendered.truncated == (len(middle) < len(whole))
        total = len(rendered.ids) + len(prompt.answer((longest,)))
        assert total == prompt.max_length if rendered.truncated else total <= prompt.max_length
    assert prompt.prompt(TEXTS[-1]).ids[head:-tail] == ids_of(TEXTS[-1])[: len(middle)]


LETTERS = "".join(random.Random(0).choices(string.ascii_letters + "é日本", k=9000))
PATTERNS = ["match goal team ", "a", "ab", LETTERS, "日本語", "0123456789", "é😀e\u0301", "=", "match\u00a0goal\tteam "]
LONG = [pattern * (9000 // len(pattern)) for pattern in PATTERNS] + [" ".join(LETTERS), LETTERS.lower() + " goal"]
LONG += ["\n" * 9000 + "goal", " " * 9000 + "goal", "match " + " " * 9000]


@pytest.mark.parametrize("kind", [*KINDS, "encoder"])
def test_of_a_long_text_only_the_beginning_is_tokenized(tokenizers, kind, monkeypatch):
    """The ids are those of the complete text, whatever it is made of."""
    prompt = make(
        tokenizers[kind], kind == "encoder", template=HEAD_TEMPLATE if kind == "encoder" else GENERATIVE_TEMPLATE
    )
    encoded, encode = [], prompt._encode_texts
    monkeypatch.setattr(prompt, "_encode_texts", lambda texts: encoded.append(sum(map(len, texts))) or encode(texts))
    found = list(prompt.prompts(LONG))
    assert sum(encoded) < sum(map(len, LONG)) / 2 or kind == "encoder"  # to which a long word is one token
    monkeypatch.setattr(pieces, "CHARACTERS", 10**6)
    assert list(prompt.prompts(LONG)) == found and all(
        prompt.prompt(text) == row for text, row in zip(LONG, found, strict=True)
    )
    assert found[0].truncated and sum(encoded[-len(LONG) :]) == sum(map(len, LONG))


def test_texts_are_tokenized_together(tokenizers, monkeypatch):
    prompt = make(tokenizers["bytes"])
    calls, encode = [], prompt._encode_after
    monkeypatch.setattr(prompt, "_encode_after", lambda texts, plain: calls.append(len(texts)) or encode(texts, plain))
    rows = classification_rows([Example("0", f"goal {i}", (2,)) for i in range(5000)], prompt, None)
    assert calls == [4096, 904] and rows[4999].prompt == prompt.prompt("goal 4999").ids


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "metaspace"])  # a unigram model knows <s> as a word
def test_special_tokens_in_a_text_are_text(tokenizers, kind):
    """`<s>` in a row (HTML has it) is no second BOS, `</s>` no early end; a template's are tokens."""
    tokenizer = tokenizers[kind]
    prompt = make(tokenizer, few_shot=[("<s>old</s>", (0,))])
    ids = prompt.prompt("a <s>struck</s> word").ids + prompt.answer((0,))
    bos, eos = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    assert (ids.count(bos), ids.count(eos)) == (int(kind != "no bos"), 1)
    marked = make(tokenizer, template="user: {text}</s>\nlabel: {label}")
    assert marked.prompt("a</s>").ids.count(eos) == 1


def test_a_boundary_never_moves_with_the_answer(tokenizers):
    """Pieces are encoded alone, so the prompt's ids hold where the complete string would merge differently."""
    for kind in KINDS:
        tokenizer = tokenizers[kind]
        for template in (GENERATIVE_TEMPLATE, "{text}{label}", "{labels}: {text} -> {label}", "is {text} a{label}"):
            prompt = make(tokenizer, template=template, labels=["sport", "s", "sports"])
            rendered = prompt.prompt("goal").ids
            for k in range(3):
                row = classification_rows([Example("0", "goal", (k,))], prompt, None)[0]
                assert row.prompt == rendered and row.answer == prompt.answer((k,)) and len(row.answer) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_model_family_gets_one_bos_and_an_end(models, family):
    """One BOS, an answer that ends with eos, padding without weight: by the tokenizers as saved with the models."""
    tokenizer = base_model.load_tokenizer(str(models[family]), Config())
    for row in classification_rows(examples(False), make(tokenizer), None):
        ids = row.prompt + row.answer
        assert ids[0] == 1 and ids.count(1) == 1 and ids[-1] == 2


# --- what a prompt looks like


def test_default_prompt_is_as_documented(tokenizers):
    prompt = make(tokenizers["no bos"])
    text = (
        "Classify the text into music, science, sport and return the answer as the exact text label.\n"
        "text: A violin.\n"
        "label:"
    )
    assert prompt.text_of("A violin.") == text
    assert tokenizers["no bos"].decode(prompt.prompt("A violin.").ids + prompt.answer((0,))) == f"{text} music</s>"
    pieces = re.findall(r"^ {8}\w.{12}(.*)", ClassificationPrompt.__doc__, re.M)
    example = make(tokenizers["no bos"], labels=["music", "sport"]).text_of("The match ended in a draw.") + " sport</s>"
    assert "".join(pieces).replace("\\n", "\n") == example


@pytest.mark.parametrize("kind", ["bytes", "no bos", "replaced spaces"])
def test_few_shot_examples_read_like_the_row_itself(tokenizers, kind):
    shots = [("A violin.", (0,)), ("An atom.", (1,))]
    prompt = make(tokenizers[kind], few_shot=shots)
    text = (
        "Classify the text into music, science, sport and return the answer as the exact text label.\n"
        "text: A violin.\n"
        "label: music\n"
        "text: An atom.\n"
        "label: science\n"
        "text: A goal.\n"
        "label:"
    )
    assert prompt.text_of("A goal.") == text
    start = "" if kind == "no bos" else "<s>"
    assert tokenizers[kind].decode(prompt.prompt("A goal.").ids) == start + text


def test_few_shot_with_several_labels_and_another_template(tokenizers):
    shots = [("one", (0, 2)), ("two", ())]
    prompt = make(tokenizers["no bos"], multi_label=True, few_shot=shots, template="Pick: {labels}\n> {text} = {label}")
    text = "Pick: music, science, sport\n> one = music, sport\n> two = \n> three ="
    assert prompt.text_of("three") == text
    shown = tokenizers["no bos"].decode(prompt.prompt("three").ids)
    assert shown == text.replace("= \n", "=\n")  # the space belongs to an answer, and this one is empty


def test_an_answer_is_made_of_its_labels(tokenizers):
    prompt = make(tokenizers["no bos"], multi_label=True)
    assert prompt.answer((0, 2)) == prompt.first_ids[0] + prompt.next_ids[2] + prompt.end_ids
    assert prompt.answer(()) == prompt.end_ids == [tokenizers["no bos"].eos_token_id]
    assert tokenizers["no bos"].decode(prompt.answer((0, 1, 2))) == " music, science, sport</s>"
    assert prompt.target((0, 2)) == [1.0, 0.0, 1.0] and prompt.target(()) == [0.0, 0.0, 0.0]
    assert make(tokenizers["no bos"]).target((2,)) == 2


def test_a_cue_without_a_space_takes_labels_without_one(tokenizers):
    tokenizer = tokenizers["no bos"]
    prompt = make(tokenizer, template="{text}\nlabel:{label}")
    assert tokenizer.decode(prompt.prompt("a").ids + prompt.answer((1,))) == "a\nlabel:science</s>"


def test_labels_may_follow_the_text(tokenizers):
    prompt = make(tokenizers["no bos"], template="{text}\nOne of {labels}: {label}")
    assert prompt.text_of("a") == "a\nOne of music, science, sport:"
    assert tokenizers["no bos"].decode(prompt.prompt("a").ids) == prompt.text_of("a")


@pytest.mark.parametrize("kind", ["bytes", "no bos", "encoder"])
def test_head_rows_keep_their_own_special_tokens(tokenizers, kind):
    """A decoder reads the end token after the text, an encoder its own pair; a cut keeps both."""
    tokenizer = tokenizers[kind]
    prompt = make(tokenizer, kind == "encoder", template=HEAD_TEMPLATE, max_length=12)
    start = {"bytes": [1], "no bos": [], "encoder": [2]}[kind]
    end = {"bytes": [2], "no bos": [2], "encoder": [3]}[kind]
    plain = tokenizer("violin chorus", add_special_tokens=False)["input_ids"]
    assert prompt.prompt("violin chorus").ids == start + plain[: 12 - len(start + end)] + end
    long = prompt.prompt("violin chorus " * 50)
    assert long.truncated and len(long.ids) == 12
    assert long.ids[: len(start)] == start and long.ids[-1:] == end
    if kind == "encoder":
        assert prompt.prompt("violin chorus").ids == tokenizer("violin chorus")["input_ids"]


# --- answers, counts, hash


@pytest.mark.parametrize(
    ("answer", "single", "several"),
    [
        ("sport", (2,), (2,)),
        ("  sport \n", (2,), (2,)),
        ("Sport", None, None),
        ("sports", None, None),
        ("", None, ()),
        (" ", None, ()),
        ("music, sport", None, (0, 2)),
        ("sport,music", None, (0, 2)),
        ("sport , music", None, (0, 2)),
        ("sport, sport", None, None),
        ("sport,", None, None),
        ("sport, chess", None, None),
        ("sport\nlabel: sport", None, None),
    ],
)
def test_generated_answers_are_read_strictly(tokenizers, answer, single, several):
    """An answer that the prompt does not allow is none."""
    assert make(tokenizers["bytes"]).parse(answer) == single
    assert make(tokenizers["bytes"], multi_label=True).parse(answer) == several


def test_report_counts_shortened_texts(tokenizers, tmp_path):
    rows = [{"text": "goal " * n, "label": label} for n, label in ((1, "a"), (400, "b"), (2, "a"), (500, "a"))]
    config = Config(train_file=str(write_csv(tmp_path / "t.csv", rows)), validation_fraction=0.0, test_fraction=0.0)
    data = load_classification(config)
    prompt = make(tokenizers["bytes"], labels=data.labels)
    prompt.count_shortened(data, data.splits["train"])
    assert data.report["rows"]["train"]["shortened"] == 2
    rows = classification_rows(data.splits["train"], prompt, None)
    assert data.report["rows"]["train"]["lengths"]["longest"] == max(row.length for row in rows)
    prompt.count_shortened(data, data.splits["train"][:3])  # the last is in the prompt, as --few_shot has it
    assert data.report["rows"]["train"]["shortened"] == 1


def test_hash_follows_all_that_decides_a_row(tokenizers):
    base = {"labels": ["a", "b"], "few_shot": [("t", (0,))]}
    changes = [
        {},
        {"labels": ["b", "a"]},
        {"labels": ["a", "c"]},
        {"multi_label": True},
        {"template": "{text}: {label}"},
        {"few_shot": [("u", (0,))]},
        {"few_shot": [("t", (1,))]},
        {"few_shot": []},
        {"max_length": 121},
    ]
    hashes = [make(tokenizers["bytes"], **{**base, **change}).hash for change in changes]
    assert len(set(hashes)) == len(changes)
    stored = json.loads(json.dumps(base))  # tuples come back as lists
    assert make(tokenizers["bytes"], **stored).hash == hashes[0]


# --- checks before a model is loaded


@dataclass
class Case:
    kind: str
    approach: str = "generative"
    multi_label: bool = False
    few_shot: int = 0


@pytest.mark.parametrize(
    "case",
    [
        *(Case(kind) for kind in KINDS),
        Case("bytes", multi_label=True),
        Case("metaspace", few_shot=3),
        Case("bytes", "head"),
        Case("no bos", "head"),
        Case("encoder", "head"),
    ],
    ids=lambda case: "-".join(map(str, dataclasses.astuple(case))),
)
def test_early_check_agrees_with_the_real_tokenizer(folders, tokenizers, tmp_path, case):
    """The bare tokenizer file must refuse exactly the --max_length that transformers' tokenizer would."""
    if case.multi_label:
        rows = [{"text": "a", "label": "music;sport"}, {"text": "b", "label": "science"}] * 5
    else:
        rows = toy_rows(5)
    path = str(write_csv(tmp_path / "t.csv", rows))
    config = Config(
        train_file=path,
        approach=case.approach,
        few_shot=case.few_shot,
        label_delimiter=";" if case.multi_label else None,
        validation_fraction=0.0,
        test_fraction=0.0,
    )
    data = load_classification(config)

    def early(length: int) -> None:
        check_prompt(dataclasses.replace(config, max_length=length), data, str(folders[case.kind]))

    def real(length: int) -> None:
        shots, rest = draw_few_shot(data, config)
        template = read_template(None, case.approach)
        options = {"labels": data.labels, "multi_label": data.multi_label, "few_shot": shots}
        make(tokenizers[case.kind], case.kind == "encoder", template=template, max_length=length, **options).reserve(
            rest
        )

    def refuses(check, length: int) -> bool:
        try:
            check(length)
        except InputError as error:
            assert f"--max_length {length} is too short" in str(error)
            return True
        return False

    limit = next(length for length in range(1, 1000) if not refuses(real, length))
    assert limit >= (2 if case.approach == "head" else 20)
    assert [refuses(early, length) for length in (limit - 1, limit)] == [True, False]


def test_early_check_ignores_padding_and_truncation_in_the_file(folders, tmp_path):
    """Many encoders' tokenizer.json pad or cut every text to a fixed length; transformers ignores that."""
    tokenizer = Tokenizer.from_file(str(folders["encoder"] / "tokenizer.json"))
    tokenizer.enable_padding(length=128)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows = [{**row, "label": WORDS[row["label"]].split()[0]} for row in toy_rows(9)]  # labels that it knows
    config = Config(train_file=str(write_csv(tmp_path / "t.csv", rows)), approach="head", max_length=64)
    check_prompt(config, load_classification(config), str(tmp_path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = dataclasses.replace(config, approach="generative", max_length=12)
    with pytest.raises(InputError, match="too short"):
        check_prompt(config, load_classification(config), str(tmp_path))


def test_damaged_tokenizer_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    config = Config(train_file=str(write_csv(tmp_path / "t.csv", toy_rows(9))))
    with pytest.raises(InputError, match=r"tokenizer.json is damaged"):
        check_prompt(config, load_classification(config), str(tmp_path))


def test_too_short_a_length_says_how_much_is_needed(tokenizers):
    with pytest.raises(InputError) as caught:
        make(tokenizers["bytes"], max_length=10)
    wanted = int(str(caught.value).split("at least ")[1].rstrip("."))
    assert make(tokenizers["bytes"], max_length=wanted).text_budget == 32
    with pytest.raises(InputError, match="fewer --few_shot examples"):
        make(tokenizers["bytes"], max_length=wanted, few_shot=[("goal " * 100, (0,))])


@pytest.mark.parametrize(
    ("template", "approach", "message"),
    [
        ("{labels} {label}", "generative", "t.txt: A prompt template has {text} once"),
        ("{text} {text} {label}", "generative", "t.txt: A prompt template has {text} once"),
        ("{label} {text}", "generative", "t.txt: A prompt template has {text} once"),
        ("{text} {label} ok?", "generative", "t.txt: A prompt template has {text} once"),
        ("{text}", "generative", "end it with {label}"),
        ("{text} {label}", "head", "take {label} out"),
    ],
)
def test_template_errors_say_what_is_expected(tokenizers, tmp_path, template, approach, message):
    (tmp_path / "t.txt").write_text(template)
    with pytest.raises(InputError) as caught:
        make(tokenizers["bytes"], template=read_template(str(tmp_path / "t.txt"), approach))
    assert message in str(caught.value)


def test_template_file_is_read_as_written(tmp_path):
    (tmp_path / "t.txt").write_text("é {labels}\n\n{text}\n-> {label}\n", encoding="utf-8")
    assert read_template(str(tmp_path / "t.txt"), "generative") == "é {labels}\n\n{text}\n-> {label}"
    (tmp_path / "t.txt").write_bytes(b"\xff {text} {label}")
    with pytest.raises(InputError, match="t.txt: the file is not UTF-8"):
        read_template(str(tmp_path / "t.txt"), "generative")
    with pytest.raises(InputError, match="none.txt: there is no such file"):
        read_template(str(tmp_path / "none.txt"), "generative")
