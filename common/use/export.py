"""Takes what was trained home: one folder or file that other programs load, with a certificate that it is the same.

adapter + base  ->  merged model (transformers, vLLM)  ->  GGUF (llama.cpp, Ollama)
                          |                                   |
                    certificate: replayed on held-out rows, beside the adapter on its base
"""

import contextlib
import copy
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator

from common.data.classification import Example, load_classification
from common.data.conversations import load_conversations
from common.data.corpus import load_corpus_once, open_sources
from common.disk import BASELINE, TASK_FILE, recover, replace_folder, write_json
from common.errors import InputError, printable
from common.hub import hub_answers
from common.measure.certificate import (
    LAYER_BOUNDS,
    POSITIONS,
    TOKEN_BOUNDS,
    ReplayRow,
    certificate_text,
    layer_differences,
    metric_difference,
    problems,
    token_agreement,
)
from common.measure.intervals import Measure
from common.measure.metrics import label_measure, loss_measure
from common.measure.scoring import classify, head_outputs
from common.model import storage
from common.model.base_model import DTYPES, precision
from common.model.llama_cpp import CONTEXT, LlamaCpp, check_tools, convert, is_runnable
from common.model.merging import merged_model
from common.options import (
    CHAT,
    CLASSIFICATION,
    ChatDataConfig,
    ClassificationDataConfig,
    CorpusDataConfig,
    ModelConfig,
    option,
)
from common.text.chat import ChatTemplate, chat_rows
from common.text.prompts import classification_rows
from common.use.modelfile import modelfile
from common.use.runs import Run, best_device, open_run
from common.use.space import write_space

ANSWER = 64  # tokens that llama.cpp may write after a row
SHARD = "5GB"  # of a merged model's files, at most
CERTIFICATE = "certificate.json"
LLAMA_ROWS, LLAMA_POSITIONS = 16, 8  # llama.cpp gives a position's probabilities in a request of its own


@dataclass
class ReplayConfig(ModelConfig, ClassificationDataConfig, CorpusDataConfig, ChatDataConfig):
    """rows of a certificate"""

    run: str | None = option(None, "run folder")
    task: str | None = option(None, "of the run")
    split: str = option("validation", "split of the run")
    mixed_precision: str | None = option(None, "as trained")


def replay_options(run: Run, config: Any) -> ReplayConfig:
    """The options that the rows of a certificate are read with: those of the training. config: of the export."""
    given = {"test_file": config.test_file} if config.test_file else {"split": "validation"}
    replayed = run.configure(ReplayConfig, given, run.options_for_rows(given))
    replayed.trust_remote_code = config.trust_remote_code
    return replayed


@dataclass
class Side:
    """A run as it is loaded, and what its held-out rows become with its own tokenizer and prompt.

    loaded: a LabelModel or TextModel.
    """

    run: Run
    loaded: Any
    rows: list[ReplayRow]

    @property
    def model(self) -> Any:
        """The library's model, with its adapter if it has one."""
        model = self.loaded.classifier.model if self.run.task == CLASSIFICATION else self.loaded.model
        return storage.stored_model(model)

    @property
    def tokenizer(self) -> Any:
        return (self.loaded.classifier if self.run.task == CLASSIFICATION else self.loaded).tokenizer

    @property
    def head(self) -> bool:
        return self.run.trained.get("approach") == "head"


class HeldOut:
    """Rows that nothing was trained on, for both sides of a certificate: those of the validation split, or a file."""

    def __init__(self, run: Run, config: Any, test_file: str | None, most: int) -> None:
        """config: of `evaluate.py` for the run (`replay_options`). Raises InputError where there are no such rows."""
        self.config, self.split, self.most = config, "test" if test_file else "validation", most
        if run.task == CLASSIFICATION:
            data = load_classification(config, training=False)
            run.check_labels(data.labels, data.multi_label)
            self.rows: Sequence[Any] = data.splits[self.split][:most]
        elif run.task == CHAT:
            self.chats = load_conversations(config, training=False)
            self.chats.splits = {self.split: self.chats.splits[self.split][:most]}
            self.rows = self.chats.splits[self.split]
        else:
            self.sources = open_sources(config, training=False)
            cut = self.split == "validation" and "train" in self.sources and config.validation_fraction > 0
            self.rows = [None] * (cut or self.split in self.sources)
        if not self.rows:
            raise InputError(
                f"{run.name} has no {self.split} rows to compare the export on: name some with --test_file."
            )

    def replayed(self, run: Run, loaded: Any) -> list[ReplayRow]:
        """The rows as a model of the run sees them."""
        if run.task == CLASSIFICATION:
            rows: list[Any] = classification_rows(self.rows, loaded.classifier.prompt, None)
            answers = [getattr(row, "answer", []) for row in rows]
            prompts = [row.prompt for row in rows]
        elif run.task == CHAT:
            found = chat_rows(copy.deepcopy(self.chats), loaded.template, self.config.max_length)[self.split]
            return [
                ReplayRow(row.id, row.ids, [i for i, trained in enumerate(row.mask) if trained])
                for row in found[: self.most]
            ]
        else:
            corpus = load_corpus_once(self.sources, self.config, loaded.tokenizer, Accelerator(cpu=True))
            blocks = list(islice(corpus.splits[self.split], self.most))
            prompts, answers = [loaded.start or block.tokens[:1] for block in blocks], []
            answers = [block.tokens if loaded.start else block.tokens[1:] for block in blocks]
        return [
            ReplayRow(str(number), [*prompt, *answer], list(range(len(prompt), len(prompt) + len(answer))))
            for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]


def export_merged(run: Run, target: Path, dtype: str, held_out: HeldOut, trust_remote_code: bool = False) -> list[str]:
    """Writes the run as one model into the folder `target`; what its certificate shows to be off.

    dtype: bf16, fp16 or fp32. Raises InputError for a folder that holds something else.
    """
    with _replaced(target) as folder:
        write_merged(run, folder, dtype, trust_remote_code)
        certificate = certify(run, folder, held_out, dtype, trust_remote_code)
        _write_certificate(folder, certificate)
    return problems(certificate)


def write_merged(run: Run, folder: Path, dtype: str, trust_remote_code: bool) -> None:
    """The merged model with tokenizer, task.json and all that is used with it, in a new folder."""
    assert run.folder
    task = dict(run.trained)
    head = task.get("approach") == "head"
    kind = {"labels": task["labels"], "multi_label": task["multi_label"]} if head else {}
    options = storage.trained_options(task, trust_remote_code=trust_remote_code)
    model = merged_model(run.folder, options, DTYPES[dtype if dtype != "fp32" else "no"], **kind)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(run.folder, trust_remote_code=trust_remote_code)
    if not trust_remote_code:  # the converter to GGUF would run the code that is named there
        for settings in (tokenizer.init_kwargs, vars(model.config)):
            settings.pop("auto_map", None)
    if head:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)
    if (run.folder / "generation_config.json").is_file():
        shutil.copy(run.folder / "generation_config.json", folder)
    if (run.folder / BASELINE).is_dir():
        shutil.copytree(run.folder / BASELINE, folder / BASELINE)
    plain = {"load_in_4bit": False, "load_in_8bit": False, "bnb_4bit_compute_dtype": None}
    options_kept = {**task["model_options"], **plain}
    task = {**task, "full_finetuning": True, "merged": dtype, "model_options": options_kept}
    task.pop("base_fingerprint", None)
    write_json(folder / TASK_FILE, task)
    card = run.folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        labels = len(task["labels"]) if head else 0
        (folder / "README.md").write_text(storage.merged_card(text, labels, tokenizer.pad_token_id), encoding="utf-8")


def export_gguf(run: Run, target: Path, kind: str, held_out: HeldOut, trust_remote_code: bool = False) -> list[str]:
    """Writes the run as a GGUF file with a Modelfile for Ollama; what its certificate shows to be off.

    kind: f16, q8_0, q4_k_m. Raises InputError for a classification head, which llama.cpp has no place for.
    """
    if run.trained.get("approach") == "head":
        raise InputError(f"{run.name} has a classification head, which GGUF cannot hold. Use --format merged.")
    check_tools(kind)
    with _replaced(target) as folder:
        scratch = folder / "merged"
        write_merged(run, scratch, "fp16", trust_remote_code)
        file = folder / f"{run.run_folder.name}-{kind}.gguf"
        convert(scratch, file, kind)
        certificate = certify(run, scratch, held_out, "fp16", trust_remote_code, gguf=file, kind=kind)
        card = scratch / "README.md"
        if card.is_file():
            card.write_text(storage.gguf_card(card.read_text(encoding="utf-8"), file.name), encoding="utf-8")
        for name in ("README.md", TASK_FILE, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (scratch / name).is_file():
                shutil.move(scratch / name, folder / name)
        shutil.rmtree(scratch)
        (folder / "Modelfile").write_text(certificate.pop("modelfile"), encoding="utf-8")
        _write_certificate(folder, certificate)
    return problems(certificate)


def export_space(run: Run, target: Path, dtype: str, held_out: HeldOut, trust_remote_code: bool = False) -> list[str]:
    """Writes the folder of a Hugging Face Space, whose page is that of `inference.py --web`; what its model has off."""
    with _replaced(target) as folder:
        write_merged(run, folder / "model", dtype, trust_remote_code)
        certificate = certify(run, folder / "model", held_out, dtype, trust_remote_code)
        _write_certificate(folder, certificate)
        write_space(folder, run.run_folder.name)
    return problems(certificate)


@contextlib.contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of an earlier export in `target` when the block ends."""
    recover(target)
    if target.exists() and not (target / CERTIFICATE).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"--output_dir {target}: there is something else already. Choose another folder.")
    if (target / "eval").is_dir():
        raise InputError(f"{target / 'eval'} has results of an earlier export. Move them, or choose an --output_dir.")
    scratch = target.with_name(f".{target.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        replace_folder(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_certificate(folder: Path, certificate: dict[str, Any]) -> None:
    text = printable(certificate_text(certificate))
    passed = False if problems(certificate) else True if certificate["rows"] else None  # a GGUF file may not be run
    write_json(folder / CERTIFICATE, {**certificate, "passed": passed})
    (folder / "certificate.txt").write_text(f"{text}\n", encoding="utf-8")
    print(text)


def certify(
    run: Run,
    folder: Path,
    held_out: HeldOut,
    dtype: str,
    trust_remote_code: bool = False,
    gguf: Path | None = None,
    kind: str = "merged",
) -> dict[str, Any]:
    """What the run and its export, the merged model in `folder` and a GGUF file made from it, have in common.

    The export is loaded as any other program would: by the library's Auto classes, or by llama.cpp.
    """
    device = best_device()
    trained, exported = load_side(run, held_out, device), load_side(open_run(str(folder)), held_out, device)
    certificate: dict[str, Any] = {"run": run.name, "format": kind, "split": held_out.split, "rows": 0, "metrics": {},
                                   "notes": [], **_texts(trained, exported, folder)}  # fmt: skip
    if gguf:
        certificate["modelfile"] = modelfile(run.trained, exported.loaded, gguf.name)
    differences = layer_differences(trained.model, exported.model)
    certificate["layers"] = {"bound": LAYER_BOUNDS[dtype], "differences": differences}
    if gguf and not is_runnable():
        certificate["notes"].append("The GGUF file was not run: `pip install xllamacpp` adds llama.cpp.")
        return certificate
    rows = trained.rows
    if gguf:
        rows = [row for row in rows if len(row.ids) + ANSWER <= CONTEXT][:LLAMA_ROWS]
        if not rows:
            certificate["notes"].append(f"The GGUF file was not run: all rows are longer than {CONTEXT} tokens.")
            return certificate
    places = [row.chosen(LLAMA_POSITIONS if gguf else POSITIONS) for row in rows]
    before = [_log_probs(trained, row, at, device) for row, at in zip(rows, places, strict=True)]
    if gguf:
        llama = LlamaCpp(gguf, max(len(row.ids) for row in rows) + ANSWER, torch.get_num_threads())
        size = before[0].shape[-1]
        after = [llama.log_probs(row.ids, at, size) for row, at in zip(rows, places, strict=True)]
        metrics = _answers_measured(trained, rows, held_out, llama, device)
        if run.task == CHAT:
            _check_template(certificate, trained.loaded.template, held_out, llama)
    else:
        after = [_log_probs(exported, row, at, device) for row, at in zip(rows, places, strict=True)]
        metrics = _labels_measured(trained, exported, held_out, device)
    losses = [_losses(found, rows, places) for found in (before, after)] if not trained.head else ()
    pairs = [pair for pair in (losses, metrics) if pair]
    certificate["tokens"] = {**token_agreement(before, after), "bounds": list(TOKEN_BOUNDS[kind])}
    certificate["rows"] = len(rows)
    for first, second in pairs:
        certificate["metrics"] |= metric_difference(first, second, len(rows))
    return certificate


def load_side(run: Run, held_out: HeldOut, device: torch.device) -> Side:
    """The run, loaded for a comparison, and its held-out rows."""
    config = replace(held_out.config)
    run.resolve(config)
    classifies = run.task == CLASSIFICATION
    loaded: Any = run.load_classifier(config, device) if classifies else run.load_text_model(config, device)
    if device.type == "cpu":  # so that nothing but the weights differs; elsewhere as trained, to save memory
        compute_in_fp32(loaded, (loaded.classifier if classifies else loaded).model)
    return Side(run, loaded, held_out.replayed(run, loaded))


def compute_in_fp32(loaded: Any, model: torch.nn.Module) -> None:
    """Lets a LabelModel or TextModel and its `model` compute in fp32, with the weights that they have."""
    layer: Any
    for layer in model.float().modules():
        if hasattr(layer, "compute_dtype"):  # of a 4-bit layer
            layer.compute_dtype = torch.float32
    loaded.precision = "no"


def _texts(trained: Side, exported: Side, folder: Path) -> dict[str, Any]:
    """What handles text, compared: `same`, a list of names, and `different`, name -> how."""
    tokenizers = [side.tokenizer for side in (trained, exported)]
    ends = [_end_tokens(getattr(trained.model, "generation_config", None)), _end_tokens(_generation_config(folder))]
    facts: dict[str, Sequence[Any]] = {
        "BOS": [tokenizer.bos_token_id for tokenizer in tokenizers],
        "EOS": [(tokenizer.eos_token_id, end) for tokenizer, end in zip(tokenizers, ends, strict=True)],
        "chat template": [tokenizer.chat_template for tokenizer in tokenizers],
        "vocabulary": [len(tokenizer) for tokenizer in tokenizers],
        "ids of the rows": [[row.ids for row in side.rows] for side in (trained, exported)],
    }
    short = {name: " instead of ".join(str(value)[:80] for value in reversed(pair)) for name, pair in facts.items()}
    different = {name: short[name] for name, (before, after) in facts.items() if before != after}
    if trained.head and exported.model.config.get_text_config().pad_token_id == tokenizers[0].eos_token_id:
        different["pad token"] = "it is the end token, so other programs read another position than the last"
    return {"same": [name for name in facts if name not in different], "different": different}


def _generation_config(folder: Path) -> Any:
    """What other programs end a text by; a classification head writes none."""
    found = (folder / "generation_config.json").is_file()
    return transformers.GenerationConfig.from_pretrained(folder) if found else None


def _end_tokens(generation: Any) -> list[int]:
    ids = generation.eos_token_id if generation else None
    return sorted({ids} if isinstance(ids, int) else set(ids or ()))


@torch.inference_mode()
def _log_probs(side: Side, row: ReplayRow, places: Sequence[int], device: torch.device) -> torch.Tensor:
    """[places, vocabulary], of a head [1, labels] or, of several labels per row, [labels, 2]."""
    ids = torch.tensor([row.ids], device=device)
    with precision(device, side.loaded.precision):
        if not side.head:
            kept = torch.tensor(places, device=device) - 1
            return side.model(input_ids=ids, logits_to_keep=kept).logits[0].float().log_softmax(-1).cpu()
        if "merged" in side.run.trained:
            logits = side.model(input_ids=ids).logits.float().cpu()  # at the token that other programs read
        else:
            head = side.loaded.classifier.model
            logits = head_outputs(head, [row.ids], side.tokenizer.pad_token_id, batch_size=1, device=device)
    if side.run.trained["multi_label"]:
        return torch.stack([F.logsigmoid(-logits[0]), F.logsigmoid(logits[0])], -1)
    return logits.log_softmax(-1)


def _losses(found: Sequence[torch.Tensor], rows: Sequence[ReplayRow], places: Sequence[Sequence[int]]) -> Measure:
    """Nats per compared token of what the rows say there."""
    nats = [-sum(float(p[i, row.ids[at]]) for i, at in enumerate(each)) for p, row, each in
            zip(found, rows, places, strict=True)]  # fmt: skip
    return loss_measure(np.array(nats), np.array([len(each) for each in places], dtype=float))


def _check_template(certificate: dict[str, Any], template: ChatTemplate, held_out: HeldOut, llama: LlamaCpp) -> None:
    """Notes whether llama.cpp makes as many tokens of a question, by the template in the file, as we do."""
    questions = [conversation.messages[:-1] for conversation in held_out.rows[:LLAMA_ROWS]]
    counts = [len(template.prompt(turns).ids) for turns in questions]
    fitting = [(turns, count) for turns, count in zip(questions, counts, strict=True) if count < llama.context]
    name, off = "chat template in llama.cpp", sum(llama.prompt_tokens(turns) != count for turns, count in fitting)
    if off:
        certificate["different"][name] = f"{off} of {len(fitting)} questions become another number of tokens"
    else:
        certificate["same"].append(name)


def _labels_measured(trained: Side, exported: Side, held_out: HeldOut, device: torch.device) -> list[Measure]:
    """Accuracy and F1 of the labels that both give to the rows; nothing for other tasks."""
    if trained.run.task != CLASSIFICATION:
        return []
    return [_label_measure(side, held_out.rows, device, "score") for side in (trained, exported)]


def _answers_measured(
    trained: Side, rows: Sequence[ReplayRow], held_out: HeldOut, llama: LlamaCpp, device: torch.device
) -> list[Measure]:
    """Accuracy and F1 of the labels that both write greedily; nothing for other tasks."""
    if trained.run.task != CLASSIFICATION:
        return []
    some: Sequence[Example] = [held_out.rows[int(row.id)] for row in rows]
    prompt = trained.loaded.classifier.prompt
    written = [prompt.parse(llama.answer(row.prompt, prompt.answer_tokens)) for row in rows]
    gold = [example.labels for example in some]
    return [_label_measure(trained, some, device, "generate"), label_measure(gold, written, len(prompt.labels))]


def _label_measure(side: Side, rows: Sequence[Example], device: torch.device, decode: Any) -> Measure:
    with precision(device, side.loaded.precision):
        answers = classify(side.loaded.classifier, rows, device=device, batch_size=8, labeled=False, decode=decode)
    gold, labels = [example.labels for example in rows], side.run.trained["labels"]
    return label_measure(gold, [answer.labels for answer in answers], len(labels))


def push(folder: Path, name: str, space: bool = False) -> None:
    """Uploads an export to the hub, in one commit. Raises InputError where the hub refuses it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    kept = f"The export itself is complete in {folder}."
    if not hub_answers():
        raise InputError(f"--push_to_hub {name}: the hub cannot be reached. {kept}")
    try:
        api = HfApi()
        kind = "space" if space else "model"
        api.create_repo(name, repo_type=kind, space_sdk="gradio" if space else None, exist_ok=True)
        print(f"Uploaded to {api.upload_folder(repo_id=name, folder_path=folder, repo_type=kind)}")
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise InputError(f"--push_to_hub {name}: {error}. {kept}") from None
