"""A run that goes on from the weights of another one, with other data or labels."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.models import build_model
from helpers.rows import toy_rows, write_csv
from helpers.runs import train, train_chat, train_text, weights
from helpers.scripts import expect_error, run_alone

from common.errors import InputError
from common.model import base_model

FEW = ["--max_steps", 2, "--eval_strategy", "no"]
STILL = ["--max_steps", 1, "--eval_strategy", "no", "--learning_rate", 0]  # what it began with is what it saves
HEAD = "base_model.model.score.weight"


@pytest.fixture(scope="module")
def more_labels(tmp_path_factory) -> str:
    """A training file with the toy task's labels and a new one, the second in order."""
    rows = [*toy_rows(14), *({"text": f"court judge law number {i}", "label": "news"} for i in range(14))]
    return str(write_csv(tmp_path_factory.mktemp("more") / "train.csv", rows))


def data(toy_files: dict[str, str]) -> list[str]:
    return [part for split, path in toy_files.items() for part in (f"--{split}_file", path)]


def test_a_run_begins_with_the_weights_of_another(models, toy_files, chat_files, tmp_path):
    """All three scripts; also from the folder of an adapter alone."""
    few = ["--max_train_samples", 30, "--test_fraction", 0.01, "--validation_fraction", 0.01]
    for script, given in ((train, data(toy_files)), (train_chat, chat_files), (train_text, few)):
        first, second = tmp_path / script.__name__ / "first", tmp_path / script.__name__ / "second"
        given = ["--model", models["llama"], *given]
        script(*given, *FEW, "--output_dir", first)
        shutil.copytree(first / "adapter", first.with_name("copied"))
        script(*given, *STILL, "--seed", 7, "--init_adapter", first, "--output_dir", second)
        other = first.with_name("third")
        script(*given, *STILL, "--seed", 7, "--init_adapter", first.with_name("copied"), "--output_dir", other)
        for run in (second, other):
            found = weights(run / "adapter")
            assert all(torch.equal(tensor, found[name]) for name, tensor in weights(first / "adapter").items())


def test_a_head_keeps_the_rows_of_its_labels(models, toy_files, more_labels, tmp_path):
    """By name: the new label comes between the old ones, with the row that the seed draws."""
    given = ["--model", models["llama"], "--approach", "head"]
    train(*given, *data(toy_files), *FEW, "--output_dir", tmp_path / "first")
    more = [*given, "--train_file", more_labels, *STILL, "--seed", 5]
    train(*more, "--init_adapter", tmp_path / "first", "--output_dir", tmp_path / "second")
    train(*more, "--output_dir", tmp_path / "fresh")
    old, new, fresh = (weights(tmp_path / name / "adapter") for name in ("first", "second", "fresh"))
    labels = json.loads((tmp_path / "second/adapter/task.json").read_text())["labels"]
    assert labels == ["music", "news", "science", "sport"]
    assert torch.equal(new[HEAD][[0, 2, 3]], old[HEAD]) and torch.equal(new[HEAD][1], fresh[HEAD][1])
    assert not torch.equal(new[HEAD][0], fresh[HEAD][0])
    assert all(torch.equal(new[name], old[name]) for name in old if name != HEAD)


def test_an_encoder_keeps_its_head_too(encoders, toy_files, more_labels, tmp_path):
    """Its other new layers keep all they have, whatever their shape."""
    given = ["--model", encoders["distilbert"], "--approach", "head"]
    train(*given, *data(toy_files), *FEW, "--output_dir", tmp_path / "first")
    train(*given, "--train_file", more_labels, *STILL, "--init_adapter", tmp_path / "first",
          "--output_dir", tmp_path / "second")  # fmt: skip
    old, new = (weights(tmp_path / name / "adapter") for name in ("first", "second"))
    for name, tensor in old.items():
        if ".classifier." in name:
            assert torch.equal(new[name][[0, 2, 3]], tensor) and len(new[name]) == 4
        else:
            assert torch.equal(new[name], tensor)
    assert any(".pre_classifier." in name for name in old)


def test_generative_labels_are_added_by_the_prompt(models, toy_files, more_labels, tmp_path):
    given = ["--model", models["qwen"]]
    train(*given, *data(toy_files), *FEW, "--output_dir", tmp_path / "first")
    train(*given, "--train_file", more_labels, *FEW, "--init_adapter", tmp_path / "first",
          "--output_dir", tmp_path / "second")  # fmt: skip
    assert "news" in json.loads((tmp_path / "second/adapter/task.json").read_text())["labels"]


@pytest.fixture(scope="module")
def first(models, toy_files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("init") / "first"
    train("--model", models["llama"], *data(toy_files), *FEW, "--output_dir", folder)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora_r", 8], "another lora_r than 8: give --lora_r 4"),
        (["--lora_alpha", 8], "another lora_alpha than 8.0: give --lora_alpha 32"),
        (["--train_layers", 1], "another train_layers than 1: drop --train_layers"),
        (["--use_dora", "true"], "another use_dora than True: give --use_dora false"),
        (["--target_modules", "q_proj"], "the adapter changes other layers: give --target_modules "),
        (["--approach", "head"], "approach is another one there ('generative'): give --approach generative"),
        (["--prompt_template", "TEMPLATE"], "give the --prompt_template that the other run had"),
        (["--model", "OTHER"], "trained on another base"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "",
)
def test_other_shapes_bases_and_templates_are_refused(
    first, models, toy_files, tmp_path, monkeypatch, options, message
):
    """Before a model is loaded."""
    (tmp_path / "template.txt").write_text("Which topic? {text} It is {label}")
    build_model(tmp_path / "other", "llama", intermediate_size=64)
    names = {"TEMPLATE": tmp_path / "template.txt", "OTHER": tmp_path / "other"}
    monkeypatch.setattr(base_model, "load_base", lambda *_, **__: pytest.fail("a model was loaded"))
    given = ["--model", models["llama"], *data(toy_files), "--init_adapter", first]
    with pytest.raises(InputError, match="--init_adapter .*first: ") as error:
        train(*given, *(names.get(option, option) for option in options), "--output_dir", tmp_path / "run")
    assert message in str(error.value) and not (tmp_path / "run").exists()


def test_other_tasks_folders_and_options_are_refused(first, models, toy_files, chat_files, tmp_path):
    chat = ["--model", models["llama"], *chat_files, "--output_dir", tmp_path / "run"]
    with pytest.raises(InputError, match="trained for classification, not for chat"):
        train_chat(*chat, "--init_adapter", first)
    with pytest.raises(InputError, match="--init_adapter .*: no trained weights there"):
        train_chat(*chat, "--init_adapter", tmp_path)
    for wrong in (["--full_finetuning", "true"], ["--init_lora_weights", "gaussian"]):
        with pytest.raises(InputError, match="gives the first weights"):
            train_chat(*chat, "--init_adapter", first, *wrong)


def test_a_resumed_run_began_with_the_same_weights(first, models, toy_files, tmp_path):
    """Another adapter, or another content of the same one, is refused."""
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(first, source)
    given = ["--model", models["llama"], *data(toy_files), "--output_dir", run, "--init_adapter", source]
    train(*given, *FEW, "--save_strategy", "steps", "--save_steps", 1)
    environment = json.loads((run / "environment.json").read_text())
    del environment["finished"]
    (run / "environment.json").write_text(json.dumps(environment))
    changed = weights(source / "adapter")
    changed[min(changed)] += 1
    from safetensors.torch import save_file

    save_file(changed, source / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="weights of --init_adapter was"):
        train(*given, *FEW, "--save_strategy", "steps", "--save_steps", 1, "--resume_from_checkpoint", run)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("train_cls.py", ["--lora_r", "8"], "another lora_r than 8: give --lora_r 4"),
        ("train_cls.py", ["--approach", "head"], "approach is another one there"),
        ("train_clm.py", [], "trained for classification, not for causal_lm"),
        ("train_sft.py", [], "trained for classification, not for chat"),
    ],
)
def test_what_does_not_fit_is_refused_before_torch_is_imported(
    first, models, toy_files, tmp_path, script, options, message
):
    """As any input error: in less than two seconds of a processor."""
    given = ["--model", str(models["llama"]), "--init_adapter", str(first), *options]
    given += ["--lora_alpha", "32", *data(toy_files)] if script == "train_cls.py" else []
    expect_error(run_alone(*given, script=script, cwd=tmp_path), f"--init_adapter {first}: ", message)
