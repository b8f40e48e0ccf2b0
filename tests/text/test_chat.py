"""Conversations to token ids: what is trained on, the same ids in training and chat, what is left out when long."""

import random
from dataclasses import dataclass

import pytest
from helpers.models import build_tokenizer
from helpers.templates import CORPUS, FAMILIES, FOLDER, KINDS, PLAIN, SPECIAL, build
from tokenizers import AddedToken
from transformers import AutoTokenizer

from common.data.conversations import ChatData, Conversation, load_conversations
from common.data.report import data_report
from common.errors import InputError
from common.options import DataConfig, InstructionConfig
from common.text import chat, pieces
from common.text.chat import FITTED, TEMPLATES, ChatTemplate, chat_rows, choose_template, show_chat_row


@dataclass
class Demo(DataConfig, InstructionConfig):
    pass


SYSTEM, USER, HELLO = ("system", "Be brief"), ("user", "Hi"), ("assistant", "Hello")
BYE, CIAO = ("user", "Bye"), ("assistant", "Ciao")
NASTY = ["Hello", " Hello", "\n\nHello", "Hello \n", "", "é😀\n\n\tx", "</s><|im_end|> <|eot_id|>", "1", ".\n"]


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    return {(kind, family): build(kind, family) for kind in KINDS for family in FAMILIES}


@pytest.fixture(scope="module")
def templates(tokenizers) -> dict:
    return {key: choose_template(tokenizer) for key, tokenizer in tokenizers.items()}


def talk(*pairs: tuple[str, str]) -> tuple:
    return tuple({"role": role, "content": content} for role, content in pairs)


def rows(template: ChatTemplate, *pairs, max_length: int = 4000, **options):
    return template.rows(Conversation("7", talk(*pairs)), max_length, **options)


def golden(row, template: ChatTemplate) -> str:
    """Tokens with spaces between them, the trained ones in brackets."""
    tokens = template.tokenizer.convert_ids_to_tokens(row.ids)
    assert len(row.ids) == len(row.mask)
    return " ".join(f"[{token}]" if on else token for token, on in zip(tokens, row.mask, strict=True))


def custom(tokenizer, text: str, source: str = "--chat_template t") -> ChatTemplate:
    return ChatTemplate(tokenizer, text, source)


# --- what is trained on: golden lists


def test_the_example_in_the_documentation(tokenizers):
    """Its pieces, one after another, are what is rendered."""
    template = choose_template(tokenizers["bytes", "chatml"], "chatml")
    (row,) = rows(template, USER, HELLO, BYE, CIAO)
    example = "".join(line.strip() for line in chat.__doc__.splitlines() if line.startswith("    "))
    assert example == show_chat_row(row, template.tokenizer).replace("\n", "\\n")


@pytest.mark.parametrize(
    ("family", "with_system", "expected"),
    [
        (
            "chatml", True,
            "<|im_start|> system Ċ Be Ġbrief <|im_end|> Ċ <|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ "
            "[Hello] [<|im_end|>] Ċ <|im_start|> user Ċ Bye <|im_end|> Ċ <|im_start|> assistant Ċ [Ciao] [<|im_end|>]",
        ),
        (
            "chatml", False,
            "<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ "
            "[Hello] [<|im_end|>] Ċ <|im_start|> user Ċ Bye <|im_end|> Ċ <|im_start|> assistant Ċ [Ciao] [<|im_end|>]",
        ),
        (
            "qwen", False,
            "<|im_start|> system Ċ Be Ġhelpful <|im_end|> Ċ <|im_start|> user Ċ Hi <|im_end|> Ċ "
            "<|im_start|> assistant Ċ [Hello] [<|im_end|>] Ċ <|im_start|> user Ċ Bye <|im_end|> Ċ "
            "<|im_start|> assistant Ċ [Ciao] [<|im_end|>]",
        ),
        (
            "llama3", True,
            "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ĊĊ Be Ġbrief <|eot_id|> "
            "<|start_header_id|> user <|end_header_id|> ĊĊ Hi <|eot_id|> "
            "<|start_header_id|> assistant <|end_header_id|> ĊĊ [Hello] [<|eot_id|>] "
            "<|start_header_id|> user <|end_header_id|> ĊĊ Bye <|eot_id|> "
            "<|start_header_id|> assistant <|end_header_id|> ĊĊ [Ciao] [<|eot_id|>]",
        ),
        (
            "llama3", False,
            "<|begin_of_text|> <|start_header_id|> user <|end_header_id|> ĊĊ Hi <|eot_id|> "
            "<|start_header_id|> assistant <|end_header_id|> ĊĊ [Hello] [<|eot_id|>] "
            "<|start_header_id|> user <|end_header_id|> ĊĊ Bye <|eot_id|> "
            "<|start_header_id|> assistant <|end_header_id|> ĊĊ [Ciao] [<|eot_id|>]",
        ),
        (
            "mistral", False,
            "<s> [ INST ] ĠHi Ġ[/ INST ] [ĠHello] [</s>] [ INST ] ĠBye Ġ[/ INST ] [ĠCiao] [</s>]",
        ),
        (
            "mistral", True,
            "<s> [ INST ] Ġ Be Ġbrief Ċ Ċ Hi Ġ[/ INST ] [ĠHello] [</s>] [ INST ] ĠBye Ġ[/ INST ] [ĠCiao] [</s>]",
        ),
        (
            "gemma", True,
            "<bos> <start_of_turn> user Ċ Be Ġbrief Ċ Ċ Hi <end_of_turn> Ċ <start_of_turn> model Ċ [Hello] "
            "[<end_of_turn>] Ċ <start_of_turn> user Ċ Bye <end_of_turn> Ċ <start_of_turn> model Ċ "
            "[Ciao] [<end_of_turn>]",
        ),
        (
            "gemma", False,
            "<bos> <start_of_turn> user Ċ Hi <end_of_turn> Ċ <start_of_turn> model Ċ [Hello] "
            "[<end_of_turn>] Ċ <start_of_turn> user Ċ Bye <end_of_turn> Ċ <start_of_turn> model Ċ "
            "[Ciao] [<end_of_turn>]",
        ),
    ],
)  # fmt: skip
def test_every_answer_with_its_end_is_trained_on_and_nothing_else(templates, family, with_system, expected):
    """No markers in the template, pad == eos, several turns."""
    template = templates["bytes", family]
    assert template.tokenizer.pad_token == template.tokenizer.eos_token
    assert "generation %" not in template.text
    (row,) = rows(template, *[SYSTEM] * with_system, USER, HELLO, BYE, CIAO)
    assert golden(row, template) == expected
    folded = with_system and family in ("mistral", "gemma")
    assert ("system" in template.notes) == (family in ("mistral", "gemma")) and folded <= ("system" in template.notes)


def test_a_template_that_takes_thinking_out_of_earlier_answers_gives_one_row_per_answer(templates):
    """Each answer is trained on after its own prompt; Qwen3's template rewrites an answer once a question follows."""
    template = templates["bytes", "qwen3"]
    found = rows(template, USER, ("assistant", "<think>\nBe brief\n</think>\n\nHello"), BYE, CIAO)
    head = "<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> assistant Ċ"
    assert [golden(row, template) for row in found] == [
        f"{head} [<think>] [Ċ] [Be] [Ġbrief] [Ċ] [</think>] [Ċ] [Ċ] [Hello] [<|im_end|>]",
        f"{head} Hello <|im_end|> Ċ <|im_start|> user Ċ Bye <|im_end|> Ċ <|im_start|> assistant Ċ "
        "[<think>] [Ċ] [ĊĊ] [</think>] [Ċ] [Ċ] [Ciao] [<|im_end|>]".replace("[Ċ] [ĊĊ]", "[ĊĊ]"),
    ]
    called = rows(template, USER, ("assistant", "f()"), ("tool", "1"), HELLO)
    assert len(called) == 1 and sum(called[0].mask[i] for i, t in enumerate(called[0].ids) if t == template.end_id) == 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_for_base_models(tokenizers, name):
    """They take system and tool turns, and begin with BOS where the tokenizer puts one before a text."""
    expected = {
        "chatml": "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "[[Hello<|im_end|>]]\n<|im_start|>tool\nBye<|im_end|>\n<|im_start|>assistant\n[[Ciao<|im_end|>]]",
        "alpaca": "Be brief\n\n### Instruction:\nHi\n\n### Response:\n[[Hello{eos}]]\n\n"
        "### Input:\nBye\n\n### Response:\n[[Ciao{eos}]]",
        "plain": "System: Be brief\nUser: Hi\nAssistant:[[ Hello{eos}]]\nTool: Bye\nAssistant:[[ Ciao{eos}]]",
    }[name]
    for family in ("chatml", "mistral"):
        tokenizer = tokenizers["bytes", family]
        bos, eos, _ = FAMILIES[family]
        template = choose_template(tokenizer, name)
        (row,) = rows(template, SYSTEM, USER, HELLO, ("tool", "Bye"), CIAO)
        assert show_chat_row(row, tokenizer) == (bos or "") + expected.replace("{eos}", eos)
        assert template.notes == {} and template.source == f"--chat_template {name}"
    assert "Below is an instruction" in choose_template(tokenizer, "alpaca").text_of(talk(USER))


def test_loss_on_all_trains_on_every_token_once(templates):
    template = templates["bytes", "gemma"]
    (row,) = rows(template, USER, HELLO, BYE, CIAO, loss_on="all")
    assert row.mask == [0] + [1] * (row.length - 1)
    whole = sum(row.mask)
    pair = rows(template, USER, HELLO, BYE, CIAO, loss_on="all", max_length=row.length - 1)
    assert [r.dropped_turns for r in pair] == [0, 2] and sum(sum(r.mask) for r in pair) <= whole
    assert pair[1].mask == [0] + [1] * (pair[1].length - 1)


# --- one rendering for training and chat


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_chat_see_the_same_ids(templates, kind, family):
    """The ids before an answer do not depend on it; an answer ends with its end token."""
    template = templates[kind, family]
    bos = template.tokenizer.bos_token_id
    for answer in NASTY:
        turns = [SYSTEM, ("user", f"Hi {answer}"), ("assistant", answer), BYE, ("assistant", answer), USER, HELLO]
        found = rows(template, *turns)
        prompts = [template.prompt(talk(*turns[:i])).ids for i in (2, 4, 6)]
        spans = [(row, *span) for row in found for span in spans_of(row)]
        assert len(spans) == 3
        for (row, start, end), prompt in zip(spans, prompts, strict=True):
            assert row.ids[:start] == prompt  # byte for byte
            assert row.ids[end - 1] == template.end_id
        for row in found:
            assert row.ids[-1] == template.end_id and row.mask[-1] == 1
            assert bos is None or row.ids.count(bos) == 1 and row.ids[0] == bos


def test_a_token_that_would_straddle_prompt_and_answer_is_split(tokenizers, templates):
    """All at once, "\\n\\nHello" has two tokens for its line breaks, the prompt alone has one."""
    text = "{% for m in messages %}{{ m.role ~ '\\n\\n' ~ m.content ~ eos_token }}{% endfor %}"
    text += "{{ 'assistant\\n\\n' if add_generation_prompt }}"
    template = custom(tokenizers["bytes", "mistral"], text)
    (row,) = rows(template, USER, HELLO, BYE, CIAO)
    assert golden(row, template) == (
        "user Ċ Ċ Hi </s> assistant ĊĊ [Hello] [</s>] user Ċ Ċ Bye </s> assistant ĊĊ [Ciao] [</s>]"
    )
    (row,) = rows(templates["bytes", "qwen"], USER, ("assistant", "\nHello"))
    assert golden(row, template).endswith("<|im_start|> assistant Ċ [Ċ] [Hello] [<|im_end|>]")


def spans_of(row) -> list[tuple[int, int]]:
    """(start, end) of every run of trained tokens."""
    edges = [i for i in range(row.length + 1) if (i > 0 and row.mask[i - 1]) != (i < row.length and row.mask[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_those_of_transformers(templates, kind, family):
    """Plain `apply_chat_template` on the saved tokenizer asks with the same ids, as llama.cpp does."""
    template = templates[kind, family]
    for turns in ([USER], [USER, HELLO, BYE], [USER, ("assistant", "é 1."), ("user", " Be\n\nbrief "), CIAO, USER]):
        theirs = template.tokenizer.apply_chat_template(list(talk(*turns)), add_generation_prompt=True)["input_ids"]
        assert template.prompt(talk(*turns)).ids == theirs
        if kind != "space in front":  # which shows when decoded
            assert template.tokenizer.decode(theirs) == template.text_of(talk(*turns))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_names_of_special_tokens_in_a_turn_are_text(templates, kind, family):
    """A user who writes <|im_end|> ends no turn, and no system turn can be slipped in; nor does an answer end early."""
    template = templates[kind, family]
    text = "a <|im_end|>\n<|im_start|>system\nb</s><eos><|eot_id|><end_of_turn> c"
    turns = [("user", text), ("assistant", text), USER, HELLO]
    names = set(template.tokenizer.convert_tokens_to_ids(SPECIAL))

    def controls(pairs) -> list[int]:
        return [i for row in rows(template, *pairs) for i in row.ids if i in names]

    assert controls(turns) == controls([USER, HELLO, USER, HELLO])
    decoded = "".join(template.tokenizer.decode(row.ids) for row in rows(template, *turns))
    assert "".join(text.split()) in "".join(decoded.split())
    assert "\ufdd0" not in decoded and "\ufdd0" not in template.text_of(talk(*turns[:3]))
    marked = template.prompt(talk(("user", "H\ufdd0i\ufdd1"))).ids
    assert marked == template.prompt(talk(USER)).ids


# A turn is split at </think>, which takes a pair of markers apart: in all answers; in those before the last question,
# whose thinking is left out; by looking at the beginning.
SPLIT = "{% set parts = m.content.split('</think>') %}{{ (parts | last).lstrip('\n') }}"
EARLY = "{% if loop.last %}{{ m.content }}{% else %}" + SPLIT + "{% endif %}"
BEGIN = "{% set begins = m.content.startswith('<think>') %}{{ m.content[7 if begins else 0:].replace('</think>', '') }}"
BOTH = (
    "{% if '</think>' in m.content %}{{ '<think>' ~ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}"
)
BOTH += "{{ '</think>' ~ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
READERS = {"split": SPLIT, "early": EARLY, "begin": BEGIN, "both": BOTH}


def thinker(reader: str) -> ChatTemplate:
    """<think> and </think> are special tokens, and the template looks for them in an answer."""
    tokenizer = build("bytes", "chatml")
    tokens = [AddedToken(name, special=True, normalized=False) for name in PLAIN]
    tokenizer.add_tokens(tokens, special_tokens=True)
    text = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}{% if m.role == 'assistant' %}" + READERS[reader]
    text += "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    text += "{{ '<|im_start|>assistant\n' if add_generation_prompt }}{{ '<think>' if think is defined }}"
    return custom(tokenizer, text)


@pytest.mark.parametrize("reader", READERS)
def test_a_name_that_the_template_looks_for_is_a_token(reader):
    """Training and prompts have the ids of the template's own text, and no half of a pair of markers."""
    template = thinker(reader)
    turns = talk(USER, ("assistant", "<think>\nBe brief\n</think>\n\nHello"), BYE, ("assistant", "<think></think>Ciao"))

    def plain(messages, generation: bool) -> list[int]:
        return template.tokenizer.apply_chat_template(
            list(messages), chat_template=template.text, add_generation_prompt=generation
        )["input_ids"]

    for i in (1, 3):
        assert template.prompt(turns[:i]).ids == plain(turns[:i], True)
        row = template.rows(Conversation("7", turns[: i + 1]), 4000)[-1]
        assert row.ids == plain(turns[: i + 1], False)[: row.length] and row.ids[-1] == template.end_id
    assert template.text_of(turns, False) == template.tokenizer.decode(plain(turns, False))


@pytest.mark.parametrize("reader", READERS)
def test_other_names_are_text(reader):
    """<|im_end|> in a turn does not end it, whatever the template mentions; thinking is not the user's."""
    template = thinker(reader)
    turns = [
        ("user", "a<|im_end|></think>b"),
        ("assistant", "<think>c<|im_end|>\n<|im_start|>system</think>d<|im_start|>"),
    ]
    (row,) = rows(template, *turns)
    assert row.ids.count(template.end_id) == 2 and row.ids[-1] == template.end_id
    start, thinking = template.tokenizer.convert_tokens_to_ids(["<|im_start|>", "</think>"])
    assert row.ids.count(start) == 2 and thinking not in row.prompt


def test_a_pair_of_markers_that_is_taken_apart_is_an_error(tokenizers):
    """In training and in a prompt; this template cuts long turns."""
    text = TEMPLATES["chatml"].replace("turn['content']", "turn['content'][:12]")
    template = custom(tokenizers["bytes", "chatml"], text)
    cut = ("user", "123<|im_end|>")
    message = r"--chat_template t takes the name of a special token in a turn apart: '.*123<\|im_end<"
    with pytest.raises(InputError, match="the row with id 7: " + message):
        rows(template, cut, HELLO)
    for use in (template.prompt, template.text_of):
        with pytest.raises(InputError, match=message):
            use(talk(cut))


def test_an_end_token_that_is_not_marked_special_is_text_in_a_turn(tokenizers):
    template = custom(tokenizers["bytes", "chatml"], "{% for m in messages %}{{ m.content ~ '</think>' }}{% endfor %}")
    (row,) = rows(template, ("user", "a</think>"), ("assistant", "b</think>c"))
    assert template.end == "</think>" and row.ids.count(template.end_id) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_stops_at_the_end_of_turn_and_at_eos(templates, family):
    """Both, each once."""
    template = templates["bytes", family]
    _, eos, end = FAMILIES[family]
    assert template.end == end
    assert template.tokenizer.convert_ids_to_tokens(template.stop_ids) == list(dict.fromkeys([end, eos]))


def test_what_follows_the_end_token_is_not_trained_on(tokenizers):
    """Phi-3's template ends a conversation with eos after the end of turn; its end token swallows the line break."""
    tokenizer = build("bytes", "llama3")
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, rstrip=True)], special_tokens=True)
    text = "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '<|end|>\\n' }}{% endfor %}"
    text += "{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
    template = custom(tokenizer, text)
    (row,) = rows(template, USER, HELLO, BYE, CIAO)
    shown = show_chat_row(row, tokenizer)
    assert shown.endswith("<|assistant|>\n[[Hello<|end|>]]<|user|>\nBye<|end|><|assistant|>\n[[Ciao<|end|>]]")
    assert tokenizer.convert_ids_to_tokens(template.stop_ids) == ["<|end|>", "<|end_of_text|>"]
    tokenizer.chat_template = text
    turns = list(talk(USER, HELLO, BYE))
    assert template.prompt(turns).ids == tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]


def test_a_date_does_not_change_overnight(tokenizers):
    text = "{{- bos_token ~ strftime_now('%d %b %Y') }}" + TEMPLATES["plain"]
    template = custom(tokenizers["bytes", "llama3"], text)
    assert template.text_of(talk(USER)) == "<|begin_of_text|>26 Jul 2024User: Hi\nAssistant:"
    assert "fixed to 26 Jul 2024" in template.notes["date"]
    again = custom(tokenizers["bytes", "llama3"], template.text)  # as saved with an adapter
    assert again.text == template.text and again.hash == template.hash


# --- turns that a template does not take


def test_a_system_turn_that_would_be_dropped_silently_is_folded(tokenizers):
    text = "{% for m in messages if m.role != 'system' %}{{ m.role ~ ': ' ~ m.content ~ eos_token }}{% endfor %}"
    template = custom(tokenizers["bytes", "mistral"], text)
    assert template.text_of(talk(SYSTEM, USER), False) == "user: Be brief\n\nHi</s>"
    assert "no system turn" in template.notes["system"] and "tool" not in template.notes


@pytest.mark.parametrize("family", ["mistral", "gemma"])
def test_tool_turns_become_user_turns_where_roles_alternate(templates, family):
    template = templates["bytes", family]
    assert "tool" in template.notes
    ids = template.prompt(talk(USER, ("assistant", "f()"), ("tool", "1"), ("tool", "2"))).ids
    assert ids == template.prompt(talk(USER, ("assistant", "f()"), ("user", "1\n\n2"))).ids


def test_a_system_turn_that_moves_to_the_last_question_gives_one_row_per_answer(tokenizers):
    """As the later Mistral templates do: the text before the first answer is then another one."""
    text = (FOLDER / "system_last.jinja").read_text(encoding="utf-8")
    template = custom(tokenizers["bytes", "mistral"], text)
    shown = [show_chat_row(row, template.tokenizer) for row in rows(template, SYSTEM, USER, HELLO, BYE, CIAO)]
    assert shown == [
        "<s>[INST] Be brief: Hi [/INST][[ Hello</s>]]",
        "<s>[INST] Hi [/INST] Hello</s>[INST] Be brief: Bye [/INST][[ Ciao</s>]]",
    ]


def test_tool_turns_are_left_to_a_template_that_takes_them(templates):
    template = templates["bytes", "qwen"]
    text = template.text_of(talk(USER, HELLO, ("tool", "1"), ("tool", "2")))
    tool = "\n<tool_response>\n{}\n</tool_response>"
    assert text.endswith(f"user{tool.format(1)}{tool.format(2)}<|im_end|>\n<|im_start|>assistant\n")


def test_a_refused_conversation_is_named(templates):
    with pytest.raises(InputError) as caught:
        rows(templates["bytes", "mistral"], USER, HELLO, HELLO)
    assert "the row with id 7: the tokenizer's chat template refuses the turns user, assistant, assistant" in str(
        caught.value
    )


# --- conversations that are too long

LONG = [SYSTEM] + [pair for i in range(6) for pair in (("user", f"Hi {i}" * 4), ("assistant", f"Hello {i}" * 4))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_early_turns_are_dropped_and_every_answer_is_trained_on_once(templates, family, loss_on):
    """The system turn stays, a row begins with a question, and no answer is dropped or cut."""
    template = templates["bytes", family]
    whole = rows(template, *LONG)
    longest = max(row.length for row in whole)
    for max_length in (longest - 1, longest * 2 // 3, longest // 2):
        found = rows(template, *LONG, max_length=max_length, loss_on=loss_on)
        answers = "".join(
            template.tokenizer.decode([i for i, on in zip(row.ids, row.mask, strict=True) if on]) for row in found
        )
        for i in range(6):
            assert answers.count(f"Hello {i}" * 4) == 1 or loss_on == "all" and family == "qwen3"
        assert max(row.length for row in found) <= max_length and found[-1].dropped_turns > 0
        assert not any(row.cut or row.shortened for row in found)
        for row in found:
            assert "Be brief" in template.tokenizer.decode(row.ids) and row.id == "7"
            assert row.dropped_turns % 2 == 0 and row.ids[-1] == template.end_id
            start = next(i for i, on in enumerate(row.mask) if on)
            if loss_on == "assistant":  # as chat would prompt, with the same turns
                left = [SYSTEM, *LONG[1 + row.dropped_turns :]]
                prompts = [template.prompt(talk(*left[:i])).ids for i in range(2, len(left), 2)]
                assert row.ids[:start] in prompts


def test_chat_drops_as_few_turns_as_it_must(templates):
    template = templates["bytes", "chatml"]
    messages = talk(*LONG, USER)
    whole = template.prompt(messages)
    assert whole.dropped_turns == 0 and template.prompt(messages, whole.length) == whole
    less = template.prompt(messages, whole.length - 1)
    assert less.dropped_turns == 2 and less.ids == template.prompt(talk(SYSTEM, *LONG[3:], USER)).ids
    long = template.prompt(talk(SYSTEM, *LONG[1:3], ("user", "Hi " * 300)), 100)
    assert long.dropped_turns == 2 and long.shortened and 97 < long.length <= 100
    assert template.tokenizer.decode(long.ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(InputError, match="--max_length 10 is too short"):
        template.prompt(messages, 10)
    data = ChatData({"train": [], "test": [Conversation("7", messages)]}, {"train": {"name": "t.csv"}}, {"rows": {}})
    with pytest.raises(InputError, match="^t.csv, the row with id 7: --max_length 10 is too short: all but the texts"):
        chat_rows(data, template, 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_question_is_shortened_and_its_answer_stays_complete(templates, family):
    """Answer and end token are kept, the length is used up, what the template writes is not touched."""
    template = templates["bytes", family]
    answer = rows(template, USER, HELLO)[0]
    (row,) = rows(template, SYSTEM, ("user", "Hi " * 300), HELLO, max_length=80)
    assert row.shortened and not row.cut and 77 < row.length <= 80
    trained = sum(answer.mask)
    assert row.ids[-trained:] == answer.ids[-trained:] and sum(row.mask) == trained
    text = template.tokenizer.decode(row.ids)
    messages = template.text_of(talk(SYSTEM, ("user", ("Hi " * 300)[: text.count("Hi") * 3 - 1])))
    assert "".join(text.split()).startswith("".join(messages.split()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_answer_does_not_teach_to_stop(templates, family):
    template = templates["bytes", family]
    (row,) = rows(template, USER, ("assistant", "Hello " * 300), max_length=60)
    assert row.cut and not row.shortened and row.length == 60 and row.mask[-1] == 1
    trained = [i for i, on in zip(row.ids, row.mask, strict=True) if on]
    assert not set(trained) & set(template.stop_ids)
    assert row.ids[: 60 - len(trained)] == template.prompt(talk(USER)).ids
    (both,) = rows(template, ("user", "Hi " * 300), ("assistant", "Hello " * 300), max_length=90)
    assert both.cut and both.shortened and both.length == 90
    room = 90 - template.prompt(talk(("user", "H"))).length
    assert room // 2 <= sum(both.mask) <= room // 2 + 3  # question and answer share what the template leaves


def test_a_long_result_of_a_tool_is_shortened(templates):
    template = templates["bytes", "qwen"]
    turns = [USER, ("assistant", "f()"), ("tool", "Bye " * 200), HELLO]
    first, second = rows(template, *turns, max_length=70)
    assert "f()" in show_chat_row(first, template.tokenizer).split("[[")[1] and not first.shortened
    assert second.shortened and not second.cut and second.dropped_turns == 0 and second.length <= 70
    assert "Hi" in template.tokenizer.decode(second.ids) and sum(second.mask) == 2


@pytest.mark.parametrize("times", [30, 900])
def test_a_system_turn_is_never_cut(templates, times):
    turns = [("system", "Be brief " * times), USER, HELLO]
    with pytest.raises(InputError) as caught:
        rows(templates["bytes", "chatml"], *turns, max_length=40)
    assert "the row with id 7: --max_length 40 is too short: all but the texts of user and tools" in str(caught.value)
    wanted = int(str(caught.value).split("at least ")[1].rstrip("."))
    assert not rows(templates["bytes", "chatml"], *turns, max_length=wanted)[0].cut


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_long_turn_only_the_beginning_is_tokenized(templates, kind, monkeypatch):
    """The ids are those of the complete turn, in a question, in an answer, and in both."""
    template, encoded = templates[kind, "chatml"], []
    ids = template.encoder._ids
    long = ["Hi " * 3000, "Hello" * 2000, "é😀" * 3000, "<|im_end|>" * 900, "\n" * 9000 + "Hi"]
    turns = [(("user", text), HELLO) for text in long] + [(USER, ("assistant", text)) for text in long]
    turns += [(("user", text), ("assistant", text), USER, HELLO) for text in long]

    def found() -> list:
        template.encoder._known = {}
        return [(rows(template, *some, max_length=100), template.prompt(talk(*some)[:-1], 100)) for some in turns]

    monkeypatch.setattr(template.encoder, "_ids", lambda texts: encoded.append(sum(map(len, texts))) or ids(texts))
    cut = found()
    characters = sum(encoded)
    monkeypatch.setattr(pieces, "CHARACTERS", 10**6)
    assert found() == cut and characters < (sum(encoded) - characters) / 2


def test_rows_of_every_length_have_a_target(templates):
    """0 rows without a supervised token, none over the length, whatever has to be left out."""
    for family in FAMILIES:
        for max_length in range(34, 200, 23):
            for row in rows(templates["bytes", family], *LONG, ("user", "a" * 300), HELLO, max_length=max_length):
                assert row.length <= max_length and sum(row.mask) and not row.mask[0]


# --- the report


def test_the_report_counts_what_was_left_out(templates):
    template = templates["bytes", "gemma"]
    conversations = [Conversation("0", talk(USER, HELLO)), Conversation("1", talk(*LONG))]
    conversations += [Conversation("2", talk(("user", "Hi " * 300), HELLO))]
    conversations += [Conversation("3", talk(USER, ("assistant", "Hello " * 300)))]
    splits = {"train": conversations, "validation": [], "test": conversations[:1]}
    report = {"files": {"train": {"name": "t.jsonl", "sha256": "0" * 64}}, "shapes": {"train": {"messages": 4}}}
    data = ChatData(splits, {}, {**report, "rows": {"train": {}, "test": {}}, "cut_from_train": {"test": 1}})
    found = chat_rows(data, template, 110)
    entry = data.report["rows"]["train"]
    assert {name: entry[name] for name in ("in_several_rows", "shortened", "cut_answers")} == dict.fromkeys(
        ("in_several_rows", "shortened", "cut_answers"), 1
    )
    assert entry["rendered"] == len(found["train"]) > 4 and entry["without_early_turns"] > 0
    assert entry["tokens"] == sum(row.length for row in found["train"]) > entry["trained_tokens"]
    assert [row.id for row in found["test"]] == ["0"] and found["validation"] == []
    assert data.report["chat_template"] == {
        "source": "the tokenizer's chat template", "sha256": template.hash, "end": "<end_of_turn>",
        "notes": [template.notes["system"]],
    }  # fmt: skip
    shown = data_report(data.report, show_chat_row(found["test"][0], template.tokenizer))
    for line in (
        "- train: shape messages (4 rows)",
        "- test: 1 rows cut from the training file; row ids in splits.json",
        f"- the tokenizer's chat template (sha256 {template.hash[:12]}); answers end with <end_of_turn>",
        "- the chat template takes no system turn: it is put before the first user turn",
        "    [[Hello<end_of_turn>]]",
    ):
        assert line in shown.splitlines()
    assert "rows without early turns" in shown and "label" not in shown


@pytest.mark.parametrize("family", FAMILIES)
def test_the_demo_renders_with_every_template(templates, family):
    """Each answer of the demo is trained on completely, its end included."""
    template = templates["bytes", family]
    data = load_conversations(Demo())
    found = chat_rows(data, template, 4000)
    for split, rows in found.items():
        entry = data.report["rows"][split]
        assert not any(entry[name] for name in FITTED)
        ends = sum(token == template.end_id for row in rows for token, on in zip(row.ids, row.mask, strict=True) if on)
        assert ends == entry["answers"]
        assert entry["rendered"] == (entry["answers"] if family == "qwen3" else entry["used"])


# --- templates that cannot be used


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}{{ m.content ~ '\n' }}{% endfor %}", "puts no special token after an answer"),
        ("{{ bos_token }}{{ messages[0].content }}", "leaves the answer out"),
        ("{% for m in messages %}{{ m.conten", "refuses the turns user: "),
        ("{{ raise_exception('never') }}", "refuses the turns user: never. Change them, or give another"),
        (
            "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}assistant:<think>{% endif %}",
            "asks for an answer with 'xuserx</s>assistant:<think>', but writes it after 'xuserx</s>assistant:xanswerx",
        ),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_trained_with(tokenizers, tmp_path, text, message):
    (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(InputError) as caught:
        choose_template(tokenizers["bytes", "mistral"], str(tmp_path / "t.jinja"))
    assert message in str(caught.value) and "t.jinja" in str(caught.value)


def test_the_template_is_chosen_as_told(tokenizers, tmp_path):
    tokenizer = build("bytes", "llama3")
    own = choose_template(tokenizer)
    assert own.source == "the tokenizer's chat template" and own.text == tokenizer.chat_template
    assert own.hash != choose_template(tokenizer, "plain").hash
    (tmp_path / "t.jinja").write_text(tokenizer.chat_template)
    assert choose_template(tokenizer, str(tmp_path / "t.jinja")).hash == own.hash
    tokenizer.chat_template = {"default": own.text, "tool_use": "x"}
    assert choose_template(tokenizer).hash == own.hash
    for nothing in ({"tool_use": "x"}, None):
        tokenizer.chat_template = nothing
        with pytest.raises(InputError, match="no chat template.*--chat_template, one of chatml, alpaca, plain, or"):
            choose_template(tokenizer)
    with pytest.raises(InputError, match="--chat_template vicuna: there is no such file .*, or give one of chatml, "):
        choose_template(tokenizer, "vicuna")
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(InputError, match="latin: the file is not UTF-8"):
        choose_template(tokenizer, str(tmp_path / "latin"))


def test_chatml_is_refused_where_its_tokens_are_missing(tmp_path):
    """Nothing is added to a vocabulary."""
    build_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no token <\|im_end\|> or <\|im_start\|>.*Use alpaca or plain"):
        choose_template(tokenizer, "chatml")
    (row,) = rows(choose_template(tokenizer, "plain"), USER, HELLO)
    assert row.ids[0] == 1 and row.ids.count(1) == 1 and row.ids[-1] == 2 == tokenizer.pad_token_id and row.mask[-1]


# --- long conversations


def exchanges(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Turns of random texts; some answers have thinking, some are calls of a tool."""

    def text() -> str:
        return rng.choice(NASTY) if rng.random() < 0.2 else " ".join(rng.choices(CORPUS, k=rng.randint(1, 6)))

    turns = [("system", text())] * rng.randint(0, 1)
    for _ in range(count):
        turns += [("user", text())]
        if rng.random() < 0.2:
            turns += [("assistant", text()), ("tool", text())]
        turns += [("assistant", rng.choice(["", "", "", "<think>\nBe brief\n</think>\n\n"]) + text())]
    return turns


EVERY = "{% for m in messages %}{{ FIRST }}{{ m.role ~ ':' ~ m.content ~ LAST ~ eos_token }}{% endfor %}"
ASK = "{{ 'assistant:' if add_generation_prompt }}"
ODD = {  # exchanges that depend on other turns
    "first": EVERY.replace("FIRST", "'first ' if loop.first") + ASK,
    "trim": EVERY.replace("m.content", "(m.content | trim)") + ASK,
    "numbered": EVERY.replace("FIRST", "loop.index if m.role == 'user'") + ASK,
    "late": EVERY.replace("FIRST", "'late ' if loop.index > 8 and m.role == 'user'") + ASK,
    "neighbor": EVERY.replace("FIRST", "'long ' if m.role == 'user' and (loop.previtem or m).content[9:]") + ASK,
    "last answer": EVERY.replace("LAST", "('!' if loop.last and m.role == 'assistant' else '')") + ASK,
    "last by the first": EVERY.replace("LAST", "('!' * 20 if loop.last and 'B' in messages[0].content else '')") + ASK,
    "by the system turn": EVERY.replace("FIRST", "messages[0].content[:2] if m.role == 'user'") + ASK,
    "no role": "{% for m in messages %}{{ '#' ~ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*FAMILIES, *TEMPLATES, "system_last", *ODD])
def test_exchanges_rendered_apart_give_the_same_rows(tokenizers, templates, name, kind, monkeypatch):
    """As all turns rendered before every answer: ids, masks and what is left out, for training and for prompts."""
    if name in FAMILIES:
        template = templates[kind, name]
    elif name in TEMPLATES:
        template = choose_template(tokenizers[kind, "chatml"], name)
    else:
        text = ODD[name] if name in ODD else (FOLDER / "system_last.jinja").read_text(encoding="utf-8")
        template = custom(tokenizers[kind, "mistral"], text.replace("FIRST", "''").replace("LAST", "''"))
    rng = random.Random(name)
    for count in (1, 2, 3, 5, 9):
        turns, length = talk(*exchanges(count, rng)), rng.choice([150, 250, 10**6])
        ways = []
        for few in (0, 10**6):
            monkeypatch.setattr(chat, "FEW", few)
            found = template.rows(Conversation("7", turns), length)
            ways.append([*found, template.prompt(turns[:-1], length), template.prompt(turns[:-1])])
        assert ways[0] == ways[1]


@pytest.mark.parametrize("length", [10**6, 200])
@pytest.mark.parametrize("name", ["llama3", *TEMPLATES])
def test_twice_the_turns_are_twice_the_work(tokenizers, name, length, monkeypatch):
    """For training and for a prompt: turns rendered, characters tokenized."""

    def work(count: int) -> int:
        own = name not in TEMPLATES
        template = choose_template(tokenizers["bytes", "llama3" if own else "chatml"], None if own else name)
        done = []

        def note(real):
            return lambda things, *args, **options: done.append(len(str(things))) or real(things, *args, **options)

        monkeypatch.setattr(template, "_render", note(template._render))
        monkeypatch.setattr(template.encoder, "_ids", note(template.encoder._ids))
        turns = talk(*[USER, HELLO, BYE, CIAO] * count)
        template.rows(Conversation("7", turns), length)
        template.prompt(turns[:-1], length)
        return sum(done)

    assert work(120) < 2.4 * work(60)
