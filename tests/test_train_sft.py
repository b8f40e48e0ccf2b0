"""train_sft.py: a run that is the same however it is cut, and a model that ends its answers by itself."""

import json
import shutil
import sys

import pytest
import sacrebleu
import torch
import transformers
from helpers import ROOT
from helpers.models import FAMILIES, build_model
from helpers.rows import TOPICS, chats, read_jsonl, write_jsonl
from helpers.runs import Stopped, assert_same_bits, assert_same_updates, quick, run_evaluate, stop_at
from helpers.runs import train_chat as train
from helpers.scripts import run_script
from peft import LoraConfig, get_peft_model

import train_sft
from common.data.conversations import Conversation
from common.errors import InputError
from common.measure.metrics import text_overlap
from common.model import attention, storage
from common.model.losses import token_losses
from common.model.token_losses import TokenLosses
from common.text.batches import collate_chat
from common.text.chat import choose_template

TWO = """
import json, sys
sys.path[:0] = sys.argv[1:3]
from helpers.runs import train_chat
jobs = json.loads(open(sys.argv[3]).read())
for options in jobs:
    train_chat(*options, last=options is jobs[-1])
"""


def test_an_update_is_the_same_however_it_is_cut(models, chat_files, tmp_path):
    """(4, 1, 1) == (2, 2, 1) == (2, 1, 2 processes) in loss, gradient norm, weights, metrics."""
    jobs = []
    for family in FAMILIES:
        options = ["--model", str(models[family]), *chat_files, "--max_steps", 4, "--lora_dropout", 0]
        options += ["--baselines", "true"]
        for name, batch, accumulation in (("big", 4, 1), ("small", 2, 2)):
            sizes = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
            train(*options, *sizes, "--output_dir", tmp_path / name / family)
        jobs.append([*options, "--per_device_train_batch_size", 2, "--output_dir", str(tmp_path / "two" / family)])
    (tmp_path / "two.py").write_text(TWO)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_script(tmp_path / "two.py", str(ROOT), str(ROOT / "tests"), str(tmp_path / "jobs.json"), processes=2)
    for family in FAMILIES:
        big = tmp_path / "big" / family
        for other in (tmp_path / "small" / family, tmp_path / "two" / family):
            assert_same_updates(big, other)
            for name in ("metrics.json", "baselines.json"):
                first, second = (json.loads((run / "eval/test" / name).read_text()) for run in (big, other))
                first, second = first.get("untrained base", first), second.get("untrained base", second)
                assert first["eval_loss"] == pytest.approx(second["eval_loss"], rel=1e-5)
                assert (first["rows"], first["predicted_tokens"]) == (second["rows"], second["predicted_tokens"])


@pytest.mark.parametrize("family", FAMILIES)
def test_resuming_is_exact(models, chat_files, tmp_path, monkeypatch, family):
    """Killed between two checkpoints, with dropout, the run ends with the same bits."""
    options = ["--model", models[family], *chat_files, "--lora_dropout", 0.1, "--max_steps", 7]
    options += ["--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "steps", "--eval_steps", 3]
    train(*options, "--output_dir", tmp_path / "whole")
    from common.train import loop

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, loop, "finite_mean", 6)
        train(*options, "--output_dir", tmp_path / "cut")
    train(*options, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "latest")
    assert_same_bits(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_the_loss_is_that_of_the_masked_tokens(models, family, loss_on):
    """Against transformers' own loss, one row at a time; beside padded rows, and with pad == eos."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[family])
    model = transformers.AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32)
    template = choose_template(tokenizer, "plain")
    messages = [tuple(row["messages"]) for row in chats(4)]
    rows = [template.rows(Conversation(str(i), turns), 96, loss_on)[0] for i, turns in enumerate(messages)]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    batch = collate_chat([(row, i != 3) for i, row in enumerate(rows)], tokenizer.pad_token_id)
    nats = 0.0
    for row in rows[:3]:
        labels = [token if trained else -100 for token, trained in zip(row.ids, row.mask, strict=True)]
        loss = model(torch.tensor([row.ids]), labels=torch.tensor([labels])).loss
        nats += loss.item() * sum(row.mask)
        assert labels[-1] == tokenizer.eos_token_id or loss_on == "all"  # the end token is learnt
    with torch.no_grad():
        losses = token_losses(TokenLosses(model), batch)
    assert (losses * batch.weights).sum().item() == pytest.approx(nats, rel=1e-5)
    assert batch.weights.sum().item() == sum(sum(row.mask) for row in rows[:3])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_behind_a_shared_system_turn_is_the_padded_batch(models, family):
    """Loss and every LoRA gradient, fp32, LoRA B not zero."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[family])
    model = transformers.AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32)
    attention.use(model)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    losses = TokenLosses(get_peft_model(model, lora))
    template = choose_template(tokenizer, "plain")
    system = {"role": "system", "content": "the coach of the team " * 4}
    messages = [(system, *row["messages"]) for row in chats(7)]
    rows = [template.rows(Conversation("", turns), 160)[0] for turns in messages]
    found = {}
    for way in ("on", "off"):
        losses.zero_grad()
        batch = collate_chat([(row, True) for row in rows], 2, way)
        total = (token_losses(losses, batch) * batch.weights).sum()
        total.backward()
        found[way] = total.item(), [p.grad.clone() for p in losses.parameters() if p.requires_grad]
    assert len(batch.input_ids) == 7  # padded, and before that a pack
    assert len(collate_chat([(row, True) for row in rows], 2, "auto").input_ids) == 1
    assert found["on"][0] == pytest.approx(found["off"][0], rel=1e-5)
    for a, b in zip(found["on"][1], found["off"][1], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize(
    ("family", "extra"),
    [("llama", ()), ("mistral", ("--load_in_4bit", "true", "--mixed_precision", "bf16")),
     ("gemma", ("--loss_on", "all")), ("qwen", ("--full_finetuning", "true"))],
)  # fmt: skip
def test_a_run_learns_and_is_loaded_again(models, chat_files, tmp_path, family, extra):
    options = ["--model", models[family], *chat_files, "--learning_rate", 1e-2, "--num_train_epochs", 12]
    figures = train(*options, "--baselines", "true", "--system_prompt", "You coach", *extra, "--output_dir", tmp_path)
    baseline = json.loads((tmp_path / "eval/test/baselines.json").read_text())["untrained base"]
    assert figures["perplexity"] < 0.5 * baseline["perplexity"]
    folder = tmp_path / ("model" if "--full_finetuning" in extra else "adapter")
    task = json.loads((folder / "task.json").read_text())
    assert (task["task"], task["system_prompt"]) == ("chat", "You coach")
    model, tokenizer, template = storage.load_chat_model(folder, "cpu")
    assert template.hash == task["chat_template_hash"] and tokenizer.chat_template == template.text
    assert set(model.generation_config.eos_token_id) == {tokenizer.eos_token_id}
    saved = transformers.GenerationConfig.from_pretrained(str(folder))  # the end of a turn, and eos
    assert saved.eos_token_id == template.stop_ids
    report = (tmp_path / "eval/test/report.md").read_text()
    assert "untrained base" in report and f"{figures['eval_loss']:.3f}" in report


def test_another_template_is_said(models, chat_files, tmp_path, capsys):
    train("--model", models["llama"], *chat_files, "--max_steps", 1, "--output_dir", tmp_path)
    storage.load_chat_model(tmp_path / "adapter")
    assert "warning" not in capsys.readouterr().err
    *_, template = storage.load_chat_model(tmp_path / "adapter", chat_template="alpaca")
    assert "--chat_template alpaca is not the chat template" in capsys.readouterr().err
    assert "### Response" in template.text


def test_a_generation_config_that_contradicts_itself_is_saved_without_what_contradicts(models, chat_files, tmp_path):
    """Some checkpoints ship settings of a draw beside greedy search, which transformers reads but refuses to save."""
    shutil.copytree(models["llama"], tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "eos_token_id": 7}')
    train("--model", tmp_path / "model", *chat_files, "--max_steps", 1, "--output_dir", tmp_path / "run")
    saved = transformers.GenerationConfig.from_pretrained(str(tmp_path / "run" / "adapter"))
    assert (saved.temperature, saved.top_p) in ((None, None), (1.0, 1.0)) and 7 in saved.eos_token_id


def test_an_overfitted_model_ends_its_answers_by_itself(tmp_path):
    """20 rows, pad == eos; plain `generate` with the saved settings stops at an end token."""
    model = build_model(tmp_path / "model", "llama", hidden_size=64, head_dim=16)
    words = [word for pair in TOPICS.items() for word in pair] + ["melody", "rhythm", "tempo", "sonata", "genome"]
    rows = [
        {"instruction": f"{words[i % 15]} {words[(i * 4 + 1) % 15]} {i}", "output": " ".join(words[i % 7 : i % 7 + 3])}
        for i in range(20)
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = ["--train_file", file, "--validation_file", file, "--test_file", file, "--eval_strategy", "no"]
    options += ["--learning_rate", 1e-2, "--lora_r", 16, "--num_train_epochs", 60, "--output_dir", tmp_path / "run"]
    train("--model", model, *options)
    tuned, tokenizer, template = storage.load_chat_model(tmp_path / "run" / "adapter", "cpu")
    right = stopped = 0
    for row in rows:
        ids = template.prompt([{"role": "user", "content": row["instruction"]}]).ids
        with torch.inference_mode():
            output = tuned.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, use_cache=True)
        answer = output[0, len(ids) :].tolist()
        stopped += answer[-1] in template.stop_ids
        right += tokenizer.decode(answer, skip_special_tokens=True).strip() == row["output"]
    assert stopped >= 19 and right >= 15


def test_answers_are_measured(models, chat_files, tmp_path):
    """evaluate.py: the loss of training's own evaluation; greedy answers and what they share with the references."""
    options = ["--model", models["qwen"], *chat_files, "--learning_rate", 1e-2, "--num_train_epochs", 12]
    figures = train(*options, "--baselines", "true", "--output_dir", tmp_path / "run")
    found = {}
    for batch in (1, 8):
        more = ["--max_new_tokens", 20, "--per_device_eval_batch_size", batch, "--output_dir", tmp_path / str(batch)]
        run_evaluate("--run", tmp_path / "run", *more)
        found[batch] = json.loads((tmp_path / str(batch) / "metrics.json").read_text())
    assert found[8]["eval_loss"] == pytest.approx(figures["eval_loss"], rel=1e-5)
    rows_of = {batch: read_jsonl(tmp_path / str(batch) / "predictions.jsonl") for batch in found}
    nats = [[row.pop("nats") for row in rows] for rows in rows_of.values()]
    assert nats[0] == pytest.approx(nats[1], rel=1e-4) and sum(nats[0]) > 0
    assert rows_of[1] == rows_of[8]  # greedy answers do not depend on the batch
    rows = rows_of[8]
    assert [row["id"] for row in rows] == [str(i) for i in range(7)]
    gold = [row["messages"][-1]["content"] for row in chats(7, 30)]
    assert [row["gold"] for row in rows] == gold
    assert found[8]["stopped"] == sum(row["stopped"] for row in rows) / 7
    same = [100.0 * (row["gold"] == row["prediction"]) for row in rows]
    assert found[8]["rouge_l"] >= sum(same) / 7
    answers = [row["prediction"] for row in rows]
    assert found[8]["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, [gold]).score)
    assert found[8]["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, [gold]).score)
    report = (tmp_path / "8" / "report.md").read_text()
    assert "untrained base" in report and report.count("reference:") == 7
    run_evaluate("--run", models["qwen"], "--task", "chat", "--chat_template", "plain", *chat_files[4:],
                 "--max_length", 96, "--max_new_tokens", 5, "--mixed_precision", "no", "--load_in_4bit", "false",
                 "--output_dir", tmp_path / "base")  # fmt: skip
    base = json.loads((tmp_path / "base" / "metrics.json").read_text())
    saved = json.loads((tmp_path / "run/eval/test/baselines.json").read_text())["untrained base"]
    assert base["eval_loss"] == pytest.approx(saved["eval_loss"], rel=1e-5)
    with pytest.raises(InputError, match="does not belong to chat"):
        run_evaluate("--run", tmp_path / "run", "--block_size", 9)


def test_overlap_with_references():
    metrics = text_overlap(["the cat sat", "no idea"], ["the cat sat", "the dog ran away"])
    assert metrics["rouge_l"] == pytest.approx(50) and 0 < metrics["chrf"] < 100
    low, high = metrics["intervals_95"]["rouge_l"]
    assert low <= 50 <= high
    assert text_overlap(["a b c d"], ["a b c d"])["bleu"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_file", "gone.jsonl"], "gone.jsonl: there is no such file"),
        (["--labels", "a"], "there is no such option"),
        (["--block_size", "9"], "there is no such option"),
        (["--model", "{llama}"], "The tokenizer has no chat template"),
        (["--model", "{llama}", "--max_length", "600"], "longer than the 512 positions"),
        (["--model", "{llama}", "--chat_template", "chatml"], "the tokenizer has no token"),
        (["--model", "{llama}", "--chat_template", "gone.jinja"], "there is no such file"),
        (["--validation_fraction", "0.5", "--test_fraction", "0.5", "--train_file", "x"], "leave no training rows"),
    ],
)
def test_bad_input_is_one_paragraph(models, monkeypatch, capsys, options, message):
    options = [option.format(llama=models["llama"]) for option in options]
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *options, "--report_to", "none"])
    with pytest.raises(InputError, match=message), quick():
        train_sft.main()
