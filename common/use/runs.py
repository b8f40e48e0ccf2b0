"""The one door to a model: opening a run folder, a copied adapter or a base model by its name, before anything loads.

    from common import open_run

    classifier = open_run("outputs/smollm2-135m/arxiv_demo/run_1").classifier()
    classifier.classify(["a text"])[0].probabilities

Whatever imports torch is imported when a model is loaded.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common.data.classification import Example
from common.data.files import file_hash
from common.data.labels import label_text
from common.data.splits import SPLITS, Sources, origin
from common.disk import (
    BASELINE,
    COPY_AGAIN,
    OUTPUTS,
    TASK_FILE,
    check_complete,
    damage_named,
    is_base_model,
    load_task,
    newest_run,
    read_json,
    to_json,
    train_figures,
    weights_folder,
)
from common.errors import InputError
from common.hub import EMBEDDED, resolve_model, weights_fingerprint
from common.log import is_first_process, uses_gpu
from common.measure.gain import copy_zero_shot
from common.options import (
    BASE_CHANGING_INITS,
    CAUSAL_LM,
    CHAT,
    CHAT_LENGTH,
    CLASSIFICATION,
    DeviceConfig,
    TrainingConfig,
    check_task,
    names,
    read_saved,
)
from common.text.prompts import read_template

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from common.measure.decisions import Decision
    from common.use.label_models import LabelModel
    from common.use.text_models import TextModel

DECISION = "decision"  # of task.json
# Options that decide what a row is called, what of it the model is shown, and what is right.
SHOWN = ("id_column", "text_fields", "label_column", "label_columns", "label_delimiter", "columns", "chat_template")
T = TypeVar("T")


@dataclass
class Run:
    """What was trained, or a base model.

    name: as it was given, or found. task: classification, causal_lm or chat. folder: of the trained weights; None: a
    base model. trained: what task.json says; empty for a base model. options: those of the training, in their types;
    of a copied adapter, which has no config.yaml, those that task.json keeps. given: what a script was given that
    changes its figures. untrained: it stands for its own base, with its prompt, labels and options.
    """

    name: str
    task: str
    folder: Path | None
    trained: dict[str, Any]
    options: dict[str, Any]
    given: dict[str, Any] = field(default_factory=dict)
    untrained: bool = False

    @property
    def run_folder(self) -> Path:
        """The run folder; of a copied adapter, its own folder."""
        assert self.folder
        return self.folder.parent if self.folder.name in ("adapter", "model") else self.folder

    @property
    def home(self) -> Path:
        """Where results are written: the run folder; of a base model, outputs/<model>."""
        return self.run_folder if self.folder else OUTPUTS / Path(self.name).name

    @property
    def weights(self) -> Path | None:
        """The folder of the trained weights that are measured; None: those of a base."""
        return None if self.untrained else self.folder

    def configure(self, cls: type[T], given: dict[str, Any], defaults: dict[str, Any]) -> T:
        """The options of a script: those given, else `defaults`, else as declared.

        Raises InputError for an option of another task, or one that training has settled with another value.
        """
        check_task(cls, given, self.task, self.name)
        settled = {"task": self.task, **defaults} if self.folder else {}
        for name in [name for name in (*names(cls, "settled"), "task") if self.folder and name in given]:
            if given[name] != settled.get(name):
                raise InputError(f"--{name} was settled when {self.name} was trained: drop it.")
        if not self.folder and given.get("model", self.name) != self.name:
            raise InputError(f"--model {given['model']}: give the model as --run.")
        self.given = {name: given[name] for name in names(cls, "binds") if name in given}
        known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
        model = {} if self.folder else {"model": self.name}
        values = {**defaults, **given, **model, "task": self.task, "run": self.name}
        return cls(**{name: value for name, value in values.items() if name in known})

    def options_for_rows(self, given: dict[str, Any]) -> dict[str, Any]:
        """The options of the training that decide which rows are read again, and how; few for a base model.

        given: --test_file replaces all of the run's files; of a --split, only the files that it comes from are read.
        Raises InputError for a --test_file with another --split, and for the head of a base model.
        """
        if self.folder is None and given.get("approach") == "head":
            raise InputError(f"--approach head: {self.name} is a base model, whose head would be random. Drop it.")
        if self.folder is None and (unused := [name for name in ("folds", "fold", "class_weights") if name in given]):
            raise InputError(f"--{unused[0]} is about training, and {self.name} is a base model. Drop it.")
        # The template is saved with the weights; the last two are about the machine of the training.
        changed = ("output_dir", "mixed_precision", "chat_template", "num_threads", "shard_model")
        options = {name: value for name, value in self.options.items() if name not in changed}
        if self.folder is None and self.task == CHAT:
            options["max_length"] = CHAT_LENGTH
        if "labels" in self.trained and "label_columns" not in {**options, **given}:
            options["labels"] = self.trained["labels"]
        split = given.get("split", "test")
        named = {f"{name}_file" for name in SPLITS} | {"dataset_name"}
        if self.folder and not (named & given.keys() or (self.run_folder / "config.yaml").is_file()):
            raise InputError(f"{self.name} does not say which rows it was trained on: name some with --test_file.")
        if "test_file" in given:
            if split != "test":
                raise InputError("--test_file is the test split: drop --split.")
            text = given["test_file"].lower().endswith(".txt")
            own = ("train_file", "validation_file", "dataset_name", "dataset_config", "folds", "fold")
            for name in (*own, *["text_fields"] * text):
                options.pop(name, None)
        elif split != "train" and f"{split}_file" in options:
            for other in set(SPLITS) - {split}:  # nothing of it is cut from those files, so none is read
                options.pop(f"{other}_file", None)
        return options

    def results_folder(self, config: Any, name: str, other_rows: bool) -> Path:
        """Where the results of an evaluation are written: --output_dir, or `name` under eval/.

        config: of evaluate.py. other_rows: than the run's own; their file's name is in that of the folder, and of a
        base model the task.
        """
        if other_rows:
            own = getattr(config, f"{config.split}_file")
            read = Path(own or config.train_file or config.dataset_name or "demo").stem
            name = f"{name}-{read}" if self.folder else f"{self.task}-{name}-{read}"
        elif self.reads_otherwise():
            name += "-changed"
        folder = Path(config.output_dir or self.home / "eval" / (f"{name}-base" if self.untrained else name))
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--output_dir {folder}: this is a file. Choose another folder.")
        if config.output_dir and not (folder / "metrics.json").exists():
            for found in ("report.md", "predictions.jsonl", "predictions.csv", "blocks.jsonl"):
                if (folder / found).exists():
                    raise InputError(
                        f"--output_dir {folder}: there is {found} already, which no evaluation has written and this "
                        "one would replace. Choose another folder."
                    )
        self.refuse_links(folder)
        return folder

    def reads_otherwise(self) -> bool:
        """Whether the command line has the model shown something else of its rows than in training.

        A copied adapter does not know what that was.
        """
        known = self.folder is not None and (self.run_folder / "config.yaml").is_file()
        return known and any(
            self.given.get(name, self.options.get(name)) != self.options.get(name) for name in SHOWN
        )

    def refuse_links(self, path: Path) -> None:
        """Raises InputError where a result of this run, which may be somebody else's, would be written elsewhere."""
        for part in chain((path, *path.parents), path.rglob("*")):
            if part.is_symlink() and part.is_relative_to(self.home) and part != self.home:
                raise InputError(f"{part} is a link, and results are not written through it. Name an --output_dir.")

    def made_from(self, sources: Sources, split: str) -> dict[str, Any]:
        """What figures are of, for a metrics.json: rows, weights, and the options that were given."""
        return {**origin(sources, split, self.weights), **({"options": self.given} if self.given else {})}

    def base_fingerprint(self) -> str:
        """Of the weights of the base model; empty where all weights were trained."""
        if self.trained.get("full_finetuning") and not self.untrained:
            return ""
        known = self.trained["model_options"] if self.trained else {"model": self.name, **self.given}
        return weights_fingerprint(resolve_model(known["model"], known.get("revision")), known.get("revision"))

    def results(
        self, folder: Path, sources: Sources, split: str, metrics: dict[str, Any], usual: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The metrics with what they are of and the figures of the training, and the results table's rows.

        folder: of the evaluation; it gets what the untrained base answered then, if that is a row of the table. usual:
        the rows are the run's own. Read as after training, figures and baselines of then can stand beside these.
        """
        metrics |= self.made_from(sources, split)
        results = {"this run" if self.weights else "untrained base": metrics}
        if self.weights and usual and not self.reads_otherwise():
            before = self.home / "eval" / split
            results |= read_json(before / "baselines.json")
            copy_zero_shot(before, folder)
            metrics = {**train_figures(self.home), **metrics}
        return metrics, results

    def has_results(self, folder: Path, sources: Sources, split: str, **facts: Any) -> bool:
        """Whether the folder has this evaluation already, with what a comparison needs. facts: of its metrics.json."""
        found, needed = read_json(folder / "metrics.json"), {CAUSAL_LM: ["unit"], CHAT: ["unit", "answers"]}
        made = {"options": {}, **self.made_from(sources, split), **facts}
        same = all({"options": {}, **found}.get(name) == value for name, value in json.loads(to_json(made)).items())
        rows = folder / ("blocks.jsonl" if self.task == CAUSAL_LM else "predictions.jsonl")
        return same and rows.is_file() and all(name in found for name in needed.get(self.task, ()))

    def partial_results(self, config: Any, sources: Sources, accelerator: "Accelerator") -> dict[str, Any]:
        """Options of `measure_in_chunks`: where results are kept until all are there, and what they are made from.

        config: of evaluate.py.
        """
        templates = {name: file_hash(path) for name in ("prompt_template", "chat_template")
                     if (path := getattr(config, name)) and Path(path).is_file()}  # fmt: skip
        source = {**self.made_from(sources, config.split), "options": asdict(config), "templates": templates}
        source["sources"] = sources  # of few-shot rows, too
        source |= {DECISION: self.trained.get(DECISION), "base": self.base_fingerprint()}
        digest = hashlib.sha256(to_json(source).encode()).hexdigest()[:12]  # two evaluations at once keep apart
        file = Path(config.output_dir or self.home / "eval") / f".{config.split}-{digest}.partial.jsonl"
        self.refuse_links(file)
        options = {"file": file, "source": source, "accelerator": accelerator}
        return {**options, "batch_size": config.per_device_eval_batch_size}

    def loaded_as(self, config: Any) -> str:
        """For people: how the base was loaded; a 4-bit one gives other figures than a 16-bit one."""
        bits = "4-bit" if config.load_in_4bit else "8-bit" if config.load_in_8bit else "unquantized"
        return f"{bits} base, mixed precision {config.mixed_precision}"

    def check_labels(self, labels: list[str], multi_label: bool) -> None:
        """Refuses rows whose labels the run does not answer with, or not in the order of its probabilities."""
        if (labels, multi_label) != (self.trained["labels"], self.trained["multi_label"]):
            kind = "any number of labels" if self.trained["multi_label"] else "one label"
            raise InputError(
                f"The run answers with {kind} of {', '.join(self.trained['labels'])}, in this order; the options given "
                f"describe others ({', '.join(labels)}). Drop or correct --label_column, --label_columns, "
                "--label_delimiter."
            )

    def check_unchanged(self, sources: dict[str, dict[str, str]], split: str) -> None:
        """Refuses to evaluate a run on a file that is no longer the one it was split from."""
        file = self.run_folder / "splits.json"
        saved = read_json(file) or {"sources": sources}
        for name, source in sources.items():
            if saved["sources"].get(name, {}).get("sha256") != source["sha256"]:
                raise InputError(
                    f"{source['name']} has changed since the run was trained, so its {split} split is no longer the "
                    "same rows. Restore the file, or name the rows to evaluate with --test_file."
                )

    def check_base_is_intact(self) -> None:
        """Refuses an adapter whose initialization moved weights out of the base: switched off, it leaves no base."""
        init = read_json(self.folder / "adapter_config.json").get("init_lora_weights") if self.folder else None
        if init in BASE_CHANGING_INITS:
            raise InputError(
                f"{self.name} was trained with --init_lora_weights {init}, which changes the base: use --run alone."
            )

    def classifier(self, labels: Sequence[str] | None = None, **options: Any) -> "LabelModel":
        """A model that labels texts, on the device that there is, in the precision that it was trained in.

        labels: of a base model, which is prompted with them. options: further ones of a base model (`load_in_4bit`...).
        """
        if self.folder is None and not labels:
            raise InputError(f"{self.name} is a base model: name the labels, as in classifier(labels=[...]).")
        config = self._options(CLASSIFICATION, options if labels is None else {**options, "labels": list(labels)})
        return self.load_classifier(config, best_device())

    def chat(self, **options: Any) -> "TextModel":
        """A model that answers in a conversation. options: of a base model (`load_in_4bit`, `chat_template`...)."""
        return self.load_text_model(self._options(CHAT, options), best_device())

    def language_model(self, **options: Any) -> "TextModel":
        """A model that continues texts and measures their perplexity. options: of a base model (`load_in_4bit`...)."""
        return self.load_text_model(self._options(CAUSAL_LM, options), best_device())

    def _options(self, task: str, options: dict[str, Any]) -> TrainingConfig:
        """The options to load a model with where no script has read them."""
        others = options.keys() - {"trust_remote_code"}
        if self.folder and (self.task != task or others):
            what = f"with options of its own: drop {', '.join(sorted(others))}" if others else f"for {self.task}"
            raise InputError(f"{self.name} was trained {what}, and is opened for {task}.")
        self.task = task
        # The template is with the weights, and a run that was sharded is opened by one process.
        known = {"chat_template": None, "shard_model": False} if self.folder else {"model": self.name}
        config = TrainingConfig(**{**self.options, **known, **options})
        self.resolve(config)
        return config

    def resolve(self, config: Any) -> None:
        """Fills in what is unset: as trained, else as the device allows. Raises InputError for an encoder."""
        from common.model import base_model

        config.full_finetuning = False  # a base model is loaded as it is, not to be trained
        config.mixed_precision = config.mixed_precision or self.trained.get("mixed_precision")
        encoder = self.folder is None and base_model.is_encoder(resolve_model(config.model, config.revision), config)
        base_model.resolve_options(config, encoder)

    def load_classifier(
        self,
        config: Any,
        device: "torch.device",
        multi_label: bool = False,
        examples: Sequence[Example] = (),
        few_shot: Sequence[tuple[str, tuple[int, ...]]] = (),
    ) -> "LabelModel":
        """The trained classifier; or the base model, prompted with `labels`, `prompt_template` and `max_length`.

        config: resolved. Of a base model: examples, rows whose longest answer must fit; few_shot, (text, label
        indices) pairs before every row.
        """
        from common.measure.decisions import Decision
        from common.model import base_model, storage
        from common.model.classifier import Classifier, classification_prompt
        from common.use.label_models import LabelModel

        place = self._loading_device(config, device)
        if self.folder:
            classifier = storage.load_classifier(self.folder, place, config.mixed_precision, config.trust_remote_code)
            if self.untrained:
                classifier = replace(classifier, model=self._base(classifier.model, config, place))
            _share_out(classifier.model, config, device)
            return LabelModel(classifier, device, config.mixed_precision, self.decision())
        path = resolve_model(config.model, config.revision)
        base_model.check_length(path, config, config.max_length, "--max_length")
        tokenizer = base_model.load_tokenizer(path, config)
        template = read_template(config.prompt_template, "generative")
        prompt = classification_prompt(
            tokenizer, False, labels=[label_text(name) for name in config.labels], multi_label=multi_label,
            template=template, max_length=config.max_length, few_shot=few_shot,
        )  # fmt: skip
        prompt.reserve(examples)
        model = base_model.load_base(path, config, device=place)[0].eval()
        _share_out(model, config, device)
        decision = Decision.unfitted(multi_label, len(prompt.labels))
        return LabelModel(Classifier(model, prompt, tokenizer), device, config.mixed_precision, decision)

    def decision(self) -> "Decision":
        """How the classifier's probabilities become answers: as fitted, else unfitted."""
        from common.measure.decisions import Decision
        from common.measure.tfidf import Tfidf

        assert self.folder
        plain = Decision.unfitted(self.trained["multi_label"], len(self.trained["labels"]))
        try:
            decision = replace(plain, **({} if self.untrained else self.trained.get(DECISION, {})))
        except TypeError as error:
            raise InputError(f"{self.folder / TASK_FILE}: {DECISION}: {error}. {COPY_AGAIN}") from None
        if not decision.blend:
            return decision
        with damage_named(self.folder / BASELINE):
            return replace(decision, baseline=Tfidf.load(self.folder / BASELINE))

    def load_text_model(self, config: Any, device: "torch.device") -> "TextModel":
        """The trained model, or the base model, as it answers in a conversation or continues texts.

        config: resolved; a `chat_template` replaces the model's own, a `system_prompt` the trained one.
        """
        from common.model import base_model, storage
        from common.text.chat import choose_template
        from common.use.text_models import TextModel

        place, template = self._loading_device(config, device), None
        if self.folder is None:
            path = resolve_model(config.model, config.revision)
            tokenizer = base_model.load_tokenizer(path, config)
            template = choose_template(tokenizer, config.chat_template) if self.task == CHAT else None
            model = base_model.load_base(path, config, device=place)[0].eval()
        elif self.task == CHAT:
            model, tokenizer, template = storage.load_chat_model(
                self.folder, place, config.mixed_precision, config.chat_template, config.trust_remote_code
            )
        else:
            model, tokenizer = storage.load_language_model(
                self.folder, place, config.mixed_precision, config.trust_remote_code
            )
        if self.untrained:
            model = self._base(model, config, place)
        _share_out(model, config, device)
        start = [] if template else self.trained.get("start", base_model.start_ids(tokenizer))
        system = config.system_prompt or self.trained.get("system_prompt")
        return TextModel(model, tokenizer, template, start, system, device, config.mixed_precision)

    def _loading_device(self, config: Any, device: "torch.device") -> "torch.device":
        """Where weights are loaded: a model that will be sharded may not fit on the device before.

        Raises InputError for 8-bit weights that should be sharded.
        """
        import torch

        if not _is_sharded(config):
            return device
        if (self.trained.get("model_options") or vars(config))["load_in_8bit"]:
            raise InputError("--shard_model true: 8-bit weights cannot be sharded. Drop it.")
        return torch.device("cpu")

    def _base(self, model: Any, config: Any, device: "torch.device") -> Any:
        """The base of the trained model; loaded again where it is not in there any more."""
        from common.model import base_model, lora, storage

        init = read_json(self.folder / "adapter_config.json").get("init_lora_weights")
        if not self.trained["full_finetuning"] and init not in BASE_CHANGING_INITS:
            return lora.remove_adapter(model)
        options = storage.trained_options(self.trained, config.mixed_precision, config.trust_remote_code)
        return base_model.load_base(resolve_model(options.model, options.revision), options, device=device)[0].eval()


def best_device() -> "torch.device":
    """The GPU if there is one to use, else the CPU."""
    import torch

    return (uses_gpu() and torch.accelerator.current_accelerator()) or torch.device("cpu")


def _is_sharded(config: Any) -> bool:
    return isinstance(config, DeviceConfig) and config.shard_model


def _share_out(model: Any, config: Any, device: "torch.device") -> None:
    """With --shard_model, each process keeps a part of every layer, adapter and all, in place."""
    if _is_sharded(config):
        from common.model import sharding

        parts = sharding.shard(model.requires_grad_(False), device)
        if is_first_process():
            print(parts, file=sys.stderr, flush=True)


def open_run(name: str | None = None, task: str | None = None) -> Run:
    """Finds what `name` means: a run folder, an adapter folder, or a base model (hub id, folder, GGUF file).

    Without a name: the newest run under outputs/, else the embedded model. task: of a base model.
    Raises InputError where a folder is neither.
    """
    path = Path(name) if name else newest_run()
    if path is None or is_base_model(path):
        return Run(name or EMBEDDED, task or CLASSIFICATION, None, {}, {})
    folder = weights_folder(path)
    trained = load_task(folder)
    if trained["task"] not in (CLASSIFICATION, CAUSAL_LM, CHAT):
        raise InputError(f"{path} was trained for {trained['task']}: use it with the script that trained it.")
    check_complete(folder, trained)
    run = Run(str(path), trained["task"], folder, trained, {})
    kept = {name: trained[name] for name in names(TrainingConfig, "kept") if trained.get(name) is not None}
    options = {name: value for name, value in trained["model_options"].items() if name != "trust_remote_code"}
    run.options = {**options, **kept, **read_saved(run.run_folder)}
    run.options = {name: value for name, value in run.options.items() if value is not None}
    return run


def check_comparable(first: Run, others: Sequence[Run | None]) -> None:
    """Raises InputError for runs (None: their base) that are not adapters of one base that can be switched off."""
    for run in [first, *filter(None, others)]:
        if run.folder is None:
            raise InputError(
                f"--compare: {run.name} is no folder of a run. Name runs, and `base` for their base model."
            )
        if run.task != first.task:
            raise InputError(f"--compare: {run.name} was trained for {run.task}, {first.name} for {first.task}.")
        options, wanted = run.trained["model_options"], first.trained["model_options"]
        if differing := [name for name in wanted if options.get(name) != wanted[name]]:
            shown = ", ".join(f"{name} {options.get(name)} and {wanted[name]}" for name in differing)
            raise InputError(
                f"--compare: {run.name} and {first.name} have different bases ({shown}), and only one is loaded. "
                "Prompt them one after the other, with --run."
            )
        if run.trained["full_finetuning"]:
            raise InputError(f"--compare: {run.name} has no adapter, all its weights were trained. Use --run.")
        run.check_base_is_intact()


def load_compared(first: "TextModel", run: Run, others: Sequence[Run | None], config: Any) -> list["TextModel"]:
    """A model for each of the others (None: their base), all on one base in memory.

    first: the model of `run`; the adapters of the others are loaded beside its own. config: a `chat_template` or
    `system_prompt` in it is for all, else each has its own.
    """
    from common.model import base_model, storage
    from common.text.chat import ChatTemplate

    models = []
    for number, other in enumerate(others):
        if other is None:
            models.append(replace(first, adapter=None))
        elif other.folder == run.folder:
            models.append(first)
        else:
            options = storage.trained_options(other.trained, trust_remote_code=config.trust_remote_code)
            tokenizer = base_model.load_tokenizer(str(other.folder), options)
            own = first.template
            if own and not config.chat_template:
                own = ChatTemplate(tokenizer, other.trained["chat_template"], f"the chat template of {other.name}")
            storage.add_adapter(first.model, other.folder, f"run{number}")
            start = other.trained.get("start", [])
            turn = config.system_prompt or other.trained.get("system_prompt")
            models.append(
                replace(first, tokenizer=tokenizer, template=own, start=start, system=turn, adapter=f"run{number}")
            )
    return models
