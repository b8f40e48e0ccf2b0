"""Adapters: LoRA added to a base model, switched off and on."""

import contextlib
from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.errors import InputError
from common.options import BASE_CHANGING_INITS

LORA_INITS: dict[str, Any] = {
    "true": True,
    "false": False,
    **{name: name for name in ("gaussian", "orthogonal", "pissa", "olora")},
}


def make_trainable(model: PreTrainedModel, config: Any, missing: list[str], head: bool = False) -> PreTrainedModel:
    """The model with an adapter, or with --full_finetuning all its own weights, trained; gradient checkpointing set.

    missing: modules that the checkpoint lacks (a new head), trained in full. head: whether it is a classifier.
    """
    if config.full_finetuning:
        for parameter in outside_text(model):  # DDP would wait for their gradients
            parameter.requires_grad_(False)
    else:
        model = add_lora(model, config, missing, head)  # PEFT's wrapper passes the model's attributes on
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def add_lora(model: Any, config: Any, missing: list[str], head: bool) -> Any:
    """The model with an adapter of fp32 weights; `missing` modules are trained in full and saved with it.

    Raises InputError for layers that the model does not have, and for what PEFT refuses.
    """
    if config.init_lora_weights not in LORA_INITS:
        raise InputError(
            f"--init_lora_weights {config.init_lora_weights}: expected {', '.join(LORA_INITS)}. PEFT's other ones need "
            "a pass over data, or are drawn again when the adapter is loaded."
        )
    if config.init_lora_weights in BASE_CHANGING_INITS and (config.load_in_4bit or config.load_in_8bit):
        raise InputError(
            f"--init_lora_weights {config.init_lora_weights} changes the weights of the base, which would be quantized "
            "a second time: set --load_in_4bit false."
        )
    targets = config.target_modules if config.target_modules != ["all-linear"] else None
    kinds = nn.Linear | Conv1D  # GPT-2's linear layers
    linear = {name for name, module in model.named_modules() if isinstance(module, kinds) and name not in missing}
    upper, adaptable = dict[str, Any](), linear
    if config.train_layers:
        stack, upper = _upper_layers(model, config.train_layers)
        adaptable = {name for name in linear if f".{stack}." in f".{name}"}
    known = sorted({name.rpartition(".")[2] for name in adaptable})
    for target in targets or []:
        if not any(f".{name}".endswith(f".{target}") for name in adaptable):
            where = f" in the upper {config.train_layers} layers" if config.train_layers else ""
            raise InputError(
                f"--target_modules {target}: no linear layer{where} has this name; there are {', '.join(known)}."
            )
    if config.train_layers:
        targets = targets or known
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
            **upper,
        )
        model = peft.get_peft_model(model, lora)
    except (TypeError, ValueError) as error:
        raise InputError(f"The adapter could not be added: {error}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return leave_casts_to_autocast(model)


def _upper_layers(model: PreTrainedModel, count: int) -> tuple[str, dict[str, Any]]:
    """The name of the list of layers, and PEFT's options for the last `count` of them."""
    stack, layers = layer_stack(model)
    if count > len(layers):
        raise InputError(f"--train_layers {count}: the model has {len(layers)} layers.")
    stack = stack.rpartition(".")[2]
    return stack, {"layers_to_transform": list(range(len(layers) - count, len(layers))), "layers_pattern": stack}


def layer_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the layers that text passes, and its name. Raises InputError for layers that share their weights."""
    number = model.config.get_text_config().num_hidden_layers
    for name, part in (model.get_decoder() or model).named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == number:
            return name, part
    raise InputError("The layers of this model cannot be told apart: drop --train_layers and --shard_model.")


def outside_text(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights that no text reaches, of towers for pictures or sound."""
    if not _has_towers(model):
        return []
    text = {parameter for part in _text_parts(model) for parameter in part.parameters()}
    return [parameter for parameter in model.parameters() if parameter not in text]


def _towers(model: PreTrainedModel, linear: set[str]) -> list[str]:
    """The linear layers that see pictures or sound: no text reaches them, and DDP would wait for their gradients."""
    if not _has_towers(model):
        return []
    text = _text_parts(model)
    inside = {f"{name}." for name, module in model.named_modules() if any(module is part for part in text)}
    return sorted(name for name in linear if not f"{name}.".startswith(tuple(inside)))


def _has_towers(model: PreTrainedModel) -> bool:
    return any(hasattr(model.config, f"{kind}_config") for kind in ("vision", "audio"))


def _text_parts(model: PreTrainedModel) -> list[nn.Module]:
    parts = model.get_decoder(), model.get_output_embeddings(), getattr(model, "score", None)
    return [part for part in parts if part is not None]


def leave_casts_to_autocast(model: nn.Module) -> Any:
    """Stops PEFT from casting a layer's input to the adapter's fp32, which autocast would cast back.

    So a model in bf16 or fp16 works under autocast only.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
    return model


def is_adapted(model: nn.Module) -> bool:
    """Whether the model carries an adapter that can be switched off."""
    return _adapted(model) is not None


def _adapted(model: nn.Module) -> peft.PeftModel | None:
    """The model with an adapter, inside a forward module of ours or a wrapper of Accelerate as well."""
    return next((module for module in model.modules() if isinstance(module, peft.PeftModel)), None)


def remove_adapter(model: nn.Module) -> Any:
    """The untrained base of a model, whose adapter is gone after it; of one without an adapter, the model."""
    adapted = _adapted(model)
    return adapted.unload() if adapted else model


@contextlib.contextmanager
def without_adapter(model: nn.Module):
    """The untrained base inside the block."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    adapted = _adapted(model)
    with adapted.disable_adapter() if adapted else contextlib.nullcontext():
        yield
    for parameter in frozen:  # PEFT makes all of an adapter trainable when it is switched on again
        parameter.requires_grad_(False)
