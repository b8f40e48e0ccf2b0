"""Base models (bf16, fp16, fp32, NF4), tokenizers, LoRA, and the census of a model's weights."""

import contextlib
import logging
import os
import warnings
from collections import Counter
from functools import partial
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
from transformers.pytorch_utils import Conv1D  # noqa: E402

from common import attention, lean  # noqa: E402
from common.config import InputError, ModelConfig  # noqa: E402
from common.prompts import ClassificationPrompt  # noqa: E402
from common.token_losses import TokenLosses  # noqa: E402

LORA_INITS = {"true": True, "false": False, **{name: name for name in ("gaussian", "orthogonal", "pissa", "olora")}}
BASE_CHANGING_INITS = ("pissa", "olora")  # these move a part of the base weights into the adapter
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)


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


def start_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts in front of a text: a BOS, or nothing."""
    return [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id]


def check_length(path: str, config: Any, tokens: int, option: str) -> None:
    """Refuses rows of so many `tokens` (by --`option`) if the model has fewer positions."""
    loaded = transformers.AutoConfig.from_pretrained(
        path, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    most = getattr(loaded.get_text_config(), "max_position_embeddings", None) or tokens
    if tokens > most:
        raise InputError(f"{option}: rows of {tokens} tokens are longer than the {most} positions of {config.model}.")


def classification_prompt(tokenizer: Any, encoder: bool, **fields: Any) -> ClassificationPrompt:
    """A prompt renderer with the tokenizer's own special ids: BOS in front, the end token behind an answer.

    Encoders get their own pair ([CLS] ... [SEP]); a decoder with a head reads the end token that closes the text.
    """
    if encoder:
        special = tokenizer("")["input_ids"]
        start, end = special[:1], special[-1:]
    else:
        if tokenizer.eos_token_id is None:
            raise InputError("The tokenizer has no end token (eos), so an answer could not end.")
        start, end = start_ids(tokenizer), [tokenizer.eos_token_id]

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
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks a layer's weights at its first pass in eval mode, and then has
        # no gradient: training would go on after an evaluation with broken gradients, and only a warning.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if not quantised:
        model.to(device or "cpu")
    if not config.attn_implementation:
        attention.use(model)
    lean.use(model)
    return model, sorted({name.rpartition(".")[0] for name in info["missing_keys"]})


def add_lora(model: nn.Module, config: Any, missing: list[str], head: bool) -> nn.Module:
    """The model with an adapter of fp32 weights; `missing` modules are trained whole and saved with it."""
    if config.init_lora_weights not in LORA_INITS:
        raise InputError(
            f"--init_lora_weights {config.init_lora_weights}: expected {', '.join(LORA_INITS)}. PEFT's other ones need "
            "a pass over data, or are drawn anew when the adapter is loaded."
        )
    targets = config.target_modules if config.target_modules != ["all-linear"] else None
    kinds = nn.Linear | Conv1D  # GPT-2's linear layers
    linear = {name for name, module in model.named_modules() if isinstance(module, kinds) and name not in missing}
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
            exclude_modules=_towers(model, linear) or None,
            modules_to_save=list(missing) or None,  # a copy: PEFT adds names of its own
        )
        model = peft.get_peft_model(model, lora)
    except (TypeError, ValueError) as error:
        raise InputError(f"The adapter could not be added: {error}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return leave_casts_to_autocast(model)


def _towers(model: nn.Module, linear: set[str]) -> list[str]:
    """The linear layers that see pictures or sound: no text reaches them, and DDP would wait for their gradients."""
    if not any(hasattr(model.config, f"{kind}_config") for kind in ("vision", "audio")):
        return []
    text = [model.get_decoder(), model.get_output_embeddings()]
    inside = {f"{name}." for name, module in model.named_modules() if any(module is part for part in text)}
    return sorted(name for name in linear if not f"{name}.".startswith(tuple(inside)))


def leave_casts_to_autocast(model: nn.Module) -> nn.Module:
    """PEFT casts a layer's input to the adapter's fp32, and autocast casts it back: two copies for nothing.

    So a model in bf16 or fp16 works under `accelerator.autocast()` only.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
    return model


def stored_model(model: nn.Module) -> nn.Module:
    """The library's model, which is what is saved, inside a forward module of ours."""
    return model.model if isinstance(model, HeadClassifier | TokenLosses) else model


def is_adapted(model: nn.Module) -> bool:
    """Whether the model carries an adapter that can be switched off."""
    return isinstance(model, peft.PeftModel)


@contextlib.contextmanager
def without_adapter(model: nn.Module):
    """The untrained base inside the block."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    with model.disable_adapter() if isinstance(model, peft.PeftModel) else contextlib.nullcontext():
        yield
    for parameter in frozen:  # PEFT makes all of an adapter trainable when it is switched on again
        parameter.requires_grad_(False)


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
