"""Options: each is declared once, with all that is known about it, and read from the command line and from YAML alike.

Imports neither torch nor transformers, so that `--help` and every error in the options come at once.
"""

import argparse
import difflib
import hashlib
import inspect
import json
import math
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from common.disk import read_yaml
from common.errors import InputError

T = TypeVar("T")
BASE_CHANGING_INITS = ("pissa", "olora")  # of --init_lora_weights: these move a part of the base into the adapter
MAX_SEED = 2**32 - 1  # numpy's
PASSWORD = "PLAINLORA_PASSWORD"  # environment variable: a password on the command line could be seen by others
CHAT_LENGTH = 512  # tokens of a conversation, unless --max_length says otherwise
CLASSIFICATION, CAUSAL_LM, CHAT = "classification", "causal_lm", "chat"  # the tasks, as task.json names them


def option(
    default: Any,
    help: str,
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    choices: Sequence[str] = (),
    flag: bool = False,
    tasks: Sequence[str] = (),
    binds: bool = True,
    kept: bool = False,
    settled: bool = False,
) -> Any:
    """Declares an option: a dataclass field with everything that is known about it.

    at_least, at_most: bounds of a number, or of each number in a list.
    choices: the values of a text that a registry lists; a fixed set is a Literal instead.
    flag: `--name` alone stands for `--name true`.
    tasks: those that it belongs to; none: all.
    binds: it changes the numbers of a run (or the answers in a file), so resuming needs the same value.
    kept: task.json has it, so that a copied adapter is used as it was trained.
    settled: training has decided it; later it may be given again with the same value only.
    """
    facts = {"help": help, "at_least": at_least, "at_most": at_most, "choices": tuple(choices), "flag": flag,
             "tasks": tuple(tasks), "binds": binds, "kept": kept, "settled": settled}  # fmt: skip
    return field(default=default, metadata=facts)


@dataclass
class ModelConfig:
    """model"""

    model: str = option("smollm2-135m", "hub id, local folder, .gguf file, or smollm2-135m (embedded)", settled=True)
    revision: str | None = option(None, "branch, tag or commit on the hub", settled=True)
    load_in_4bit: bool | None = option(
        None, "NF4 base; unset: as trained, else true for decoders without --full_finetuning", settled=True
    )
    load_in_8bit: bool = option(False, "8-bit base (LLM.int8)", settled=True)
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "4-bit data type", settled=True)
    bnb_4bit_use_double_quant: bool = option(True, "quantize the quantization constants too", settled=True)
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] | None = option(
        None, "dtype of 4-bit matrix products; unset: that of --mixed_precision", settled=True
    )
    attn_implementation: str | None = option(
        None, "eager, sdpa, flash_attention_2, ...; unset: sdpa, and our shared-prefix packs", settled=True
    )
    trust_remote_code: bool = option(False, "run code that comes with a hub model; on the command line alone")

    def broken_rules(self) -> Iterator[str]:
        if self.load_in_4bit and self.load_in_8bit:
            yield "--load_in_4bit and --load_in_8bit exclude each other"


@dataclass
class LoraArguments:
    """LoRA"""

    lora_r: int = option(16, "rank", at_least=1)
    lora_alpha: float = option(32.0, "scale: the update is multiplied by alpha / r", at_least=0)
    lora_dropout: float = option(0.0, "dropout on the adapter's input", at_least=0, at_most=1)
    target_modules: list[str] | None = option(None, "names of adapted layers; unset: all linear layers")
    train_layers: int | None = option(None, "only so many of the upper layers are adapted; unset: all", at_least=1)
    use_rslora: bool = option(False, "scale by alpha / sqrt(r)")
    use_dora: bool = option(False, "weight-decomposed LoRA")
    init_lora_weights: str = option("true", "true, false, gaussian, orthogonal, pissa or olora: PEFT's initializations")
    init_adapter: str | None = option(None, "run or adapter folder; its trained weights are the first ones of this run")
    full_finetuning: bool = option(False, "train all weights, without an adapter")

    def broken_rules(self: Any) -> Iterator[str]:
        if self.full_finetuning and (self.load_in_4bit or self.load_in_8bit):
            yield "--full_finetuning cannot train quantized weights: drop --load_in_*bit"
        if self.init_adapter and (self.full_finetuning or self.init_lora_weights != "true"):
            yield "--init_adapter gives the first weights: drop --full_finetuning and --init_lora_weights"
        if self.full_finetuning and self.train_layers:
            yield "--train_layers is about adapters: drop --full_finetuning"


@dataclass
class DeviceConfig:
    """processes and devices"""

    num_threads: int | None = option(
        None, "CPU threads; unset: cores / processes on this machine", at_least=1, binds=False
    )
    shard_model: bool = option(
        False, "of several processes, each holds a part of the frozen base instead of all of it", binds=False
    )
    tf32: bool = option(False, "TF32 products on NVIDIA GPUs for what runs in fp32")


@dataclass
class LoopConfig(DeviceConfig):
    """loop"""

    num_train_epochs: float = option(2.0, "passes over the training rows", at_least=0)
    max_steps: int | None = option(None, "stop after this many updates, whatever the epochs", at_least=1)
    per_device_train_batch_size: int = option(4, "rows in one forward pass", at_least=1, binds=False)
    per_device_eval_batch_size: int = option(
        16, "a pass holds the tokens of this many of the longest rows", at_least=1, binds=False
    )
    gradient_accumulation_steps: int = option(1, "forward passes per update", at_least=1, binds=False)
    learning_rate: float = option(1e-3, "peak learning rate", at_least=0)
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", at_least=0)
    warmup_ratio: float = option(0.1, "share of the updates with a rising learning rate", at_least=0, at_most=1)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        option("cosine", "learning-rate schedule after the warm-up; constant has no warm-up")
    )
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this", at_least=0)
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = option("adamw_torch", "optimizer")
    gradient_checkpointing: bool = option(False, "less memory: a layer is computed again in the backward pass")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "unset: bf16 where the device has it")
    torch_compile: bool = option(False, "compile the model; pays off on long runs")
    seed: int = option(42, "of adapter weights, dropout and row order", at_least=0, at_most=MAX_SEED)
    seeds: list[int] | None = option(
        None, "several runs in one call, one per seed, on the same split", at_least=0, at_most=MAX_SEED, binds=False
    )
    logging_steps: int = option(10, "updates between two lines of metrics.jsonl", at_least=1, binds=False)
    eval_strategy: Literal["no", "steps", "epoch"] = option("epoch", "when to evaluate on the validation split")
    eval_steps: int | None = option(None, "updates between evaluations with --eval_strategy steps", at_least=1)
    save_strategy: Literal["no", "steps", "epoch"] = option("epoch", "when to write a checkpoint", binds=False)
    save_steps: int | None = option(
        None, "updates between checkpoints with --save_strategy steps", at_least=1, binds=False
    )
    save_total_limit: int | None = option(
        None, "keep this many checkpoints; best and last always stay", at_least=1, binds=False
    )
    metric_for_best_model: str | None = option(None, "validation metric that chooses the best weights")
    early_stopping_patience: int | None = option(
        None, "stop after this many evaluations without improvement", at_least=1
    )
    report_to: list[str] | None = option(
        None, "tensorboard, wandb, ..., none; unset: tensorboard if installed", binds=False
    )
    output_dir: str | None = option(None, "run folder; unset: outputs/<model>/<dataset>/run_<i>", binds=False)
    run_name: str | None = option(None, "name of the run in trackers", binds=False)
    baselines: bool = option(
        True,
        "also measure the untrained base; for labels also majority and TF-IDF + logistic regression",
        binds=False,
    )
    max_baseline_samples: int = option(
        500, "measure the untrained base on this many test rows, drawn by --split_seed", at_least=1, binds=False
    )
    resume_from_checkpoint: str | None = option(None, "`latest`, a run folder or a checkpoint folder", binds=False)
    dry_run: bool = option(
        False, "report on data and model, make a few updates, say what memory, time and disk it takes, and stop",
        binds=False,
    )  # fmt: skip

    def broken_rules(self) -> Iterator[str]:
        if (self.eval_strategy == "steps") != (self.eval_steps is not None):
            yield "--eval_steps and --eval_strategy steps need each other"
        if (self.save_strategy == "steps") != (self.save_steps is not None):
            yield "--save_steps and --save_strategy steps need each other"
        if self.early_stopping_patience and self.eval_strategy == "no":
            yield "--early_stopping_patience needs evaluations: set --eval_strategy"
        if self.shard_model and self.torch_compile:
            yield "--shard_model and --torch_compile exclude each other: drop one"
        if self.dry_run and self.resume_from_checkpoint:
            yield "--dry_run true is about a new run: drop --resume_from_checkpoint"
        if self.seeds and self.resume_from_checkpoint:
            yield "--resume_from_checkpoint resumes one run: give its --seed instead of --seeds"
        folds = getattr(self, "folds", None) and not getattr(self, "fold", None)
        if folds and self.resume_from_checkpoint:
            yield "--resume_from_checkpoint resumes one run: give its --fold as well as --folds"
        if folds and self.seeds:
            yield "--seeds and --folds exclude each other: each makes several runs"
        if self.seeds and len(set(self.seeds)) < len(self.seeds):
            yield "--seeds names a seed twice: one run per seed"
        if self.run_name and ("/" in self.run_name or "\\" in self.run_name or self.run_name in (".", "..")):
            yield f"--run_name {self.run_name}: trackers make a folder of this name, so it cannot be a path"
        if not (self.max_steps or self.num_train_epochs):
            yield "--num_train_epochs 0 trains nothing: use `evaluate.py` for an untrained model"


@dataclass
class DataConfig:
    """data"""

    train_file: str | None = option(None, "CSV, TSV, JSON, JSONL, Parquet; running text also .txt; unset: the demo")
    validation_file: str | None = option(None, "unset: cut from the training rows")
    test_file: str | None = option(None, "unset: cut from the training rows")
    dataset_name: str | None = option(None, "hub data set, or a local folder of one")
    dataset_config: str | None = option(None, "configuration of the hub data set")
    max_train_samples: int | None = option(None, "use this many training rows, drawn by --split_seed", at_least=1)
    max_eval_samples: int | None = option(None, "use this many validation rows; the test split stays whole", at_least=1)
    validation_fraction: float = option(
        0.1, "share cut for validation where no file is given", at_least=0, settled=True
    )
    test_fraction: float = option(0.1, "share cut for test where no file is given", at_least=0, settled=True)
    split_seed: int = option(42, "of the cut, independent of --seed", at_least=0, settled=True)

    def broken_rules(self) -> Iterator[str]:
        if self.dataset_name and (self.train_file or self.validation_file or self.test_file):
            yield "--dataset_name and --train_file / --validation_file / --test_file exclude each other"
        if self.dataset_config and not self.dataset_name:
            yield "--dataset_config needs the --dataset_name that it belongs to"
        if self.validation_fraction + self.test_fraction >= 1:
            yield "--validation_fraction and --test_fraction leave no training rows: their sum must be below 1"


@dataclass
class RowConfig:
    """rows"""

    id_column: str | None = option(None, "column that names the rows; unset: their number, from 0")
    max_length: int = option(
        256, "tokens of a row, instruction and answer included; of a base model's conversations 512",
        at_least=1, kept=True, settled=True,
    )  # fmt: skip


@dataclass
class TextConfig:
    """text"""

    text_fields: list[str] | None = option(None, "columns that make up the text; unset: text, or title and abstract")


@dataclass
class PackConfig:
    """shared-prefix packs"""

    shared_prefix: Literal["auto", "on", "off"] = option(
        "auto", "compute what all rows of a micro-batch begin with once; auto: where it pays off, without dropout"
    )


@dataclass
class ClassificationConfig(TextConfig, RowConfig):
    """classification"""

    belongs_to: ClassVar[tuple[str, ...]] = (CLASSIFICATION,)
    demo: ClassVar[str] = "arxiv_demo"

    approach: Literal["generative", "head"] = option(
        "generative", "answer with the label, or a classification head", settled=True
    )
    problem_type: Literal["single_label_classification", "multi_label_classification"] | None = option(
        None, "unset: detected from the label options and data"
    )
    label_column: str | None = option(None, "column of the label; unset: label")
    label_columns: list[str] | None = option(None, "0/1 columns, one per label (multi-label)")
    label_delimiter: str | None = option(None, "--label_column holds several labels, separated by this")
    labels: list[str] | None = option(
        None, "the label set in order; unset: from the training rows, sorted", settled=True
    )
    folds: int | None = option(
        None, "cross-validation: so many runs in one call, each tested on another part of the rows",
        at_least=2, settled=True,
    )  # fmt: skip
    fold: int | None = option(None, "the one of the --folds to train: 1, 2, ...", at_least=1, settled=True)
    class_weights: str = option("none", "none, balanced, or a JSON file {label: weight}", settled=True)
    few_shot: int = option(0, "number of solved examples before every row", at_least=0, settled=True)
    prompt_template: str | None = option(
        None, "file with {text}, and {labels} and {label} for --approach generative", settled=True
    )

    def broken_rules(self) -> Iterator[str]:
        if (self.fold or 0) > (self.folds or 0):
            yield "--fold is one of --folds: 1 up to their number"
        if self.few_shot and self.approach == "head":
            yield "--few_shot needs --approach generative: a head has no prompt"
        if self.label_columns and (self.label_column or self.label_delimiter or self.labels):
            yield (
                "--label_columns excludes the other label options, its names are the labels: drop --label_column, "
                "--label_delimiter, --labels"
            )


@dataclass
class CausalConfig(TextConfig):
    """causal language modeling"""

    belongs_to: ClassVar[tuple[str, ...]] = (CAUSAL_LM,)
    demo: ClassVar[str] = "pydoc_topics"

    block_size: int = option(128, "tokens of a block", at_least=2, kept=True)
    stride: int | None = option(None, "evaluate in overlapping windows, this many tokens apart", at_least=1)
    document_masking: bool = option(False, "no token sees another document of its block", kept=True, settled=True)
    sample_prompt: str = option("In a shocking discovery,", "continued after training, to be looked at", binds=False)

    def broken_rules(self) -> Iterator[str]:
        if (self.stride or 0) > self.block_size:
            yield "--stride above --block_size would leave text out"
        if self.stride and self.document_masking:
            yield "--stride gives tokens more of their document to see, --document_masking less of others: choose one"


@dataclass
class InstructionConfig(RowConfig):
    """instructions"""

    belongs_to: ClassVar[tuple[str, ...]] = (CHAT,)
    demo: ClassVar[str] = "instructions_demo"

    system_prompt: str | None = option(None, "system turn of the conversations that have none", kept=True, settled=True)
    chat_template: str | None = option(
        None, "chatml, alpaca, plain, or a Jinja file; unset: the tokenizer's own chat template"
    )
    loss_on: Literal["assistant", "all"] = option(
        "assistant", "train on the answers, or on every token", kept=True, settled=True
    )
    columns: list[str] | None = option(
        None, "unusual column names, as instruction=question response=answer; unset: the usual names"
    )

    def broken_rules(self) -> Iterator[str]:
        if self.system_prompt and not self.system_prompt.strip():
            yield "--system_prompt is blank: leave it out"


@dataclass
class Sampling:
    """answers"""

    belongs_to: ClassVar[tuple[str, ...]] = (CHAT, CAUSAL_LM)

    temperature: float | None = option(
        None, "flatter (above 1) or sharper (below) sampling; 0: greedy. Unset, as the next ones: the model's own",
        at_least=0,
    )  # fmt: skip
    top_p: float | None = option(
        None, "sample from the likeliest tokens that hold this much probability", at_least=0, at_most=1
    )
    top_k: int | None = option(None, "sample from this many of the likeliest tokens; 0: from all", at_least=0)
    repetition_penalty: float | None = option(None, "above 1: tokens that occurred become less likely", at_least=0.01)
    max_new_tokens: int | None = option(
        None, "tokens of an answer; unset: the model's own setting, else 256", at_least=1
    )
    do_sample: bool | None = option(
        None, "sample, or take the likeliest token (false); unset: as the model's settings or another option say"
    )
    seed: int = option(42, "of the sampling", at_least=0, at_most=MAX_SEED)

    def broken_rules(self) -> Iterator[str]:
        sampled = [name for name in ("temperature", "top_p", "top_k") if getattr(self, name) is not None]
        if self.do_sample is False and (sampled and sampled != ["temperature"] or self.temperature):
            yield f"--do_sample false does not sample, so it does not go with --{' --'.join(sampled)}: drop one"
        if self.do_sample and self.temperature == 0:
            yield "--do_sample true needs a --temperature above 0: at 0 the likeliest token is always taken"


@dataclass
class WebConfig:
    """web page"""

    web: bool = option(
        False, "a page in the browser: chat, continue a text, or classify; needs gradio", flag=True, binds=False
    )
    web_address: str = option(
        "127.0.0.1", f"of the page; any other shows it to others, and needs a password in {PASSWORD}", binds=False
    )
    web_port: int = option(7860, "of the page", at_least=1, at_most=65535, binds=False)

    def broken_rules(self) -> Iterator[str]:
        changed = [name for name in ("web_address", "web_port") if getattr(self, name) != getattr(WebConfig, name)]
        if changed and not self.web:
            yield f"--{' and --'.join(changed)} need --web"


@dataclass
class ClassificationDataConfig(DataConfig, ClassificationConfig):
    """which rows are read for classification, and how"""

    def broken_rules(self) -> Iterator[str]:
        if self.folds and (self.test_file or self.dataset_name):
            yield "--folds test every row of --train_file: drop --test_file and --dataset_name"


@dataclass
class DecisionConfig:
    """decisions"""

    belongs_to: ClassVar[tuple[str, ...]] = (CLASSIFICATION,)

    fit_decisions: bool = option(
        False, "fit temperature or thresholds on the validation split, and save them with the run", flag=True
    )
    min_precision: float | None = option(
        None, "fit when to give no answer: so many of the answers given are right", at_least=0.01, at_most=0.999
    )
    confidence: float = option(0.9, "of --min_precision", at_least=0.5, at_most=0.999)
    blend_baseline: bool = option(False, "fit how much TF-IDF's probabilities count; may be nothing")

    def broken_rules(self: Any) -> Iterator[str]:
        if self.fit_decisions and (self.split != "validation" or self.decode == "generate"):
            yield "--fit_decisions is about the validation split and scored labels: drop --split, --test_file, --decode"
        if not self.fit_decisions and (self.min_precision is not None or self.blend_baseline):
            yield "--min_precision and --blend_baseline need --fit_decisions"


@dataclass
class CorpusDataConfig(DataConfig, CausalConfig):
    """which text is read for causal language modeling, and how"""


@dataclass
class ChatDataConfig(DataConfig, InstructionConfig):
    """which conversations are read, and how"""


@dataclass
class RunConfig(ModelConfig, LoraArguments, LoopConfig):
    """what the training scripts have in common"""

    def broken_rules(self) -> Iterator[str]:
        if self.shard_model and (self.full_finetuning or self.load_in_8bit):
            yield "--shard_model is about a frozen base in 4, 16 or 32 bits: drop --full_finetuning and --load_in_8bit"


@dataclass
class TrainingConfig(RunConfig, PackConfig, ClassificationDataConfig, CorpusDataConfig, ChatDataConfig):
    """every option of the training scripts, as `read_saved` finds them in a config.yaml"""

    packing: bool = option(False, "rows of a micro-batch one after another in one sequence, without padding")


def parse_config(cls: type[T], argv: Sequence[str] | None = None) -> T:
    """Builds `cls` from `--config file.yaml`, then from the command line, which wins, and checks its rules.

    Raises InputError for an unknown option, a value of the wrong type, a broken rule, or a file that is not YAML.
    """
    config = cls(**parse_given(cls, argv))
    check(config)
    return config


def parse_given(cls: type, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The options that were given, in their types: from `--config file.yaml`, then from the command line, which wins.

    A word that is no option, where `cls.positional` (name, help) allows one, stands under its name.
    """
    script, positional = Path(sys.argv[0]), getattr(cls, "positional", None)
    name = f"python -m common.{script.stem}" if script.parent.name == "common" else script.name
    usage = f"{name} [options]" if positional is None else f"{name} [{positional[0]}] [options]"
    parser = _Parser(prog=name, usage=usage, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if positional:
        parser.add_argument(positional[0], nargs="?", help=positional[1])
    parser.add_argument("--config", metavar="FILE", action=_Once, help="YAML file of options; the command line wins")
    hints, items = get_type_hints(cls), {item.name: item for item in fields(cls)}
    seen: set[str] = set()
    for base in (base for base in (*cls.__mro__[1:-1], cls) if inspect.get_annotations(base)):  # has options of its own
        group = parser.add_argument_group((base.__doc__ or base.__name__).split("\n")[0])
        for item in (items[name] for name in inspect.get_annotations(base) if name in items and name not in seen):
            seen.add(item.name)
            default = "" if item.default in (None, MISSING) else f" [{_as_text(item.default)}]"
            group.add_argument(
                f"--{item.name}",
                nargs="+" if _is_list(hints[item.name]) else "?" if item.metadata["flag"] else None,
                const="true" if item.metadata["flag"] else None,
                metavar="|".join(item.metadata["choices"]) or _choices(hints[item.name]),
                help=(item.metadata["help"] + default).replace("%", "%%"),
            )
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(_unknown(unknown[0], seen))
    texts = vars(found)
    if "config" in texts:
        path = _convert("config", str, texts.pop("config"))
        saved = _read_yaml(path, seen)
        if str(saved.get("trust_remote_code", "false")).lower() != "false" and "trust_remote_code" not in texts:
            raise InputError(
                f"--config {path}: no file can turn on trust_remote_code, which runs the code of a model's authors: "
                "give it on the command line."
            )
        texts = {**saved, **texts}
    word = {positional[0]: texts[positional[0]]} if positional and positional[0] in texts else {}
    return convert(cls, texts) | word


def convert(cls: type, texts: dict[str, Any]) -> dict[str, Any]:
    """Option texts (a str, or a list of them) in the types of `cls`; names that are no option of it are left out."""
    hints, values = get_type_hints(cls), {}
    for item in fields(cls):
        if item.name in texts:
            values[item.name] = _convert(item.name, hints[item.name], texts[item.name], item.metadata["choices"])
            _check_bounds(item.name, values[item.name], item.metadata["at_least"], item.metadata["at_most"])
    return values


def read_saved(run: Path) -> dict[str, Any]:
    """The options in a run folder's config.yaml, in their types; empty where there is none, as in a copied adapter.

    Without trust_remote_code: a folder from elsewhere does not decide that its code is run.
    """
    path = run / "config.yaml"
    texts = _read_yaml(path) if path.is_file() else {}
    return convert(TrainingConfig, {name: text for name, text in texts.items() if name != "trust_remote_code"})


def dump_config(config: Any) -> str:
    """The options as YAML that `--config` reads back; unset ones are left out."""
    return yaml.safe_dump({k: v for k, v in asdict(config).items() if v is not None}, sort_keys=False)


def check(config: Any) -> None:
    """Refuses options that contradict each other or that nothing would honor: the rules of each group of options."""
    for base in type(config).__mro__:
        tasks = vars(base).get("belongs_to", ())
        if "broken_rules" in vars(base) and (not tasks or getattr(config, "task", tasks[0]) in tasks):
            for rule in vars(base)["broken_rules"](config):
                raise InputError(f"{rule}.")


def check_task(cls: type, given: Iterable[str], task: str, what: Any) -> None:
    """Refuses options that belong to other tasks than `task`, which `what` is used for: nothing would honor them."""
    for item in fields(cls):
        groups = [base for base in cls.__mro__ if item.name in getattr(base, "__dataclass_fields__", ())]
        tasks = item.metadata["tasks"] or {task for base in groups for task in vars(base).get("belongs_to", ())}
        if item.name in given and tasks and task not in tasks:
            raise InputError(f"--{item.name} does not belong to {task}, which {what} is used for: drop it.")


def names(cls: type, fact: str) -> list[str]:
    """The options of `cls` of which `fact` (binds, kept, settled, ...) is true."""
    return [item.name for item in fields(cls) if item.metadata[fact]]


def binding_options(config: Any) -> dict[str, Any]:
    """The options that must be the same for a run to be resumed, or for a file of answers to be continued."""
    return {name: getattr(config, name) for name in names(type(config), "binds")}


def options_hash(config: Any) -> str:
    """SHA-256 of `binding_options`."""
    return hashlib.sha256(json.dumps(binding_options(config), sort_keys=True).encode()).hexdigest()


def _read_yaml(path: str | Path, known: set[str] | None = None) -> dict[str, Any]:
    """The options in a YAML file, every scalar as its text, so that the command line's converters apply to both."""
    content = read_yaml(Path(path), f"--config {path}") or {}
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected lines of the form `option: value`.")
    for name in content:
        if known is not None and name not in known:
            raise InputError(f"--config {path}: {_unknown(name, known)}")
    return content


class _Once(argparse.Action):
    """An option that may be given once."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, name: Any = None) -> None:
        if hasattr(namespace, self.dest):
            raise InputError(f"{name} is given twice: write the options into one file.")
        setattr(namespace, self.dest, value)


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


def _convert(name: str, hint: Any, value: Any, choices: Sequence[str] = ()) -> Any:
    hint = _unwrap(hint)
    if value == "":
        raise InputError(f"--{name}: the value is empty. Give one, or leave the option out.")
    if get_origin(hint) is list:
        items = value if isinstance(value, list) else [value]
        if not items:
            raise InputError(f"--{name}: an empty list. Name at least one, or leave the option out.")
        return [_convert(name, get_args(hint)[0], item, choices) for item in items]
    kinds = {int: "a whole number", float: "a number", str: "a text"}
    expected = " or ".join(choices) or kinds.get(hint) or _choices(hint).replace("|", " or ")
    problem = InputError(f"--{name} {value}: expected {expected}.")
    if not isinstance(value, str):
        raise problem
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"--{name} {value}: the text is not UTF-8. Rename the file, or write the text in UTF-8.")
    allowed = choices or (get_args(hint) if get_origin(hint) is Literal else ())
    if allowed:
        if value not in allowed:
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
