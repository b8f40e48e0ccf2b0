"""Trained weights on disk: with tokenizer, task.json and model card, saved and loaded again."""

import copy
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.data.report import markdown
from common.disk import TASK_FILE, damage_named, load_task, write_json
from common.errors import InputError, printable
from common.hub import EMBEDDED, EMBEDDED_ID, license_of, resolve_model, weights_fingerprint
from common.log import warn
from common.model.base_model import load_base, load_tokenizer
from common.model.classifier import Classifier, HeadClassifier, classification_prompt
from common.model.generation import end_ids
from common.model.lora import leave_casts_to_autocast
from common.model.token_losses import TokenLosses
from common.options import CAUSAL_LM, CHAT, CLASSIFICATION, ModelConfig, names
from common.text.chat import ChatTemplate, choose_template


def stored_model(model: Any) -> Any:
    """The library's model, which is what is saved, without our forward module around it."""
    return model.model if isinstance(model, HeadClassifier | TokenLosses) else model


ADAPTER_ALONE = "; this folder holds the adapter alone."
LARGEST = 1e15  # of a weight; fp32 ends at 3e38, and products of products must fit
SAVED_OPTIONS = [item.name for item in fields(ModelConfig) if item.name != "trust_remote_code"]  # no file turns it on


@dataclass
class TrainedOptions(ModelConfig):
    """How a trained model is loaded again."""

    mixed_precision: str = "no"
    full_finetuning: bool = False
    base_fingerprint: str = ""  # of the base that an adapter was trained on


def save_weights(model: Any, folder: Path) -> None:
    """The adapter (with the modules trained in full), or the full model, as safetensors in the library's own format.

    Raises FloatingPointError for trained weights that are not finite, or whose products would not be.
    """
    model = stored_model(model)
    if not all((parameter.abs() < LARGEST).all() for parameter in model.parameters() if parameter.requires_grad):
        raise FloatingPointError(
            "The training diverged: after the last update weights are not finite or beyond 1e15, so none are saved. "
            "Try a lower --learning_rate, a longer --warmup_ratio or --mixed_precision no."
        )
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    else:
        model.save_pretrained(folder, save_original_format=False)  # the names that `load_weights` finds in the model


def load_weights(model: Any, folder: Path) -> None:
    """Puts weights that `save_weights` wrote back into the same model."""
    model = stored_model(model)
    if isinstance(model, peft.PeftModel):
        _check_complete(model, folder)
        weights = peft.load_peft_weights(str(folder), device="cpu")
        try:
            peft.set_peft_model_state_dict(model, weights)
        except RuntimeError as error:  # of another shape
            raise InputError(f"{folder}: the adapter does not fit the base: {error}") from error
    else:
        from safetensors.torch import load_file

        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        _, unexpected = model.load_state_dict(weights, strict=False)  # tied weights are stored once
        if unexpected:
            raise InputError(f"{folder}: these weights belong to another model: {', '.join(unexpected[:3])} ...")


def _check_complete(model: peft.PeftModel, folder: Path) -> None:
    """Refuses an adapter that lacks a weight it should carry: a head that stays random gives random answers."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        present = set(file.keys())
    lacking = sorted(peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys() - present)
    if lacking:
        raise InputError(
            f"{folder}: the adapter lacks trained weights ({', '.join(lacking[:3])}), so its answers would be random."
        )


def save_trained(
    folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: dict[str, Any], use: str, config: Any
) -> None:
    """Weights, tokenizer, task.json and model card: with the base model, all that is needed to use what was trained.

    task: what must be known to use it, `task` (its name) first; options that are kept there are added from `config`, a
    script's Config. use: the model card's text on what it does.
    """
    folder.mkdir(parents=True)
    save_weights(model, folder)
    if not config.full_finetuning:
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = adapter["base_model_name_or_path"]
        task["base_fingerprint"] = weights_fingerprint(base, config.revision)
        adapter["base_model_name_or_path"] = EMBEDDED_ID if config.model == EMBEDDED else config.model
        write_json(folder / "adapter_config.json", adapter)
    tokenizer.save_pretrained(folder)
    kept = {name: getattr(config, name) for name in names(type(config), "kept") if name not in task}
    task = {
        **task,
        **kept,
        "full_finetuning": config.full_finetuning,
        "mixed_precision": config.mixed_precision,
        "model_options": {name: getattr(config, name) for name in SAVED_OPTIONS},
    }
    (folder / TASK_FILE).write_text(json.dumps(task, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(_model_card(model, tokenizer, task["task"], use, config), encoding="utf-8")


def _model_card(model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: str, use: str, config: Any) -> str:
    """What the weights are and how to use them; `common.measure.model_card` adds what was measured at the end."""
    quantized = "8-bit " if config.load_in_8bit else f"4-bit {config.bnb_4bit_quant_type} " * config.load_in_4bit
    size = f"r {config.lora_r}, alpha {config.lora_alpha:g}"
    lora = f"Trained with LoRA ({size}) on its {quantized}weights{ADAPTER_ALONE}"
    trained = "All its weights were trained." if config.full_finetuning else lora
    head = isinstance(model, HeadClassifier)
    base = EMBEDDED_ID if config.model == EMBEDDED else config.model
    tag = "text-classification" if head or task == CLASSIFICATION else "text-generation"
    license = license_of(config.model, config.revision)
    known = f"license: {json.dumps(license)}\n" if license else ""
    labels = stored_model(model).config.num_labels if head else 0
    return (
        f"---\nbase_model: {json.dumps(base)}\n{known}tags: [{tag}, plainlora]\n---\n"
        f"# {config.model}, fine-tuned\n\n{trained}\n\n{use}\n\n"
        f"{_loading(not config.full_finetuning, labels, tokenizer.pad_token_id)}"
    )


def merged_card(text: str, labels: int, pad_id: int) -> str:
    """The model card of an adapter as that of the merged model. labels: of a head, else 0."""
    merged = text.replace(ADAPTER_ALONE, ", and merged into them.")
    return merged.replace(_loading(True, labels, pad_id), _loading(False, labels, pad_id))


def gguf_card(text: str, file: str) -> str:
    """The model card of a merged model as that of the GGUF file that was made of it."""
    head, _, rest = text.partition(_loading(False, 0, 0))
    use = f"In Ollama: `ollama create mine -f Modelfile`. In llama.cpp: `llama-cli -m {file}`.\n"
    return (head + use + rest).replace("--run THIS_FOLDER", "--run RUN")


def _loading(adapter: bool, labels: int, pad_id: int) -> str:
    """How other programs load the weights; those read a head at the last token that is not the pad token."""
    package, auto = ("peft", "AutoPeftModelFor") if adapter else ("transformers", "AutoModelFor")
    auto += "SequenceClassification" if labels else "CausalLM"
    outputs = f", num_labels={labels}, pad_token_id={pad_id}" if labels and adapter else ""
    return (
        "Load it without plainlora:\n\n```python\n"
        f"from {package} import {auto}\nfrom transformers import AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("THIS_FOLDER"{outputs}).eval()\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n```\n'
    )


def trained_options(
    task: dict[str, Any], mixed_precision: str | None = None, trust_remote_code: bool = False
) -> TrainedOptions:
    """The options to load a trained model with; mixed_precision: unset, as trained."""
    return TrainedOptions(
        **{name: task["model_options"][name] for name in SAVED_OPTIONS},
        trust_remote_code=trust_remote_code,
        mixed_precision=mixed_precision or task["mixed_precision"],
        full_finetuning=task["full_finetuning"],
        base_fingerprint=task.get("base_fingerprint", ""),
    )


def load_model(
    folder: Path, options: TrainedOptions, device: torch.device | None = None, **kind: Any
) -> PreTrainedModel:
    """Base and trained weights. kind: `labels` and `multi_label` of a classification head (base_model.load_base)."""
    path = str(folder) if options.full_finetuning else resolve_model(options.model, options.revision)
    model, missing = load_base(path, options, device=device, as_stored=options.full_finetuning, **kind)
    if options.full_finetuning:
        if missing:
            raise InputError(f"{folder}: the trained weights of {', '.join(missing)} are missing.")
        return model
    if options.base_fingerprint not in ("", weights_fingerprint(path, options.revision)):
        warn(f"{options.model} has other weights than when {folder} was trained, so the results may be worse.")
    return with_adapter(model, folder)


def with_adapter(model: PreTrainedModel, folder: Path) -> Any:
    """A base model with the adapter that `save_weights` wrote into the folder."""
    with damage_named(folder):
        lora = peft.PeftConfig.from_pretrained(str(folder))
        lora.base_model_name_or_path = None  # where the base was when it was trained
        adapted = peft.get_peft_model(model, lora)
        load_weights(adapted, folder)
    return leave_casts_to_autocast(adapted)


def save_language_model(
    folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase, start: list[int], config: Any
) -> None:
    """A model trained on running text. start: the ids before every block."""
    task = {"task": CAUSAL_LM, "start": start}
    use = (
        f"Continues running text; trained on blocks of {config.block_size} tokens.\n\nMeasure its perplexity on a "
        "text:\n\n    python evaluate.py --run THIS_FOLDER --test_file FILE.txt"
    )
    save_trained(folder, model, tokenizer, task, use, config)


def load_language_model(
    folder: Path,
    device: torch.device | None = None,
    mixed_precision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A trained causal language model and its tokenizer; mixed_precision: unset, as trained."""
    options = trained_options(load_task(folder), mixed_precision, trust_remote_code)
    return load_model(folder, options, device).eval(), load_tokenizer(str(folder), options)


def save_chat_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, config: Any
) -> None:
    """A model trained on conversations: its template is the tokenizer's, and generation ends where an answer does."""
    tokenizer.chat_template = template.text
    task = {
        "task": CHAT,
        "chat_template": template.text,
        "chat_template_hash": template.hash,
    }
    asked = "\n".join(f"    {line}" for line in template.text_of([{"role": "user", "content": "..."}]).splitlines())
    use = f"Answers as in a conversation:\n\n{asked}\n\nChat with it:\n\n    python inference.py --run THIS_FOLDER"
    save_trained(folder, model, tokenizer, task, use, config)
    generation = copy.deepcopy(model.generation_config)
    generation.eos_token_id = end_ids(model, template)
    if not generation.do_sample:  # transformers refuses to save sampling settings beside it; some models ship them
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(generation, name, None)
    generation.save_pretrained(folder)


def load_chat_model(
    folder: Path,
    device: torch.device | None = None,
    mixed_precision: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ChatTemplate]:
    """A model trained on conversations, its tokenizer, and the template it was trained with.

    chat_template: another one, as `--chat_template` names it; a warning on stderr says so, as answers may suffer.
    """
    task = load_task(folder)
    options = trained_options(task, mixed_precision, trust_remote_code)
    tokenizer = load_tokenizer(str(folder), options)
    template = ChatTemplate(tokenizer, task["chat_template"], f"the chat template of {folder}")
    if chat_template or tokenizer.chat_template != task["chat_template"]:
        other = choose_template(tokenizer, chat_template)
        if other.hash != task["chat_template_hash"]:
            warn(f"{other.source} is not the chat template that {folder} was trained with, so answers may be worse.")
            template = other
    model = load_model(folder, options, device).eval()
    with damage_named(folder):
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    model.generation_config.eos_token_id = end_ids(model, template)
    return model, tokenizer, template


def add_adapter(model: Any, folder: Path, name: str) -> None:
    """Puts the adapter of another run beside that of a loaded model, for `model.set_adapter(name)`."""
    with damage_named(folder):
        lora = peft.PeftConfig.from_pretrained(str(folder))
        lora.base_model_name_or_path = None
        model.add_adapter(name, lora)
        found: Any = peft.set_peft_model_state_dict(
            model, peft.load_peft_weights(str(folder), device="cpu"), adapter_name=name
        )
    lacking = [key for key in found.missing_keys if f".{name}." in key]
    if lacking or found.unexpected_keys:
        raise InputError(
            f"{folder}: the adapter does not fit the base: {', '.join([*lacking, *found.unexpected_keys][:3])}."
        )
    leave_casts_to_autocast(model).eval()


def save_classifier(folder: Path, classifier: Classifier, config: Any, task_name: str = CLASSIFICATION) -> None:
    """A trained classifier, as `load_classifier` reads it."""
    prompt = classifier.prompt
    task = {
        "task": task_name,
        "approach": "head" if classifier.head else "generative",
        "encoder": classifier.encoder,
        "labels": prompt.labels,
        "multi_label": prompt.multi_label,
        "template": prompt.template,
        "few_shot": prompt.few_shot,
        "max_length": prompt.max_length,
        "answer_tokens": prompt.answer_tokens,
        "prompt_hash": prompt.hash,
    }
    answer = "any number of labels" if prompt.multi_label else "one label"
    way = "with a classification head" if classifier.head else "by writing its labels after the prompt below"
    labels = "\n".join(f"- {markdown(label)}" for label in prompt.labels)
    shown = "\n".join(f"    {printable(line)}" for line in prompt.template.splitlines())
    use = (
        f"Answers a text with {answer}, {way}.\n\nLabels:\n\n{labels}\n\nPrompt:\n\n{shown}\n\n"
        "Evaluate it on a file with the same columns:\n\n    python evaluate.py --run THIS_FOLDER --test_file FILE"
    )
    tokenizer = classifier.tokenizer
    if classifier.head:
        tokenizer = pad_beside_end(tokenizer)
        if config.full_finetuning:
            stored_model(classifier.model).config.get_text_config().pad_token_id = tokenizer.pad_token_id
    save_trained(folder, classifier.model, tokenizer, task, use, config)


def pad_beside_end(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer of a head, whose pad token is not the end token; a copy if it has to be changed.

    transformers reads a head at the last token that is not the pad token, and our texts end with the end token. Which
    other token pads does not matter, as none comes last.
    """
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    special = tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens
    others = (*special, *tokenizer.convert_ids_to_tokens([0, 1]))
    tokenizer.pad_token = next(token for token in others if token not in (None, tokenizer.eos_token))
    return tokenizer


def load_classifier(
    folder: Path,
    device: torch.device | None = None,
    mixed_precision: str | None = None,
    trust_remote_code: bool = False,
) -> Classifier:
    """A trained classifier for inference; mixed_precision: unset, as trained.

    Raises InputError where trained weights are missing, or labels or prompt were changed after training.
    """
    task = load_task(folder)
    options = trained_options(task, mixed_precision, trust_remote_code)
    head, encoder = task["approach"] == "head", task["encoder"]
    tokenizer = load_tokenizer(str(folder), options)
    fields_of_prompt = ("labels", "multi_label", "template", "few_shot", "max_length", "answer_tokens")
    prompt = classification_prompt(tokenizer, encoder, **{name: task[name] for name in fields_of_prompt})
    if prompt.hash != task["prompt_hash"]:
        raise InputError(
            f"{folder / TASK_FILE} was changed after training: labels or prompt no longer fit the weights."
        )
    labels = task["labels"] if head else None
    base: nn.Module = load_model(folder, options, device, labels=labels, multi_label=task["multi_label"])
    model = HeadClassifier(base, encoder) if head else base
    return Classifier(model.eval(), prompt, tokenizer)
