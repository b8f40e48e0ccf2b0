"""Base models (bf16, fp16, fp32, NF4, 8-bit), their tokenizers, the precision they run in, and counts of weights."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from common.disk import TASK_FILE, damage_named
from common.errors import InputError
from common.log import uses_cuda
from common.model import attention
from common.options import LoopConfig, ModelConfig

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Encoders whose first position has the number after that of the padding.
AFTER_PADDING = ("camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta",
                 "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod")  # fmt: skip

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)


def resolve_options(config: Any, encoder: bool, head: bool = False) -> None:
    """Fills in what is unset of --load_in_4bit, --mixed_precision and --bnb_4bit_compute_dtype.

    4-bit for decoders with LoRA. bf16 where the device multiplies it fast (a CPU: AMX or AVX512-BF16), else fp16 on a
    GPU, else fp32. Raises InputError for a 4-bit encoder, and for an encoder that should generate.
    """
    if encoder and not head:
        raise InputError(
            f"--model {config.model} is an encoder and cannot write text: use train_cls.py with --approach head."
        )
    if encoder and (config.load_in_4bit or config.load_in_8bit):
        raise InputError(
            f"--model {config.model} is an encoder, and those are trained unquantized: drop --load_in_*bit."
        )
    if config.load_in_4bit is None:
        config.load_in_4bit = not (encoder or config.full_finetuning or config.load_in_8bit)
    if config.mixed_precision is None:
        if uses_cuda():
            config.mixed_precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
            config.mixed_precision = "bf16" if fast else "no"
    if config.bnb_4bit_compute_dtype is None and config.load_in_4bit:
        config.bnb_4bit_compute_dtype = str(DTYPES[config.mixed_precision]).removeprefix("torch.")


@contextlib.contextmanager
def _loading(path: str, config: ModelConfig) -> Iterator[None]:
    """Says which model cannot be loaded: a missing package or file, an unknown architecture, code that is not run."""
    try:
        with damage_named(Path(path)):
            yield
    except (ImportError, OSError, ValueError, KeyError) as error:
        name = path if (Path(path) / TASK_FILE).is_file() else f"--model {config.model}"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{name} could not be loaded ({reason}).") from error


def read_config(path: str, config: ModelConfig) -> transformers.PretrainedConfig:
    """The config.json of a base model or a run."""
    with _loading(path, config):
        return transformers.AutoConfig.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )


def is_encoder(path: str, config: ModelConfig) -> bool:
    """Whether the model attends in both directions (BERT-like), judged by its having a masked-LM class."""
    return read_config(path, config).model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def load_tokenizer(path: str, config: ModelConfig) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a base model or a run; one without a pad token pads with the end token, masked by position."""
    with _loading(path, config):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def start_ids(tokenizer: transformers.PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: a BOS, or nothing."""
    return [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id]


def check_length(path: str, config: Any, tokens: int, option: str) -> None:
    """Raises InputError where rows of this many `tokens` (set by `option`) need more positions than the model has."""
    text = read_config(path, config).get_text_config()
    most = getattr(text, "max_position_embeddings", None) or tokens
    if text.model_type in AFTER_PADDING:
        most -= text.pad_token_id + 1
    if tokens > most:
        raise InputError(f"{option}: rows of {tokens} tokens are longer than the {most} positions of {config.model}.")


def load_base(
    path: str,
    config: Any,
    *,
    labels: list[str] | None = None,
    multi_label: bool = False,
    device: Any = None,
    as_stored: bool = False,
) -> tuple[transformers.PreTrainedModel, list[str]]:
    """The base model, and the names of the modules that its checkpoint lacks (a new head, a new pooler).

    labels: loads a sequence classifier with one output per label instead of a causal language model. as_stored: in the
    dtype of the files, as trained weights are. device: with --shard_model, the model is left on the CPU, as it may not
    fit there before it is sharded.
    """
    if isinstance(config, LoopConfig) and config.shard_model:
        device = "cpu"
    dtype = torch.float32 if config.full_finetuning else DTYPES[config.mixed_precision]
    quantized = config.load_in_4bit or config.load_in_8bit
    options: dict[str, Any] = {
        "dtype": "auto" if as_stored else dtype,
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
    stored_quantized = bool(getattr(read_config(path, config), "quantization_config", None))
    movable = not (quantized or stored_quantized)
    if not movable:  # one complete model per process
        options["device_map"] = {"": device or "cpu"}
    if stored_quantized:
        if labels:
            raise InputError(
                f"--model {config.model} is stored quantized, and its settings would quantize the new head as well. "
                "Use the unquantized model: --load_in_4bit true quantizes it while loading."
            )
    elif quantized:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=config.load_in_4bit,
            load_in_8bit=config.load_in_8bit,
            bnb_4bit_quant_type=config.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=config.bnb_4bit_compute_dtype,
        )
    kind: Any = transformers.AutoModelForSequenceClassification if labels else transformers.AutoModelForCausalLM
    with _loading(path, config):
        model, info = kind.from_pretrained(path, **options)
    model.config.use_cache = False
    if labels and hasattr(model, "score"):
        model.score.float()  # before trained weights come in, which are in fp32
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks a layer's weights at its first pass in eval mode, and then has
        # no gradient: training would go on after an evaluation with broken gradients, and only a warning.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if movable:
        model.to(device or "cpu")
    if not config.attn_implementation:
        attention.use(model)
    return model, sorted({name.rpartition(".")[0] for name in info["missing_keys"]})


def precision(device: torch.device, mixed_precision: str) -> contextlib.AbstractContextManager:
    """The context that a model trained or loaded with --mixed_precision computes in."""
    if mixed_precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[mixed_precision])


def unpacked_size(parameter: nn.Parameter) -> int:
    """The number of weights in a parameter; a 4-bit one stores two per byte."""
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed is not None else parameter.numel()


def census(model: nn.Module) -> dict[str, Any]:
    """Parameters by group (base, LoRA, trained in full) and dtype; 4-bit weights are counted unpacked.

    What PEFT keeps of a module that is trained in full, to switch the adapter off, is not counted.
    """
    counts: Counter[tuple[str, str]] = Counter()
    trainable = 0
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        packed = getattr(parameter, "quant_state", None)
        number = unpacked_size(parameter)
        kind = "LoRA" if "lora_" in name else "trained in full" if parameter.requires_grad else "base"
        dtype = packed.quant_type if packed is not None else str(parameter.dtype).removeprefix("torch.")
        counts[kind, dtype] += number
        trainable += number * parameter.requires_grad
    total = sum(counts.values())
    groups = [{"group": group, "dtype": dtype, "parameters": n} for (group, dtype), n in sorted(counts.items())]
    return {"groups": groups, "total": total, "trainable": trainable}
