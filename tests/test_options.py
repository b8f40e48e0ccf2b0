"""Options: one set of converters for YAML and command line, exact names, bounds, and rules between options."""

import dataclasses
import errno

import pytest
import yaml

from common.errors import InputError, Terminated, cli_errors
from common.options import (
    TrainingConfig,
    check,
    check_task,
    convert,
    dump_config,
    names,
    option,
    parse_config,
    parse_given,
    read_saved,
)
from train_cls import Config

ODD_LABELS = ["01", "1", "1.0", "1e3", "off", "no", "yes", "null", "~", "true", "-1", "a: b", "# c", "x, y", "[z]"]
ODD_LABELS += [
    "{k}",
    "'q'",
    '"d"',
    "a\nb",
    "a  b" * 40,
    "\u2028",
    "é😀",
    "&a",
    "*a",
    "!t",
    "|",
    "2024-01-01",
    "0x1F",
    "=",
]


def from_yaml(tmp_path, text: str, *argv: str) -> Config:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return parse_config(Config, ["--config", str(file), *argv])


def refused(*argv: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_config(Config, argv)
    return str(caught.value)


def test_no_option_gives_the_documented_defaults():
    assert parse_config(Config, []) == Config()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "2e-4", 2e-4),
        ("learning_rate", "1", 1.0),
        ("lora_r", "8", 8),
        ("load_in_4bit", "False", False),
        ("gradient_checkpointing", "true", True),
        ("label_column", "off", "off"),
        ("label_column", "no", "no"),
        ("run_name", "yes", "yes"),
        ("run_name", "2024-01-01", "2024-01-01"),
        ("label_delimiter", "|", "|"),
        ("revision", "1e3", "1e3"),
        ("mixed_precision", "no", "no"),
        ("eval_strategy", "no", "no"),
    ],
)
def test_yaml_and_command_line_convert_alike(tmp_path, name, text, value):
    """YAML 1.1 reads `2e-4` as a text and `no` as false; ours reads both by the option's type, as the shell does."""
    shell = getattr(parse_config(Config, [f"--{name}", text]), name)
    quoted = f"'{text}'" if text == "|" else text
    file = getattr(from_yaml(tmp_path, f"{name}: {quoted}"), name)
    assert shell == file == value
    assert type(shell) is type(file) is type(value)


def test_labels_are_always_texts(tmp_path):
    """`01`, `1.0` and `off` name labels, not numbers or truth values."""
    names = ["01", "1.0", "1", "off", "-1"]
    assert parse_config(Config, ["--labels", *names]).labels == names
    assert from_yaml(tmp_path, "labels: [01, 1.0, 1, off, -1]").labels == names
    assert from_yaml(tmp_path, "labels:\n- 01\n- 1.0\n- 1\n- off\n- -1\n").labels == names


def test_a_list_of_one_needs_no_brackets(tmp_path):
    assert from_yaml(tmp_path, "text_fields: body").text_fields == ["body"]
    assert parse_config(Config, ["--seeds", "3"]).seeds == [3]


def test_command_line_wins_over_yaml(tmp_path):
    config = from_yaml(tmp_path, "lora_r: 4\nseed: 7\nlabels: [a, b]", "--lora_r", "2", "--labels", "c", "d")
    assert (config.lora_r, config.seed, config.labels) == (2, 7, ["c", "d"])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("lora-r", "lora_r"),
        ("no_baselines", "baselines"),
        ("lr", "learning_rate or --lora_r or --lr_scheduler_type"),
        ("epochs", "num_train_epochs"),
        ("batch_size", "per_device_eval_batch_size or --per_device_train_batch_size"),
    ],
)
def test_unknown_option_names_the_nearest(tmp_path, given, meant):
    assert refused(f"--{given}", "1").endswith(f"Did you mean --{meant}?")
    assert refused(f"--{given}=1").endswith(f"Did you mean --{meant}?")
    with pytest.raises(InputError, match=rf"run.yaml: {given}: there is no .* Did you mean --{meant}\?$"):
        from_yaml(tmp_path, f"{given}: 1")


def test_unknown_option_far_from_all_points_to_help():
    assert refused("--zzz", "1") == "--zzz: there is no such option. `--help` lists the options."
    assert "--help" in refused("stray")


@pytest.mark.parametrize("short", ["--learning", "--train", "--lora_drop", "--conf"])
def test_abbreviations_are_refused(short):
    """An abbreviation that works today names another option once a new one is added."""
    assert "there is no such option" in refused(short, "1")


def test_dumped_options_read_back_equal(tmp_path):
    """config.yaml of a run, given to --config, is the same run: odd label texts and numbers included."""
    before = Config(
        labels=ODD_LABELS,
        label_delimiter="\t",
        learning_rate=2e-5,
        weight_decay=1e-30,
        seeds=[1, 2],
        load_in_4bit=False,
    )
    after = from_yaml(tmp_path, dump_config(before))
    assert after == before
    assert dump_config(after) == dump_config(before)


def test_default_options_read_back_to_the_last_type(tmp_path):
    """Resuming compares a hash of the options, in which 32 and 32.0 differ."""
    assert repr(from_yaml(tmp_path, dump_config(Config()))) == repr(Config())
    argv = [part for name in ("lora_alpha", "num_train_epochs") for part in (f"--{name}", f"{getattr(Config, name):g}")]
    assert repr(parse_config(Config, argv)) == repr(Config())


@pytest.mark.parametrize("text", ["yes", "1", "on", "truee"])
def test_booleans_are_true_or_false_only(tmp_path, text):
    assert "expected true or false" in refused("--use_dora", text)
    with pytest.raises(InputError, match="--use_dora .*expected true or false"):
        from_yaml(tmp_path, f"use_dora: {text}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed", "x"], "--seed x: expected a whole number."),
        (["--seed", "1.5"], "--seed 1.5: expected a whole number."),
        (["--learning_rate", "fast"], "--learning_rate fast: expected a number."),
        (["--approach", "both"], "--approach both: expected generative or head."),
        (["--lr_scheduler_type", "cosin"], "--lr_scheduler_type cosin: expected cosine or"),
        (["--use_dora"], "--use_dora: expected one argument"),
        (["--labels"], "--labels: expected at least one argument"),
        (["--learning_rate", "nan"], "--learning_rate nan: must be a finite number."),
        (["--learning_rate", "inf"], "--learning_rate inf: must be a finite number."),
        (["--learning_rate", "-1"], "--learning_rate -1.0: must be at least 0."),
        (["--lora_r", "0"], "--lora_r 0: must be at least 1."),
        (["--max_steps", "0"], "--max_steps 0: must be at least 1."),
        (["--lora_dropout", "1.5"], "--lora_dropout 1.5: must be at most 1."),
        (["--warmup_ratio", "10"], "--warmup_ratio 10.0: must be at most 1."),
        (["--seed", "-1"], "--seed -1: must be at least 0."),
        (["--seeds", "1", "4294967296"], "--seeds 4294967296: must be at most 4294967295."),
    ],
)
def test_values_out_of_type_or_bounds_are_refused(argv, message):
    assert message in refused(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_r: [1, 2]", "--lora_r"),
        ("labels: [a, [b]]", "--labels"),
        ("labels: {a: b}", "--labels"),
        ("labels: []", "--labels: an empty list"),
        ("- lora_r", "expected lines of the form"),
        ("lora_r: 1\n  seed: 2", "line 2: not valid YAML"),
        ("lora_r: 'x", "not valid YAML"),
        ("system_prompt: {{name}}", "not valid YAML"),
        ("lora_r: 8\nseed: 1\nlora_r: 4", "line 3: not valid YAML: lora_r is given twice"),
        ("config: other.yaml", "there is no such option"),
    ],
)
def test_yaml_of_the_wrong_shape_is_refused(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        from_yaml(tmp_path, text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_second_file_of_options_is_refused():
    """Nothing of the first one would count."""
    assert refused("--config", "a.yaml", "--config", "b.yaml") == (
        "--config is given twice: write the options into one file."
    )


@pytest.mark.parametrize("name", ["train_file", "label_delimiter", "max_steps", "use_dora", "approach"])
def test_an_empty_value_is_refused(tmp_path, name):
    """`--train_file "$UNSET"` must not train on the demo data."""
    message = f"--{name}: the value is empty. Give one, or leave the option out."
    assert refused(f"--{name}", "") == refused(f"--{name}=") == message
    for text in (f"{name}:", f"{name}: ''", f"{name}: # none"):
        with pytest.raises(InputError, match=message):
            from_yaml(tmp_path, text)


def test_an_empty_item_or_config_is_refused(tmp_path):
    assert refused("--labels", "a", "", "b").startswith("--labels: the value is empty.")
    assert refused("--config", "").startswith("--config: the value is empty.")
    for text in ("labels: [a, '']", "labels:\n- a\n-\n", "seeds:", "seeds: [1, ]\ntext_fields: ['']"):
        with pytest.raises(InputError, match="the value is empty"):
            from_yaml(tmp_path, text)


def test_config_file_that_cannot_be_read_is_named(tmp_path):
    assert "none.yaml: there is no such file" in refused("--config", str(tmp_path / "none.yaml"))
    assert "this is a folder" in refused("--config", str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"run_name: caf\xe9\n")
    assert "latin.yaml: the file is not UTF-8" in refused("--config", str(tmp_path / "latin.yaml"))


def test_an_empty_config_file_changes_nothing(tmp_path):
    assert from_yaml(tmp_path, "# nothing yet\n") == Config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"full_finetuning": True, "load_in_4bit": True}, "--full_finetuning"),
        ({"full_finetuning": True, "load_in_8bit": True}, "--full_finetuning"),
        ({"eval_steps": 5}, "--eval_steps"),
        ({"eval_strategy": "steps"}, "--eval_steps"),
        ({"save_steps": 5}, "--save_steps"),
        ({"save_strategy": "steps"}, "--save_steps"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "--early_stopping_patience"),
        ({"seeds": [1, 2], "resume_from_checkpoint": "latest"}, "--resume_from_checkpoint"),
        ({"seeds": [1, 1]}, "--seeds names a seed twice"),
        ({"num_train_epochs": 0.0}, "--num_train_epochs 0"),
    ],
)
def test_contradictory_loop_options_are_refused(changes, message):
    check(Config())
    with pytest.raises(InputError, match=message):
        check(Config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"few_shot": 2, "approach": "head"}, "--few_shot"),
        ({"dataset_name": "x", "train_file": "y"}, "exclude each other"),
        ({"dataset_name": "x", "test_file": "y"}, "exclude each other"),
        ({"dataset_config": "x"}, "--dataset_config"),
        ({"label_columns": ["a"], "label_column": "b"}, "--label_columns"),
        ({"label_columns": ["a"], "label_delimiter": ","}, "--label_columns"),
        ({"label_columns": ["a"], "labels": ["a"]}, "--label_columns"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "sum must be below 1"),
    ],
)
def test_contradictory_classification_options_are_refused(changes, message):
    check(Config())
    with pytest.raises(InputError, match=message):
        check(Config(**changes))


def test_options_that_fit_together_pass():
    check(Config(eval_strategy="steps", eval_steps=5, save_strategy="steps", save_steps=5, seeds=[1, 2]))
    check(Config(max_steps=3, num_train_epochs=0.0, full_finetuning=True, load_in_4bit=False))
    check(Config(label_columns=["a", "b"], text_fields=["title"]))


def test_every_option_has_a_help_text(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(Config, ["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{item.name} " in shown and item.metadata["help"] for item in dataclasses.fields(Config))


def test_only_given_options_are_passed_on(tmp_path):
    """evaluate.py lays the command line over a run's own options, so unset ones must stay unset."""
    (tmp_path / "run.yaml").write_text("seed: 007\n")
    assert parse_given(Config, ["--config", str(tmp_path / "run.yaml"), "--lora_r", "2"]) == {
        "seed": 7,
        "lora_r": 2,
    }
    assert parse_given(Config, []) == {}


def test_null_in_yaml_is_an_option_left_out(tmp_path):
    """A label may be called so, and a text in quotes is one."""
    lines = ["system_prompt: null", "run_name: ~", "seed: null", "labels: [no, null]"]
    (tmp_path / "run.yaml").write_text("\n".join(lines) + "\n")
    assert parse_given(TrainingConfig, ["--config", str(tmp_path / "run.yaml")]) == {"labels": ["no", "null"]}
    (tmp_path / "run.yaml").write_text('run_name: "null"\n')
    assert parse_given(TrainingConfig, ["--config", str(tmp_path / "run.yaml")]) == {"run_name": "null"}


def test_a_mark_at_the_start_of_a_file_is_no_text(tmp_path):
    """Some editors put a byte order mark before UTF-8."""
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbfseed: 7\ntrust_remote_code: False\n")
    given = parse_given(Config, ["--config", str(tmp_path / "run.yaml")])
    assert given == {"seed": 7, "trust_remote_code": False}


def test_an_own_option_works_from_both_sides(tmp_path):
    """Adapting a script: one declared field is an option of the command line and of YAML."""

    @dataclasses.dataclass
    class Mine(Config):
        """mine"""

        margin: float = option(0.5, "a margin", at_least=0)

    assert parse_config(Mine, ["--margin", "2"]).margin == 2.0
    assert convert(Mine, yaml.load(dump_config(Mine(margin=0.25)), yaml.BaseLoader))["margin"] == 0.25


def test_a_saved_config_comes_back_in_its_types(tmp_path):
    """Whoever reads a run folder gets numbers, booleans and lists, not texts; a copied adapter has no config.yaml."""
    config = Config(load_in_4bit=False, lora_alpha=8.0, label_columns=["a", "b"], learning_rate=2e-4)
    (tmp_path / "config.yaml").write_text(f"# given: x\n{dump_config(config)}")
    expected = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    assert expected.pop("trust_remote_code") is False  # no file decides about it
    assert read_saved(tmp_path) == expected
    assert read_saved(tmp_path / "missing") == {}


def test_everything_about_an_option_is_said_where_it_is_declared():
    """What binds a resume, what task.json keeps and what training settles are facts of the options themselves."""

    @dataclasses.dataclass
    class Mine(Config):
        """mine"""

        margin: float = option(0.5, "a margin", binds=False, kept=True, settled=True)
        kind: str = option("soft", "its kind", choices=["soft", "hard"], tasks=["classification"])

    assert "margin" in names(Mine, "settled") and "margin" in names(Mine, "kept")
    assert "margin" not in names(Mine, "binds") and "kind" in names(Mine, "binds")
    assert {"seed", "learning_rate"} <= set(names(Config, "binds"))
    assert not {"output_dir", "num_threads", "logging_steps"} & set(names(Config, "binds"))
    with pytest.raises(InputError, match="--kind firm: expected soft or hard"):
        parse_config(Mine, ["--kind", "firm"])
    check_task(Mine, {"kind": "hard", "lora_r": 2}, "classification", "this run")
    with pytest.raises(InputError, match="--kind does not belong to chat"):
        check_task(Mine, {"kind": "hard"}, "chat", "this run")
    with pytest.raises(InputError, match="--approach does not belong to causal_lm"):
        check_task(Mine, {"approach": "head"}, "causal_lm", "this run")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("Do this."), 2, "error: Do this."),
        (Terminated(), 143, "Stopped by SIGTERM. Everything saved so far is kept. Continue with --this."),
        (KeyboardInterrupt(), 130, "Stopped by Ctrl-C. Everything saved so far is kept. Continue with --this."),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 2, "no space left on the disk while writing x.bin"),
        (PermissionError(errno.EACCES, "Permission denied", "x.bin"), 2, "x.bin: Permission denied"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x.bin"), 2, "no space left on the disk while writing x.bin"),
        (OSError(errno.EFBIG, "File too large", "x.bin"), 2, "x.bin: File too large"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x.bin"), 2, "x.bin: File name too long"),
    ],
)
def test_expected_errors_end_without_a_traceback(capsys, error, code, message):
    with pytest.raises(SystemExit) as stop, cli_errors("Continue with --this."):
        raise error
    assert stop.value.code == code
    assert message in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="odd"), cli_errors():
        raise ValueError("odd")
    with pytest.raises(OSError, match="odd"), cli_errors():
        raise OSError("odd")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_lost_connection_is_no_lost_process_where_there_is_one(processes, monkeypatch, capsys):
    """A download can end by the words that gloo has for a process that is gone."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr("common.errors.GRACE", 0.0)
    with pytest.raises((RuntimeError, SystemExit)) as ended, cli_errors():
        raise RuntimeError("Connection reset by peer (os error 104)")
    assert ended.type is (RuntimeError if processes == "1" else SystemExit)
    assert ("os error 104" in capsys.readouterr().err) == (processes == "2")
