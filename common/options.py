"""Options: each is declared once, here or in a script's Config, and read from the command line and from YAML alike.

Imports neither torch nor transformers, so that `--help` and every error in the options come at once.
"""

import argparse
import difflib
import math
import sys
import types
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from common.errors import InputError, why_unreadable

T = TypeVar("T")
MAX_SEED = 2**32 - 1  # numpy's
CHAT_LENGTH = 512  # tokens of a conversation, unless --max_length says otherwise
RESUME = "`--resume_from_checkpoint latest` with the same options goes on from the last complete checkpoint."


def option(default: Any, help: str, at_least: float = -math.inf, at_most: float = math.inf, flag: bool = False) -> Any:
    """A dataclass field with its help text and, for numbers, its smallest and largest value.

    flag: `--name` alone stands for `--name true`.
    """
    return field(default=default, metadata={"help": help, "at_least": at_least, "at_most": at_most, "flag": flag})


@dataclass
class ModelConfig:
    """model"""

    model: str = option("smollm2-135m", "hub id, local folder, .gguf file, or smollm2-135m (embedded)")
    revision: str | None = option(None, "branch, tag or commit on the hub")
    load_in_4bit: bool | None = option(None, "NF4 base; unset: true for decoders with LoRA, else false")
    load_in_8bit: bool = option(False, "8-bit base (LLM.int8)")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "4-bit data type")
    bnb_4bit_use_double_quant: bool = option(True, "quantise the quantisation constants too")
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] | None = option(
        None, "dtype of 4-bit matrix products; unset: that of --mixed_precision"
    )
    attn_implementation: str | None = option(
        None, "eager, sdpa, flash_attention_2, ...; unset: sdpa, and our shared-prefix packs"
    )
    trust_remote_code: bool = option(False, "run code that comes with a hub model")


@dataclass
class LoraArguments:
    """LoRA"""

    lora_r: int = option(16, "rank", at_least=1)
    lora_alpha: float = option(32.0, "scale: the update is multiplied by alpha / r", at_least=0)
    lora_dropout: float = option(0.0, "dropout on the adapter's input", at_least=0, at_most=1)
    target_modules: list[str] | None = option(None, "names of adapted layers; unset: all linear layers")
    use_rslora: bool = option(False, "scale by alpha / sqrt(r)")
    use_dora: bool = option(False, "weight-decomposed LoRA")
    init_lora_weights: str = option("true", "true, false, gaussian, orthogonal, pissa or olora: PEFT's initialisations")
    full_finetuning: bool = option(False, "train all weights, without an adapter")


@dataclass
class LoopConfig:
    """loop"""

    num_train_epochs: float = option(2.0, "passes over the training rows", at_least=0)
    max_steps: int | None = option(None, "stop after this many updates, whatever the epochs", at_least=1)
    per_device_train_batch_size: int = option(4, "rows in one forward pass", at_least=1)
    per_device_eval_batch_size: int = option(16, "a pass holds the tokens of so many of the longest rows", at_least=1)
    gradient_accumulation_steps: int = option(1, "forward passes per update", at_least=1)
    learning_rate: float = option(1e-3, "peak learning rate", at_least=0)
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", at_least=0)
    warmup_ratio: float = option(0.1, "share of the updates with a rising learning rate", at_least=0, at_most=1)
    lr_scheduler_type: Literal[
        "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ] = option("cosine", "course of the learning rate after the warm-up; constant has no warm-up")
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this", at_least=0)
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = option("adamw_torch", "optimizer")
    gradient_checkpointing: bool = option(False, "less memory for about 1.8 times the time")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "unset: bf16 where the device has it")
    torch_compile: bool = option(False, "compile the model; pays on long runs")
    seed: int = option(42, "of adapter weights, dropout and row order", at_least=0, at_most=MAX_SEED)
    seeds: list[int] | None = option(
        None, "several runs in one call, one a seed, on the same split", at_least=0, at_most=MAX_SEED
    )
    logging_steps: int = option(10, "updates between two lines of metrics.jsonl", at_least=1)
    eval_strategy: Literal["no", "steps", "epoch"] = option("epoch", "when to evaluate on the validation split")
    eval_steps: int | None = option(None, "updates between evaluations with --eval_strategy steps", at_least=1)
    save_strategy: Literal["no", "steps", "epoch"] = option("epoch", "when to write a checkpoint")
    save_steps: int | None = option(None, "updates between checkpoints with --save_strategy steps", at_least=1)
    save_total_limit: int | None = option(None, "keep so many checkpoints; best and last always stay", at_least=1)
    metric_for_best_model: str | None = option(None, "validation metric that chooses the best weights")
    early_stopping_patience: int | None = option(None, "stop after so many evaluations without a gain", at_least=1)
    report_to: list[str] | None = option(None, "tensorboard, wandb, ..., none; unset: tensorboard if installed")
    output_dir: str | None = option(None, "run folder; unset: outputs/<model>/<dataset>/run_<i>")
    run_name: str | None = option(None, "name of the run in trackers")
    num_threads: int | None = option(None, "CPU threads; unset: cores / processes on this machine", at_least=1)
    tf32: bool = option(False, "TF32 products on NVIDIA GPUs for what runs in fp32")
    baselines: bool = option(
        True, "also measure the untrained base; for labels also majority and TF-IDF + logistic regression"
    )
    resume_from_checkpoint: str | None = option(None, "`latest`, a run folder or a checkpoint folder")
    dry_run: bool = option(False, "check and report data and model, then stop")


@dataclass
class DataConfig:
    """data"""

    train_file: str | None = option(None, "CSV, TSV, JSON, JSONL or Parquet; unset: the demo data")
    validation_file: str | None = option(None, "unset: cut from the training rows")
    test_file: str | None = option(None, "unset: cut from the training rows")
    dataset_name: str | None = option(None, "hub data set, or a local folder of one")
    dataset_config: str | None = option(None, "configuration of the hub data set")
    max_train_samples: int | None = option(None, "use so many training rows, drawn by --split_seed", at_least=1)
    max_eval_samples: int | None = option(None, "use so many validation rows; the test split stays whole", at_least=1)
    validation_fraction: float = option(0.1, "share cut for validation where no file is given", at_least=0)
    test_fraction: float = option(0.1, "share cut for test where no file is given", at_least=0)
    split_seed: int = option(42, "of the cut, apart from --seed", at_least=0)


@dataclass
class RowConfig:
    """rows"""

    id_column: str | None = option(None, "column that names the rows; unset: their number, from 0")
    max_length: int = option(256, "tokens of a row, instruction and answer included", at_least=1)


@dataclass
class TextConfig:
    """text"""

    text_fields: list[str] | None = option(None, "columns that make up the text; unset: text, or title and abstract")


@dataclass
class PackConfig:
    """shared-prefix packs"""

    shared_prefix: Literal["auto", "on", "off"] = option(
        "auto", "compute what all rows of a micro-batch begin with once; auto: where it pays, without dropout"
    )


@dataclass
class ClassificationConfig(TextConfig, RowConfig):
    """classification"""

    demo: ClassVar[str] = "arxiv_demo"

    approach: Literal["generative", "head"] = option("generative", "answer with the label, or a classification head")
    problem_type: Literal["single_label_classification", "multi_label_classification"] | None = option(
        None, "unset: seen from the label options and data"
    )
    label_column: str | None = option(None, "column of the label; unset: label")
    label_columns: list[str] | None = option(None, "0/1 columns, one a label (multi-label)")
    label_delimiter: str | None = option(None, "--label_column holds several labels, separated by this")
    labels: list[str] | None = option(None, "the label set in order; unset: from the training rows, sorted")
    class_weights: str = option("none", "none, balanced, or a JSON file {label: weight}")
    few_shot: int = option(0, "so many solved examples before every row", at_least=0)
    prompt_template: str | None = option(None, "file with {text}, and {labels} and {label} for --approach generative")


@dataclass
class CausalConfig(TextConfig):
    """causal language modelling"""

    demo: ClassVar[str] = "pydoc_topics"
    settled: ClassVar[tuple[str, ...]] = ("block_size", "document_masking")  # kept in task.json
    block_size: int = option(128, "tokens of a block", at_least=2)
    stride: int | None = option(None, "evaluate in overlapping windows, so many tokens apart", at_least=1)
    document_masking: bool = option(False, "no token sees another document of its block")
    sample_prompt: str = option("In a shocking discovery,", "continued after training, to be looked at")


@dataclass
class InstructionConfig(RowConfig):
    """instructions"""

    demo: ClassVar[str] = "instructions_demo"
    settled: ClassVar[tuple[str, ...]] = ("system_prompt", "max_length", "loss_on")

    system_prompt: str | None = option(None, "system turn of the conversations that have none")
    chat_template: str | None = option(
        None, "chatml, alpaca, plain, or a Jinja file; unset: the tokenizer's own chat template"
    )
    loss_on: Literal["assistant", "all"] = option("assistant", "train on the answers, or on every token")
    columns: list[str] | None = option(
        None, "odd column names, as instruction=question response=answer; unset: the usual names"
    )


@dataclass
class Sampling:
    """answers"""

    temperature: float | None = option(
        None, "flatter (above 1) or sharper (below) draws; 0 draws nothing. Unset, as the next ones: the model's own",
        at_least=0,
    )  # fmt: skip
    top_p: float | None = option(None, "draw from the likeliest tokens of so much probability", at_least=0, at_most=1)
    top_k: int | None = option(None, "draw from so many of the likeliest tokens; 0: from all", at_least=0)
    repetition_penalty: float | None = option(None, "above 1: tokens that occurred become less likely", at_least=0.01)
    max_new_tokens: int | None = option(
        None, "tokens of an answer; unset: the model's own setting, else 256", at_least=1
    )
    do_sample: bool | None = option(None, "draw, or take the likeliest token (false); unset: draw if an option asks so")
    seed: int = option(42, "of what is drawn", at_least=0, at_most=MAX_SEED)


def parse_config(cls: type[T], argv: Sequence[str] | None = None) -> T:
    """Builds `cls` from `--config file.yaml`, then from the command line, which wins.

    Raises InputError for an unknown option, a value of the wrong type, or a file that is not YAML.
    """
    return from_texts(cls, parse_given(cls, argv))


def parse_given(cls: type, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The options that were given, as texts: from `--config file.yaml`, then from the command line, which wins."""
    name = Path(sys.argv[0]).name
    positional = getattr(cls, "positional", None)  # (name, help) of the one word that is no option
    usage = f"{name} [options]" if positional is None else f"{name} [{positional[0]}] [options]"
    parser = _Parser(prog=name, usage=usage, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if positional:
        parser.add_argument(positional[0], nargs="?", help=positional[1])
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; the command line wins")
    hints, items = get_type_hints(cls), {item.name: item for item in fields(cls)}
    seen: set[str] = set()
    for base in (*cls.__mro__[1:-1], cls):
        group = parser.add_argument_group((base.__doc__ or base.__name__).split("\n")[0])
        for item in (items[inherited.name] for inherited in fields(base)):
            if item.name not in seen:
                seen.add(item.name)
                default = "" if item.default in (None, MISSING) else f" [{_as_text(item.default)}]"
                group.add_argument(
                    f"--{item.name}",
                    nargs="+" if _is_list(hints[item.name]) else "?" if item.metadata["flag"] else None,
                    const="true" if item.metadata["flag"] else None,
                    metavar=_choices(hints[item.name]),
                    help=(item.metadata["help"] + default).replace("%", "%%"),
                )
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(_unknown(unknown[0], seen))
    values = vars(given)
    if path := values.pop("config", None):
        values = {**read_yaml(path, seen), **values}
    return values


def read_yaml(path: str | Path, known: set[str] | None = None) -> dict[str, Any]:
    """The options in a YAML file, every scalar as its text, so that the command line's converters apply to both."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except OSError as error:
        raise InputError(f"--config {path}: {why_unreadable(error)}.") from None
    except UnicodeDecodeError:
        raise InputError(f"--config {path}: the file is not UTF-8.") from None
    except yaml.YAMLError as error:
        mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"--config {path}{where}: not valid YAML: {reason}.") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected lines of the form `option: value`.")
    for name in content:
        if known is not None and name not in known:
            raise InputError(f"--config {path}: {_unknown(name, known)}")
    return content


def from_texts(cls: type[T], values: dict[str, Any]) -> T:
    """`cls` from option texts (a str, or a list of them); names that are no field of `cls` are left out."""
    hints = get_type_hints(cls)
    converted = {}
    for item in fields(cls):
        if item.name in values:
            converted[item.name] = _convert(item.name, hints[item.name], values[item.name])
            _check_bounds(item.name, converted[item.name], item.metadata["at_least"], item.metadata["at_most"])
    return cls(**converted)


def dump_config(config: Any) -> str:
    """The options as YAML that `--config` reads back; unset ones are left out."""
    return yaml.safe_dump({k: v for k, v in asdict(config).items() if v is not None}, sort_keys=False)


def check_loop(config: Any) -> None:
    """Refuses loop, model and LoRA options that contradict each other or that nothing would honour."""
    quantised = config.load_in_4bit or config.load_in_8bit
    _refuse(
        (config.load_in_4bit and config.load_in_8bit, "--load_in_4bit and --load_in_8bit exclude each other"),
        (config.full_finetuning and quantised, "--full_finetuning cannot train quantised weights: drop --load_in_*bit"),
        (
            (config.eval_strategy == "steps") != (config.eval_steps is not None),
            "--eval_steps and --eval_strategy steps need each other",
        ),
        (
            (config.save_strategy == "steps") != (config.save_steps is not None),
            "--save_steps and --save_strategy steps need each other",
        ),
        (
            config.early_stopping_patience and config.eval_strategy == "no",
            "--early_stopping_patience needs evaluations: set --eval_strategy",
        ),
        (
            config.seeds and config.resume_from_checkpoint,
            "--resume_from_checkpoint goes on with one run: give its --seed instead of --seeds",
        ),
        (config.seeds and len(set(config.seeds)) < len(config.seeds), "--seeds names a seed twice: one run a seed"),
        (
            not (config.max_steps or config.num_train_epochs),
            "--num_train_epochs 0 trains nothing: use `evaluate.py` for an untrained model",
        ),
    )


def check_classification(config: Any) -> None:
    """Refuses classification and data options that contradict each other or that nothing would honour."""
    labelled_by = {config.label_column or "label", *(config.label_columns or ())}
    _refuse(
        (config.few_shot and config.approach == "head", "--few_shot needs --approach generative: a head has no prompt"),
        (
            labelled_by & set(config.text_fields or ()),
            "--text_fields names a label column too: the model would read the answer",
        ),
        (
            config.label_columns and (config.label_column or config.label_delimiter or config.labels),
            "--label_columns stands alone, its names are the labels: drop --label_column, --label_delimiter, --labels",
        ),
        *_data_rules(config),
    )


def check_instructions(config: Any) -> None:
    """Refuses instruction and data options that contradict each other or that nothing would honour."""
    _refuse(
        (config.system_prompt and not config.system_prompt.strip(), "--system_prompt is blank: leave it out"),
        *_data_rules(config),
    )


def check_causal(config: Any) -> None:
    """Refuses options of causal language modelling that contradict each other or that nothing would honour."""
    _refuse(
        ((config.stride or 0) > config.block_size, "--stride above --block_size would leave text out"),
        (
            config.stride and config.document_masking,
            "--stride gives tokens more of their document to see, --document_masking less of others: choose one",
        ),
        *_data_rules(config),
    )


def check_sampling(config: Any) -> None:
    """Refuses settings of answers that contradict each other or that nothing would honour."""
    drawn = [name for name in ("temperature", "top_p", "top_k") if getattr(config, name) is not None]
    _refuse(
        (
            config.do_sample is False and (drawn and drawn != ["temperature"] or config.temperature),
            f"--do_sample false draws nothing, so it does not go with --{' --'.join(drawn)}: drop one",
        ),
        (
            config.do_sample and config.temperature == 0,
            "--do_sample true needs a --temperature above 0: at 0 the likeliest token is always taken",
        ),
    )


def check_answers(config: Any) -> None:
    """Refuses options of inference.py that contradict each other or that nothing would honour."""
    ways = [name for name in ("prompt", "input_file", "demo") if getattr(config, name)]
    _refuse(
        (len(ways) > 1, f"--{' and --'.join(ways)} exclude each other (an instruction is --prompt)"),
        (
            (config.input_file is None) != (config.output_file is None),
            "--input_file and --output_file need each other",
        ),
        (config.compare and ways != ["prompt"], "--compare needs a --prompt, and goes with nothing else"),
        (config.persona and config.system_prompt, "--persona and --system_prompt exclude each other"),
        (
            config.system_prompt is not None and not config.system_prompt.strip(),
            "--system_prompt is blank: leave it out",
        ),
        (
            (config.id_column or config.columns) and not config.input_file,
            "--id_column and --columns are about the rows of an --input_file",
        ),
    )


def _data_rules(config: Any) -> tuple[tuple[Any, str], ...]:
    return (
        (
            config.dataset_name and (config.train_file or config.validation_file or config.test_file),
            "--dataset_name and --train_file / --validation_file / --test_file exclude each other",
        ),
        (
            config.dataset_config and not config.dataset_name,
            "--dataset_config needs the --dataset_name that it belongs to",
        ),
        (
            config.validation_fraction + config.test_fraction >= 1,
            "--validation_fraction and --test_fraction leave no training rows: their sum must be below 1",
        ),
    )


def _refuse(*rules: tuple[Any, str]) -> None:
    for broken, reason in rules:
        if broken:
            raise InputError(f"{reason}.")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message}. `--help` lists the options.")


def _check_bounds(name: str, value: Any, low: float, high: float) -> None:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, str | bool):
            continue
        if not math.isfinite(number):
            raise InputError(f"--{name} {number}: must be a finite number.")
        if number < low:
            raise InputError(f"--{name} {number}: must be at least {low}.")
        if number > high:
            raise InputError(f"--{name} {number}: must be at most {high}.")


def _unwrap(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(arg for arg in get_args(hint) if arg is not type(None))
    return hint


def _is_list(hint: Any) -> bool:
    return get_origin(_unwrap(hint)) is list


def _choices(hint: Any) -> str:
    hint = _unwrap(hint)
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    if get_origin(hint) is list:
        return _choices(get_args(hint)[0])
    return "true|false" if hint is bool else hint.__name__


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unknown(name: str, known: set[str]) -> str:
    word = name.lstrip("-").split("=")[0].replace("-", "_")
    near = difflib.get_close_matches(word, sorted(known), n=1)
    if not near and word:  # `epochs` and `lr` are no near misses of num_train_epochs and learning_rate
        near = [x for x in sorted(known) if word in x or word == "".join(part[0] for part in x.split("_"))]
    hint = f"Did you mean --{' or --'.join(near[:3])}?" if near else "`--help` lists the options."
    return f"{name}: there is no such option. {hint}"


def _convert(name: str, hint: Any, value: Any) -> Any:
    hint = _unwrap(hint)
    if get_origin(hint) is list:
        items = value if isinstance(value, list) else [value]
        if not items:
            raise InputError(f"--{name}: an empty list. Name at least one, or leave the option out.")
        return [_convert(name, get_args(hint)[0], item) for item in items]
    kinds = {int: "a whole number", float: "a number", str: "a text"}
    expected = kinds.get(hint) or _choices(hint).replace("|", " or ")
    problem = InputError(f"--{name} {value or repr(value)}: expected {expected}.")
    if not isinstance(value, str):
        raise problem
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise problem
        return value
    if hint is bool:
        if value.lower() not in ("true", "false"):
            raise problem
        return value.lower() == "true"
    try:
        return hint(value)
    except ValueError:
        raise problem from None
