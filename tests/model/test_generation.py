"""Answers: the same in a batch, alone, streamed and by transformers itself; where they end; which settings hold."""

import contextlib
import random
import threading

import pytest
import torch
import transformers
from helpers.models import FAMILIES
from helpers.templates import FAMILIES as TEMPLATES
from helpers.templates import FOLDER, build
from helpers.threads import alive, waiting_threads
from peft import LoraConfig, get_peft_model

from common.data.conversations import Conversation
from common.errors import InputError
from common.model import base_model, generation, lora
from common.model.generation import StopRule, answer_prompts, generation_settings, prompt_room, stream
from common.options import Sampling, check
from common.text.chat import ChatTemplate, choose_template

QUESTIONS = ["goal", "atom laser quark?", "violin " * 9, "team coach league striker " * 3, "a", "tempo 12", "x " * 30,
             "genome and stadium", "sonata number 7 is what"]  # fmt: skip
GREEDY = Sampling(do_sample=False, max_new_tokens=12)


@pytest.fixture(scope="module")
def loaded(models) -> dict:
    """family -> (fp32 model, tokenizer with pad == eos, template)."""
    result = {}
    for family, folder in models.items():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        result[family] = model, tokenizer, choose_template(tokenizer, "plain")
    return result


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def prompts_of(template: ChatTemplate) -> list[list[int]]:
    return [template.prompt(ask(question)).ids for question in QUESTIONS]


@contextlib.contextmanager
def writing(model, scripts: list[list[int]]):
    """The model writes these ids, a script per row of the batch, then the vocabulary's first id; counts steps."""
    head, steps = model.get_output_embeddings(), []

    def forced(module, inputs, output):
        for row, script in enumerate(scripts[: len(output)]):
            output[row, -1] = 0
            output[row, -1, script[len(steps)] if len(steps) < len(script) else 0] = 100
        steps.append(1)
        return output

    handle = head.register_forward_hook(forced)
    try:
        yield steps
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("penalty", [None, 1.4])
def test_greedy_answers_do_not_depend_on_the_batch(loaded, family, penalty):
    """In fp32: batches of 8 and 3 == one by one == streamed == transformers' generate, pad == eos."""
    model, tokenizer, template = loaded[family]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    prompts, side = prompts_of(template), tokenizer.padding_side
    settings = Sampling(do_sample=False, max_new_tokens=12, repetition_penalty=penalty)
    one = [answer_prompts(model, tokenizer, template, [ids], settings, 1, "cpu")[0] for ids in prompts]
    for batch_size in (8, 3):
        assert answer_prompts(model, tokenizer, template, prompts, settings, batch_size, "cpu") == one
    assert tokenizer.padding_side == side
    assert len({answer.text for answer in one}) > 3
    for ids, answer in zip(prompts, one, strict=True):
        assert "".join(stream(model, tokenizer, template, ids, settings, "cpu")) == answer.text
        with torch.inference_mode():
            plain = model.generate(
                torch.tensor([ids]), max_new_tokens=12, do_sample=False, repetition_penalty=penalty or 1.0,
                eos_token_id=template.stop_ids, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        assert plain[0, len(ids) :].tolist()[: len(answer.ids)] == answer.ids
        assert answer.stopped == (answer.ids[-1] in template.stop_ids)


def test_padding_does_not_count_as_repetition(loaded):
    """Here the end token is the likeliest unless it is penalized, and is in no prompt but as padding."""
    model, tokenizer, template = loaded["llama"]
    end = tokenizer.eos_token_id

    def forced(module, inputs, output):
        output[:], output[..., end], output[..., 7] = 0, 1.0, 0.9
        return output

    handle = model.get_output_embeddings().register_forward_hook(forced)
    settings = Sampling(do_sample=False, max_new_tokens=3, repetition_penalty=1.5)
    found = answer_prompts(model, tokenizer, template, [[5] * 9, [5, 6]], settings, 2, "cpu")
    handle.remove()
    assert [answer.ids for answer in found] == [[end], [end]]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_while_training_with_checkpointing_are_those_of_afterwards(loaded, models, family):
    """Training mode and gradient checkpointing would change the text without a word."""
    _, tokenizer, template = loaded[family]
    model = transformers.AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32)
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(model, adapter)
    prompts = prompts_of(template)
    expected = answer_prompts(model.eval(), tokenizer, template, prompts, GREEDY, 4, "cpu")
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    assert answer_prompts(model, tokenizer, template, prompts, GREEDY, 4, "cpu") == expected
    model.train()
    assert "".join(stream(model, tokenizer, template, prompts[0], GREEDY, "cpu")) == expected[0].text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantized", [False, True], ids=["bf16", "nf4"])
def test_a_bf16_base_with_an_adapter_answers_without_an_autocast_around(models, loaded, family, quantized):
    """Its adapter's fp32 weights need one (lora.leave_casts_to_autocast); also in the thread that streams."""
    from dataclasses import dataclass

    @dataclass
    class Options(base_model.ModelConfig):
        mixed_precision: str = "bf16"
        full_finetuning: bool = False

    _, tokenizer, template = loaded[family]
    options = Options(load_in_4bit=quantized, bnb_4bit_compute_dtype="bfloat16")
    model, _ = base_model.load_base(str(models[family]), options)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = lora.leave_casts_to_autocast(get_peft_model(model, adapter))
    prompts = prompts_of(template)[:3]
    free = answer_prompts(model, tokenizer, template, prompts, GREEDY, 1, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert answer_prompts(model, tokenizer, template, prompts, GREEDY, 1, "cpu") == free
        assert "".join(stream(model, tokenizer, template, prompts[1], GREEDY, "cpu")) == free[1].text
    assert "".join(stream(model, tokenizer, template, prompts[1], GREEDY, "cpu")) == free[1].text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_begins_with_a_special_token(name):
    """An answer ends at its end token or eos, and at the token that begins any turn; by no text."""
    tokenizer = build("bytes", name)
    template = ChatTemplate(tokenizer, (FOLDER / f"{name}.jinja").read_text(), name)
    stop_rule = StopRule(tokenizer, template)
    assert set(stop_rule.stop_ids) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TEMPLATES[name][2])}
    begins = {"llama3": "<|start_header_id|>", "gemma": "<start_of_turn>"}.get(name, "<|im_start|>")
    if name == "mistral":  # [INST] is text in this one
        assert stop_rule.turn_texts == ["[INST]", "[/INST]"] and not stop_rule.turn_ids
    else:
        assert set(stop_rule.turn_ids) == {tokenizer.convert_tokens_to_ids(begins)} and not stop_rule.turn_texts


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_template_writes_before_an_answer_is_no_part_of_it(name):
    """Qwen3's prompt lacks the empty thinking that it renders before every answer, so models write it."""
    tokenizer = build("bytes", name)
    template = ChatTemplate(tokenizer, (FOLDER / f"{name}.jinja").read_text(), name)
    assert template.answer_prefix == ("<think>\n\n</think>" if name == "qwen3" else "")
    stop_rule = StopRule(tokenizer, template)
    row = template.rows(Conversation("0", [*ask("Hi"), {"role": "assistant", "content": "Hello"}]), 99)[0]
    answer = [token for token, on in zip(row.ids, row.mask, strict=True) if on]
    assert stop_rule.text(answer) == "Hello"
    shown = [stop_rule.text(answer[:n], ended=False) for n in range(1, len(answer))]
    assert all("Hello".startswith(text) for text in shown) and shown == sorted(shown, key=len)


def test_the_models_own_end_tokens_end_an_answer(loaded, monkeypatch):
    """Those of its generation_config, beside those of the template."""
    model, tokenizer, template = loaded["llama"]
    other = tokenizer("goal", add_special_tokens=False)["input_ids"][0]
    assert other not in template.stop_ids
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, other])
    script = [*tokenizer("team coach", add_special_tokens=False)["input_ids"], other, other + 1]
    with writing(model, [script]):
        answer = answer_prompts(model, tokenizer, template, prompts_of(template)[:1], GREEDY, 1, "cpu")[0]
    assert answer.stopped and answer.ids == script[:-1] and "team coach" in answer.text


CASES = [  # template, what the model writes, what is shown
    ("plain", "striker\nUser: and then?\nAssistant: coach", "striker"),
    ("plain", "User: what is", ""),
    ("plain", " Assistant: goal", ""),
    ("plain", "striker\n  User: what is", "striker"),
    ("plain", " striker\n\nAssistant: again", "striker"),
    ("plain", "Users: many\nThe User: me\nUse", "Users: many\nThe User: me\nUse"),
    ("plain", "one\nUs", "one\nUs"),
    ("alpaca", "striker\n\n### Instruction:\nmore", "striker"),
    ("alpaca", "### Explanation: it is\n### Response: it", "### Explanation: it is"),
    ("alpaca", "a # b ## c ### Response", "a # b ## c ### Response"),
    ("plain", "coffee ☕ and 😀 tea", "coffee ☕ and 😀 tea"),
]


@pytest.mark.parametrize(("name", "said", "shown"), CASES)
@pytest.mark.parametrize("ends", [False, True], ids=["continues", "ends"])
def test_invented_turns_never_show(loaded, name, said, shown, ends):
    """Nor any beginning of one while it streams, nor half a character; beside a row that continues (pad == eos)."""
    model, tokenizer, _ = loaded["llama"]
    template = choose_template(tokenizer, name)
    script = tokenizer(said, add_special_tokens=False)["input_ids"]
    whole = shown.strip() == said.strip()
    script += [tokenizer.eos_token_id] * ends
    prompts = prompts_of(template)[:2]
    settings = Sampling(do_sample=False, max_new_tokens=len(script))
    longer = tokenizer("goal team coach " * 40, add_special_tokens=False)["input_ids"]
    with writing(model, [longer, script]):  # the longest prompt is the first row
        other, answer = answer_prompts(model, tokenizer, template, prompts[::-1], settings, 2, "cpu")
    assert (answer.text, answer.stopped) == (shown, whole and ends)
    assert other.text.startswith("goal team coach") and not other.stopped
    with writing(model, [script]):
        pieces = list(stream(model, tokenizer, template, prompts[0], settings, "cpu"))
    assert "".join(pieces) == shown and all(pieces)
    grown = ["".join(pieces[:n]) for n in range(len(pieces))]
    assert all(shown.startswith(text) and "\ufffd" not in text for text in grown)


@pytest.mark.parametrize("name", ["plain", "alpaca"])
def test_what_streams_is_never_taken_back(loaded, name, monkeypatch):
    """Random texts around the beginnings of turns, a character a token: every state is the start of the next one."""
    _, tokenizer, _ = loaded["llama"]
    stop_rule = StopRule(tokenizer, choose_template(tokenizer, name))
    monkeypatch.setattr(stop_rule, "_decode", lambda ids: "".join(map(chr, ids)))
    parts = [
        "\n",
        "\n",
        "\nUs",
        "er",
        ":",
        "User:",
        "Assistant:",
        "### ",
        "\n### Instruction",
        "Response:",
        "a",
        " ",
        "\ufffd",
    ]
    draw, cut = random.Random(0), 0
    for _ in range(2000):
        text = "".join(draw.choices(parts, k=draw.randrange(1, 12)))
        ids = [ord(character) for character in text]
        until = next((n for n in range(1, len(ids) + 1) if stop_rule.begins_turn(ids[:n])), len(ids))
        final, said = stop_rule.text(ids[:until]), ""
        for n in range(1, until):
            shown = stop_rule.text(ids[:n], ended=False)
            assert shown.startswith(said) or len(shown) < len(said) and said.startswith(shown)
            said = max(said, shown, key=len)
            assert final.startswith(said), (text, said, final)
        assert stop_rule.text(ids) == final  # what follows a turn's beginning does not matter
        assert not any(line.strip().startswith(turn[1:]) for line in final.split("\n") for turn in stop_rule.turn_texts)
        assert stop_rule.begins_turn(ids[:until]) == (stop_rule._turn_start(text) is not None)
        cut += stop_rule.begins_turn(ids[:until])
    assert 50 < cut < 1000


def test_running_text_keeps_its_blanks(loaded):
    """Without a template, nothing is cut or stripped, and only the end token ends the text."""
    model, tokenizer, _ = loaded["qwen"]
    script = tokenizer(" goal\nUser: team \n", add_special_tokens=False)["input_ids"]
    with writing(model, [[*script, tokenizer.eos_token_id]]):
        (answer,) = answer_prompts(model, tokenizer, None, [[5, 6]], GREEDY, 1, "cpu")
    assert (answer.text, answer.stopped) == (" goal\nUser: team \n", True)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_fits_into_the_models_positions(loaded, family):
    """Near their end a row goes alone, so that its neighbors do not change it; beyond it there is an error."""
    model, tokenizer, template = loaded[family]
    long, short = [5] * 506, prompts_of(template)[0]
    found = answer_prompts(model, tokenizer, template, [short, long], GREEDY, 8, "cpu")
    assert len(found[1].ids) <= 6
    assert found[0] == answer_prompts(model, tokenizer, template, [short], GREEDY, 8, "cpu")[0]
    with pytest.raises(InputError, match="512 tokens leaves no room for an answer: the model sees 512"):
        answer_prompts(model, tokenizer, template, [[5] * 512], GREEDY, 8, "cpu")
    with pytest.raises(InputError, match="leaves no room"):
        list(stream(model, tokenizer, template, [5] * 512, GREEDY, "cpu"))
    assert prompt_room(model, Sampling(max_new_tokens=100)) == 412
    assert prompt_room(model, Sampling(max_new_tokens=500)) == 256


def test_settings_are_the_models_own_unless_given(loaded):
    """Any setting of sampling turns it on; do_sample false and temperature 0 take the likeliest token."""
    model, tokenizer, template = loaded["llama"]
    stop_rule = StopRule(tokenizer, template)

    def settings(**given):
        return generation_settings(model, Sampling(**given), stop_rule, 2)

    plain = settings()
    assert (plain.do_sample, plain.max_new_tokens, plain.eos_token_id) == (False, 256, stop_rule.ids)
    assert settings(top_p=0.9).do_sample and settings(temperature=0.5).temperature == 0.5
    assert not settings(temperature=0.0).do_sample
    own = model.generation_config
    try:
        model.generation_config = transformers.GenerationConfig(
            do_sample=True, temperature=0.6, top_k=7, repetition_penalty=1.2, max_new_tokens=33, num_beams=4
        )
        found = settings(top_k=0)
        assert (found.do_sample, found.temperature, found.top_k) == (True, 0.6, 0)
        assert (found.repetition_penalty, found.max_new_tokens, found.num_beams) == (1.2, 33, 1)
        assert not settings(do_sample=False).do_sample and not settings(temperature=0.0).do_sample
        assert model.generation_config.num_beams == 4  # not changed
    finally:
        model.generation_config = own
    for given in ({"do_sample": False, "top_p": 0.5}, {"do_sample": False, "temperature": 0.5},
                  {"do_sample": True, "temperature": 0.0}):  # fmt: skip
        with pytest.raises(InputError, match="--do_sample"):
            check(Sampling(**given))
    check(Sampling(do_sample=False, temperature=0.0))


def test_samples_follow_the_seed(loaded):
    model, tokenizer, template = loaded["mistral"]
    prompts = prompts_of(template)

    def sampled(seed):
        settings = Sampling(temperature=1.5, top_p=0.95, top_k=0, max_new_tokens=8, seed=seed)
        return [answer.ids for answer in answer_prompts(model, tokenizer, template, prompts, settings, 8, "cpu")]

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_stream_can_be_closed_and_passes_errors_on(loaded, monkeypatch):
    """Closed, it ends its thread at the next token; an error in the thread is one for who reads."""
    model, tokenizer, template = loaded["gemma"]
    before = threading.active_count()
    words = tokenizer("goal team coach " * 200, add_special_tokens=False)["input_ids"]
    with writing(model, [words]) as steps:
        pieces = stream(model, tokenizer, template, [5, 6, 7], Sampling(max_new_tokens=400), "cpu")
        assert next(pieces) and next(pieces)
        pieces.close()
    assert len(steps) < 400
    assert threading.active_count() == before
    monkeypatch.setattr(generation, "_generate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(stream(model, tokenizer, template, [5], GREEDY, "cpu"))
    assert threading.active_count() == before


def test_no_thread_of_the_one_that_reads_waits_while_another_writes(loaded):
    """More threads than cores would wait in turn: an answer took 2.2 times as long on two cores."""
    model, tokenizer, template = loaded["llama"]
    with waiting_threads() as waiting:
        pieces = stream(model, tokenizer, template, [5, 6, 7], Sampling(max_new_tokens=40), "cpu")
        next(pieces)
        assert not waiting & alive()
        pieces.close()
