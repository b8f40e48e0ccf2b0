"""A trained run as one model of plain layers, which any program loads: the adapter added into the weights of its base.

An adapter learns beside the base as it was loaded, so it is added to exactly those weights: of a 4-bit or 8-bit base,
to what its codes stand for. PEFT's own merge into a quantized layer would quantize the sum again, which changes it.
"""

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from common.errors import InputError
from common.hub import resolve_model
from common.memory import give_back
from common.model import storage
from common.model.base_model import load_base


def merged_model(folder: Path, options: storage.TrainedOptions, dtype: torch.dtype, **kind: Any) -> PreTrainedModel:
    """Base and trained weights in one model, in `dtype`, on the CPU.

    folder: of the trained weights. kind: `labels` and `multi_label` of a classification head (base_model.load_base).
    The sum of a layer and its adapter is taken in fp32; beside the base, one layer at a time is in memory in fp32.
    Raises InputError for a base that is quantized by another method than bitsandbytes, whose weights are not known.
    """
    model: Any
    if options.full_finetuning:
        model = storage.load_model(folder, options, **kind)
        return model.to(dtype)
    model, _ = load_base(resolve_model(options.model, options.revision), options, **kind)
    if options.load_in_4bit or options.load_in_8bit:
        model = model.dequantize(model.dtype)
        give_back(model.device.type)
    elif getattr(model, "quantization_method", None):
        raise InputError(
            f"{options.model} is stored quantized ({model.quantization_method.value}), and an adapter cannot be added "
            "to such weights. Serve the adapter beside it, or train on the unquantized model."
        )
    adapted = storage.with_adapter(model, folder)
    embeddings = model.get_input_embeddings()
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            base: Any = layer.get_base_layer()
            if base.weight is getattr(embeddings, "weight", None):  # of an adapted output layer; the input has none
                base.weight = nn.Parameter(base.weight.data)
                model.config.tie_word_embeddings = False
            base.weight.data = base.weight.data.float()
            layer.merge(safe_merge=True)
            base.weight.data = base.weight.data.to(dtype)
            give_back(base.weight.device.type)
    merged: Any = adapted.unload()
    merged.config.use_cache = True
    return merged.to(dtype)


def plain_weight(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A weight of a layer; of a 4-bit or 8-bit one, what its codes stand for."""
    if weight.is_floating_point():
        return weight
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(weight, getattr(layer, "state", None))  # type: ignore[arg-type]
