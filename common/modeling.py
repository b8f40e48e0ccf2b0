"""Base models (bf16, fp16, fp32, NF4), tokenizers, LoRA, reloading a trained run, and the census of its weights."""

import contextlib
import json
import logging
import os
import warnings
from collections import Counter
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

# bitsandbytes reports at import that an optional kernel package is missing, which changes nothing for a user.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from torch import nn  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES  # noqa: E402

from common import attention  # noqa: E402
from common.config import InputError, ModelConfig  # noqa: E402
from common.demo_model import resolve_model  # noqa: E402
from common.prompts import ClassificationPrompt  # noqa: E402
from common.scoring import Classifier  # noqa: E402

TASK_FILE = "task.json"
LORA_INITS = {"true": True, "false": False, **{name: name for name in ("gaussian", "orthogonal", "pissa", "olora")}}
BASE_CHANGING_INITS = ("pissa", "olora")  # these move a part of the base weights into the adapter
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)


@dataclass
class TrainedOptions(ModelConfig):
    """How a trained model is loaded again."""

    mixed_precision: str = "no"
    full_finetuning: bool = False


class HeadClassifier(nn.Module):
    """A sequence classifier that reads a decoder's hidden state at one given position of each row.

    transformers' own pooling looks for the last id that is not the pad id, which is the wrong token where a text ends
    with that id (pad == eos); here the position comes from the collator. Encoders pool in their own way.
    """

    def __init__(self, model: nn.Module, encoder: bool) -> None:
        super().__init__()
        self.model, self.encoder = model, encoder

    def forward(
        self,
        input_ids: torch.Tensor,  # [rows, length], or a shared-prefix pack (common/collate.py)
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        pool: torch.Tensor,  # [rows], the positions in the flattened batch whose hidden states are classified
    ) -> torch.Tensor:  # [rows, labels], fp32
        base = self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model
        if self.encoder:
            return base(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        hidden = getattr(base, base.base_model_prefix)(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return base.score(hidden.flatten(0, 1)[pool]).float()


def resolve_options(config: Any, encoder: bool) -> None:
    """Fills in what is unset of --load_in_4bit, --mixed_precision and --bnb_4bit_compute_dtype.

    4-bit for decoders with LoRA. bf16 where the device multiplies it fast (a CPU: AMX or AVX512-BF16), else fp16 on a
    GPU, else fp32. Raises InputError for a 4-bit encoder, and for an encoder that should generate.
    """
    if encoder and config.approach == "generative":
        raise InputError(f"--model {config.model} is an encoder and cannot answer in text: use --approach head.")
    if encoder and (config.load_in_4bit or config.load_in_8bit):
        raise InputError(
            f"--model {config.model} is an encoder, and those are trained unquantised: drop --load_in_*bit."
        )
    if config.load_in_4bit is None:
        config.load_in_4bit = not (encoder or config.full_finetuning or config.load_in_8bit)
    if config.mixed_precision is None:
        if torch.cuda.is_available():
            config.mixed_precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
            config.mixed_precision = "bf16" if fast else "no"
    if config.bnb_4bit_compute_dtype is None and config.load_in_4bit:
        config.bnb_4bit_compute_dtype = str(DTYPES[config.mixed_precision]).removeprefix("torch.")


def is_encoder(path: str, config: ModelConfig) -> bool:
    """Whether the model attends in both directions (BERT-like), judged by its having a masked-LM class."""
    loaded = transformers.AutoConfig.from_pretrained(
        path, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    return loaded.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def load_tokenizer(path: str, config: ModelConfig) -> Any:
    """The tokenizer of a base model or a run; one without a pad token pads with the end token, masked by position."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        path, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def classification_prompt(tokenizer: Any, encoder: bool, **fields: Any) -> ClassificationPrompt:
    """A prompt renderer with the tokenizer's own special ids: BOS in front, the end token behind an answer.

    Encoders get their own pair ([CLS] ... [SEP]); a decoder with a head reads the end token that closes the text.
    """
    special = tokenizer("")["input_ids"]
    if encoder:
        start, end = special[:1], special[-1:]
    else:
        if tokenizer.eos_token_id is None:
            raise InputError("The tokenizer has no end token (eos), so an answer could not end.")
        start, end = [i for i in special if i == tokenizer.bos_token_id], [tokenizer.eos_token_id]

    def encode(text: str, plain: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]

    return ClassificationPrompt(encode, start=start, end=end, encode_text=partial(encode, plain=True), **fields)


def load_base(
    path: str, config: Any, *, labels: list[str] | None = None, multi_label: bool = False, device: Any = None
) -> tuple[nn.Module, list[str]]:
    """The base model, and the names of the modules that its checkpoint lacks (a new head, a new pooler).

    labels: loads a sequence classifier with one output a label instead of a causal language model.
    """
    quantised = config.load_in_4bit or config.load_in_8bit
    options: dict[str, Any] = {
        "dtype": torch.float32 if config.full_finetuning else DTYPES[config.mixed_precision],
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "output_loading_info": True,
    }
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if labels:
        options |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": f"{'multi' if multi_label else 'single'}_label_classification",
        }
    loaded = transformers.AutoConfig.from_pretrained(
        path, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    if getattr(loaded, "quantization_config", None):
        if labels:
            raise InputError(
                f"--model {config.model} is stored quantised, and its settings would quantise the new head as well. "
                "Use the unquantised model: --load_in_4bit true quantises it while loading."
            )
    elif quantised:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=config.load_in_4bit,
            load_in_8bit=config.load_in_8bit,
            bnb_4bit_quant_type=config.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=config.bnb_4bit_compute_dtype,
        )
        options["device_map"] = {"": device or "cpu"}  # one whole model a process: quantised weights cannot be moved
    kind = transformers.AutoModelForSequenceClassification if labels else transformers.AutoModelForCausalLM
    try:
        model, info = kind.from_pretrained(path, **options)
    except (ImportError, OSError, ValueError) as error:  # a missing package or weight file, an unknown architecture
        raise InputError(f"--model {config.model} could not be loaded: {error}") from error
    model.config.use_cache = False
    if not config.attn_implementation:
        attention.use(model)
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks a layer's weights at its first pass in eval mode, and then has
        # no gradient: training would go on after an evaluation with broken gradients, and only a warning.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    missing = sorted({name.rpartition(".")[0] for name in info["missing_keys"]})
    return model if quantised else model.to(device or "cpu"), missing


def add_lora(model: nn.Module, config: Any, missing: list[str], head: bool) -> nn.Module:
    """The model with an adapter of fp32 weights; `missing` modules are trained whole and saved with it."""
    if config.init_lora_weights not in LORA_INITS:
        raise InputError(
            f"--init_lora_weights {config.init_lora_weights}: expected {', '.join(LORA_INITS)}. PEFT's other ones need "
            "a pass over data, or are drawn anew when the adapter is loaded."
        )
    targets = config.target_modules if config.target_modules != ["all-linear"] else None
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in missing}
    for target in targets or []:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise InputError(f"--target_modules {target}: no linear layer has this name; there are {', '.join(known)}.")
    try:
        lora = peft.LoraConfig(
            task_type="SEQ_CLS" if head else "CAUSAL_LM",
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets or "all-linear",
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            init_lora_weights=LORA_INITS[config.init_lora_weights],
            modules_to_save=list(missing) or None,  # a copy: PEFT adds names of its own
        )
        model = peft.get_peft_model(model, lora)
    except (TypeError, ValueError) as error:
        raise InputError(f"The adapter could not be added: {error}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return _leave_casts_to_autocast(model)


def _leave_casts_to_autocast(model: nn.Module) -> nn.Module:
    """PEFT casts a layer's input to the adapter's fp32, and autocast casts it back: two copies for nothing.

    So a model in bf16 or fp16 works under `accelerator.autocast()` only.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
    return model


def save_weights(model: nn.Module, folder: Path) -> None:
    """The adapter (with the modules trained whole), or the full model, as safetensors in the library's own format."""
    model = model.model if isinstance(model, HeadClassifier) else model
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    else:
        model.save_pretrained(folder)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Puts weights that `save_weights` wrote back into the same model."""
    model = model.model if isinstance(model, HeadClassifier) else model
    if isinstance(model, peft.PeftModel):
        _check_complete(model, folder)
        weights = peft.load_peft_weights(str(folder), device="cpu")
        peft.set_peft_model_state_dict(model, weights)
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


def save_trained(folder: Path, classifier: Classifier, config: Any) -> None:
    """Weights, tokenizer and task.json: with the base model, all that is needed to use the classifier."""
    folder.mkdir(parents=True)
    prompt = classifier.prompt
    save_weights(classifier.model, folder)
    classifier.tokenizer.save_pretrained(folder)
    task = {
        "task": "classification",
        "approach": "head" if classifier.head else "generative",
        "encoder": classifier.encoder,
        "labels": prompt.labels,
        "multi_label": prompt.multi_label,
        "thresholds": classifier.thresholds,
        "template": prompt.template,
        "few_shot": prompt.few_shot,
        "max_length": prompt.max_length,
        "answer_tokens": prompt.answer_tokens,
        "prompt_hash": prompt.hash,
        "full_finetuning": config.full_finetuning,
        "mixed_precision": config.mixed_precision,
        "model_options": {item.name: getattr(config, item.name) for item in fields(ModelConfig)},
    }
    (folder / TASK_FILE).write_text(json.dumps(task, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(_model_card(task, config), encoding="utf-8")


def _model_card(task: dict[str, Any], config: Any) -> str:
    """What the weights are and how to use them; figures stand in the run's eval folder, where they were measured."""
    answer = "any number of labels" if task["multi_label"] else "one label"
    way = "with a classification head" if task["approach"] == "head" else "by writing its labels after the prompt below"
    quantised = "8-bit " if config.load_in_8bit else f"4-bit {config.bnb_4bit_quant_type} " * config.load_in_4bit
    trained = (
        "All its weights were trained."
        if config.full_finetuning
        else f"Trained with LoRA (r {config.lora_r}, alpha {config.lora_alpha:g}) on its {quantised}weights; this "
        "folder holds the adapter alone."
    )
    labels = "\n".join(f"- {label}" for label in task["labels"])
    prompt = "\n".join(f"    {line}" for line in task["template"].splitlines())
    return (
        f"---\nbase_model: {json.dumps(config.model)}\ntags: [text-classification, plainlora]\n---\n"
        f"# Text classifier from {config.model}\n\nAnswers a text with {answer}, {way}. {trained} Learning rate "
        f"{config.learning_rate:g}, seed {config.seed}; all options are in `config.yaml` of the run folder, the "
        f"measured quality in `eval/`.\n\nLabels:\n\n{labels}\n\nPrompt:\n\n{prompt}\n\n"
        "Evaluate it on a file with the same columns:\n\n    python evaluate.py --run THIS_FOLDER --test_file FILE\n"
    )


def load_trained(folder: Path, device: Any = None, mixed_precision: str | None = None) -> Classifier:
    """A trained classifier for inference; mixed_precision: unset, as trained.

    Raises InputError where trained weights are missing, or labels or prompt were changed after training.
    """
    task = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
    config = TrainedOptions(
        **task["model_options"],
        mixed_precision=mixed_precision or task["mixed_precision"],
        full_finetuning=task["full_finetuning"],
    )
    head, encoder = task["approach"] == "head", task["encoder"]
    tokenizer = load_tokenizer(str(folder), config)
    names = ("labels", "multi_label", "template", "few_shot", "max_length", "answer_tokens")
    prompt = classification_prompt(tokenizer, encoder, **{name: task[name] for name in names})
    if prompt.hash != task["prompt_hash"]:
        raise InputError(
            f"{folder / TASK_FILE} was changed after training: labels or prompt no longer fit the weights."
        )
    path = str(folder) if config.full_finetuning else resolve_model(config.model, config.revision)
    labels = task["labels"] if head else None
    model, missing = load_base(path, config, labels=labels, multi_label=task["multi_label"], device=device)
    if config.full_finetuning:
        if missing:
            raise InputError(f"{folder}: the trained weights of {', '.join(missing)} are missing.")
    else:
        lora = peft.PeftConfig.from_pretrained(str(folder))
        lora.base_model_name_or_path = None  # where the base was when it was trained
        model = peft.get_peft_model(model, lora)
        load_weights(model, folder)
        model = _leave_casts_to_autocast(model)
    if head:
        model = HeadClassifier(model, encoder)
    return Classifier(model.eval(), prompt, tokenizer, head, encoder, task["thresholds"])


@contextlib.contextmanager
def without_adapter(model: nn.Module):
    """The untrained base inside the block."""
    with model.disable_adapter() if isinstance(model, peft.PeftModel) else contextlib.nullcontext():
        yield


def unpacked_size(parameter: nn.Parameter) -> int:
    """The number of weights in a parameter; a 4-bit one stores two in a byte."""
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed is not None else parameter.numel()


def census(model: nn.Module) -> dict[str, Any]:
    """Parameters by group (base, LoRA, trained whole) and dtype; 4-bit weights are counted unpacked."""
    counts: Counter[tuple[str, str]] = Counter()
    trainable = 0
    for name, parameter in model.named_parameters():
        packed = getattr(parameter, "quant_state", None)
        number = unpacked_size(parameter)
        kind = "LoRA" if "lora_" in name else "trained whole" if parameter.requires_grad else "base"
        dtype = packed.quant_type if packed is not None else str(parameter.dtype).removeprefix("torch.")
        counts[kind, dtype] += number
        trainable += number * parameter.requires_grad
    total = sum(counts.values())
    groups = [{"group": group, "dtype": dtype, "parameters": n} for (group, dtype), n in sorted(counts.items())]
    return {"groups": groups, "total": total, "trainable": trainable}
