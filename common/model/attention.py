"""Attention of our own, under transformers' interface: packs, padding-free batches, fast products in bf16 on CPUs.

A shared-prefix pack is one sequence `[prefix][row 1][row 2]...` in which every row sees the prefix and itself, so that
what all rows begin with is computed once. The prompts `A B C D E` and `A B C F`, with `_` for padding, become a pack of
Layout(rows=2, prefix=3):

    input_ids      A B C   D E   _ F
    position_ids   0 1 2   3 4   3 3
    attention_mask         row 1           row 2           [rows, 1, row, prefix + row]
                           D: 1 1 1 1 0    _: 1 1 1 0 0    D sees A B C D, and no padding is seen
                           E: 1 1 1 1 1    F: 1 1 1 0 1    E sees A B C D E; F sees A B C F

The prefix attends to itself, causally; then each row attends to the prefix's keys and its own. A mask of the complete
sequence, [7, 7], would let the rows compute scores with each other only to throw them away.

A padding-free batch is one sequence `[row 1][row 2]...` in which a row sees itself only. The same prompts become one of
Layout(rows=2, lengths=(5, 4)), whose mask only says which tokens a row has, [rows, 1, 1, longest row]:

    input_ids      A B C D E   A B C F
    position_ids   0 1 2 3 4   0 1 2 3
    attention_mask 1 1 1 1 1   1 1 1 1 0

The layout is the keyword argument `layout` of the model's forward pass. Nearly all models of transformers hand such
arguments on to every layer, and so does gradient checkpointing; `_packs_work` finds out the others. A mask of four
dimensions they hand on as it is.

On CPUs torch's fused kernel multiplies bf16 at a fraction of the speed of a plain product, and transformers copies the
keys and values of grouped-query attention for every query head. `grouped_attention` stacks the query heads of a group
as further rows of two batched products instead, for as many rows or queries at a time as a cache holds the scores of.
Long sequences stay with torch's kernel. On CUDA, common/model/cuda.py computes a pack, or a padding-free batch, in one
kernel.
"""

import logging
import sys
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common.errors import InputError
from common.model import cuda
from common.text.batches import Layout, pack

NAME = "plainlora"
ALONE = "plainlora_alone"  # of models that take no packs
MAX_SCORES = 2**24  # of a row, or of all rows where they are kept for the backward pass: 32 MB per layer
SCORES_AT_ONCE = 2**20  # as many as fit in a core's cache
# torch 2.13 warns about nested tensors in general; the warning does not concern their use here.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def grouped_attention(
    query: torch.Tensor,  # [rows, heads, queries, size]
    key: torch.Tensor,  # [rows, key-value heads, keys, size]
    value: torch.Tensor,  # [rows, key-value heads, keys, size]
    mask: torch.Tensor | None,  # [rows or 1, 1, queries, keys], True where a query sees a key; None: causal
    scaling: float,
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:  # [rows, queries, heads, size]
    """softmax(query @ key^T * scaling + mask) @ value, in the tensors' own dtype.

    prefix: (key, value), each [1, key-value heads, length, size], of what is in front of every row and is seen by all
    its queries: one product for all rows, and no copy for each.
    Keys are centered first: a shift of all keys shifts all scores of a query alike, which the softmax does not see, and
    scores that a bias of the keys has made large would lose their digits in bf16.
    """
    rows, heads, queries, _ = query.shape
    keys, length = key.shape[2], prefix[0].shape[2] if prefix else 0
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        some = -(-SCORES_AT_ONCE // (heads * keys))
        if queries > some:  # a long row: what its first queries do not see is not computed
            parts = []
            for start in range(0, queries, some):
                part, seen = slice(start, start + some), keys - queries + start + some
                tensors = query[:, :, part], key[:, :, :seen], value[:, :, :seen], mask[part, :seen]
                parts.append(grouped_attention(*tensors, scaling))
            return torch.cat(parts, 1)
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    bias = bias.masked_fill(~mask, torch.finfo(query.dtype).min).expand(rows, 1, queries, keys)
    if prefix:
        center = prefix[0].mean(2, keepdim=True)
    else:  # of what the last query sees, so that padding does not matter, not even to the rounding
        visible = mask[..., -1:, :].to(key.dtype)
        center = (visible / visible.sum(-1, keepdim=True).clamp(min=1)) @ key
    if prefix:
        prefix = (prefix[0] - center)[0].transpose(1, 2), prefix[1][0]
    some = max(1, SCORES_AT_ONCE // (heads * queries * (length + keys)))
    some_rows = zip(*(tensor.split(some) for tensor in (query * scaling, key - center, value, bias)), strict=True)
    outputs = [_of_some_rows(q, k, v, b, prefix) for q, k, v, b in some_rows]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _of_some_rows(
    query: torch.Tensor,  # scaled
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,  # [rows, 1, queries, keys]
    prefix: tuple[torch.Tensor, torch.Tensor] | None,  # keys [shared heads, size, length], values [.., length, size]
) -> torch.Tensor:
    """Shared heads are the first dimension and rows the second, so that the scores of a head are adjacent in memory."""
    rows, _, queries, size = query.shape
    shared, keys = key.shape[1], key.shape[2]
    query = query.unflatten(1, (shared, -1)).transpose(0, 1).reshape(shared * rows, -1, size)
    key, value = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (key, value))
    scores = torch.bmm(query, key.transpose(1, 2)).view(shared, rows, -1, queries, keys) + bias
    scores = scores.view(shared, -1, keys)
    if prefix:
        scores = torch.cat([torch.bmm(query.view(shared, -1, size), prefix[0]), scores], 2)
    weights = scores.softmax(2)
    output = torch.bmm(weights[..., -keys:].reshape(shared * rows, -1, keys), value)
    if prefix:
        output = output.view(shared, -1, value.shape[2]) + torch.bmm(weights[..., :-keys], prefix[1])
    return output.view(shared, rows, -1, queries, value.shape[2]).permute(1, 3, 0, 2, 4).flatten(2, 3)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of independent rows, which may all follow one `prefix` (see `grouped_attention`), in the faster way."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None:
        masked = attention_mask.dtype == torch.bool
    else:
        masked = causal and query.shape[2] in (1, key.shape[2])  # a static cache has empty places after the queries
    length = prefix[0].shape[2] if prefix else 0
    kept = len(query) if torch.is_grad_enabled() else 1
    scores = kept * query.shape[1:3].numel() * (length + key.shape[2])
    slow = query.dtype == torch.bfloat16 and query.device.type == "cpu"  # with torch's kernel
    if slow and masked and scores <= MAX_SCORES and not dropout and _is_plain(kwargs):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = attention_mask if attention_mask is None else attention_mask[..., length:]
        return grouped_attention(query, key, value, mask, scaling, prefix), None
    if prefix:
        key, value = (
            torch.cat([first.expand(len(rest), -1, -1, -1), rest], 2)
            for first, rest in zip(prefix, (key, value), strict=True)
        )
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _is_plain(kwargs: dict[str, Any]) -> bool:
    """Whether the attention is a softmax of scaled scores and nothing else."""
    return all(kwargs.get(name) is None for name in ("softcap", "position_bias", "cache"))


def _attend_padding_free(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    layout: Layout,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the rows of a padding-free batch: in one kernel on CUDA, elsewhere one after another."""
    sizes = query.shape[-1], value.shape[-1]
    if cuda.is_used(query) and _is_plain(kwargs) and all(size % 8 == 0 for size in sizes):  # what the kernels take
        lengths = attention_mask.sum(3).flatten()  # on the device already
        return cuda.jagged_attention(query, key, value, lengths, max(layout.lengths), scaling, dropout), None
    kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": True}
    rows = zip(*(tensor.split(layout.lengths, 2) for tensor in (query, key, value)), strict=True)
    return torch.cat([_attend(module, q, k, v, None, **kwargs)[0] for q, k, v in rows], 1), None


def _attend_pack(
    module: nn.Module,
    query: torch.Tensor,  # [1, heads, prefix + rows x row, size], or [1, heads, rows x row, size] with a cached prefix
    key: torch.Tensor,  # [1, key-value heads, prefix + rows x (cached + row), size]
    value: torch.Tensor,
    attention_mask: torch.Tensor,  # [rows, 1, row, prefix + cached + row]
    layout: Layout,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a pack: in one kernel on CUDA, elsewhere that of the prefix, unless its keys come from a cache, and
    that of the rows.
    """
    first = query.shape[2] - layout.rows * attention_mask.shape[2]  # queries of the prefix: all, or none
    if layout.rows == 1 and not first:  # an ordinary sequence
        return _attend(module, query, key, value, attention_mask, **kwargs)
    if cuda.is_used(query) and _is_plain(kwargs) and cuda.takes_pack(query, value, layout, kwargs.get("dropout", 0.0)):
        return cuda.pack_attention(query, key, value, attention_mask, layout, kwargs.get("scaling")), None

    def split(tensor: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The prefix [1, heads, first, size], and the rows [rows, heads, row, size]."""
        return tensor[:, :, :first], tensor[0, :, first:].unflatten(1, (layout.rows, -1)).transpose(0, 1)

    first_q, query = split(query, first)
    (first_k, key), (first_v, value) = split(key, layout.prefix), split(value, layout.prefix)
    prefix = (first_k, first_v) if layout.prefix else None
    rest, _ = _attend(module, query, key, value, attention_mask, prefix=prefix, **kwargs)
    rest = rest.flatten(0, 1)[None]
    if not first:
        return rest, None
    front, _ = _attend(module, first_q, first_k, first_v, None, **{**kwargs, "is_causal": True})
    return torch.cat([front, rest], 1), None


def _forward(
    module: nn.Module,
    query: torch.Tensor,  # [rows, heads, queries, size]; of packs and padding-free batches [1, heads, tokens, size]
    key: torch.Tensor,  # [rows, key-value heads, keys, size]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # [rows, queries, heads, size]
    if layout is None:
        return _attend(module, query, key, value, attention_mask, **kwargs)
    attend = _attend_padding_free if layout.lengths else _attend_pack
    return attend(module, query, key, value, attention_mask, layout, **kwargs)


AttentionInterface.register(NAME, _forward)
AttentionInterface.register(ALONE, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionMaskInterface.register(ALONE, sdpa_mask)


def use(model: PreTrainedModel) -> None:
    """Gives the model this module's attention, if transformers chose torch's and the model accepts others.

    A model whose layers attend in some other way (by an index, with a state) keeps its own.
    """
    if _is_usual(model) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
        if not _packs_work(model):
            model.set_attn_implementation(ALONE)


def _is_usual(model: PreTrainedModel) -> bool:
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    known = model._supports_attention_backend and not model._is_stateful
    return known and layers <= {"full_attention", "sliding_attention"}


@torch.no_grad()
def _packs_work(model: PreTrainedModel) -> bool:
    """Whether two rows in a pack are what they are alone, tried on a few tokens.

    They are not where a model makes its own mask, drops ours or the layout, or carries a state from token to token.
    """
    weight, training = cast(nn.Embedding, model.get_input_embeddings()).weight, model.training
    ids = (len(weight) // 10 + torch.arange(12)).tolist()  # the first ones may be special
    rows = [ids[:7], ids[:3] + ids[7:]]
    together, separate = pack(rows, 3, pad_id=ids[0]), [{"input_ids": torch.tensor([row])} for row in rows]

    def states(inputs: dict[str, Any]) -> torch.Tensor:  # of the last layer, [tokens after the prefix, size]
        inputs = {k: v.to(weight.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        return model(**inputs, use_cache=False, output_hidden_states=True).hidden_states[-1][0, 3:].float()

    model.eval()
    try:
        packed = states(together).unflatten(0, (2, -1))
        alone = [states(inputs) for inputs in separate]
    except Exception:  # any that a model raises about a mask or an argument that it does not expect
        return False
    finally:
        model.train(training)
    # The median of a row's tokens, because rounding may move a single one far. Measured on SmolLM2, it moves by up to
    # 3 % in bf16 and 10 % in 8 bit, and by 26 % or more if the second row sees the first.
    pairs = [(tensor[-len(own) :], own) for tensor, own in zip(packed, alone, strict=True)]
    return all(((tensor - own).norm(dim=1) / own.norm(dim=1)).median() < 0.15 for tensor, own in pairs)


def resolve_shared_prefix(model: PreTrainedModel, config: Any, encoder: bool) -> str:
    """--shared_prefix, with `auto` made `off` where packs are not exact or, because of dropout, not the same training.

    config: a script's Config. Raises InputError for `on` where the model cannot take packs.
    """
    reason = _why_no_packs(model.config, encoder, config.max_length)
    if reason and config.shared_prefix == "on":
        raise InputError(f"--shared_prefix on: {config.model} cannot take packs, because {reason}.")
    dropout = config.lora_dropout > 0 and not config.full_finetuning
    dropout |= any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    settings = model.config.get_text_config().to_dict().items()  # some have no module of their own
    dropout |= any(
        "drop" in name and not name.startswith(("classifier", "summary")) and isinstance(value, float) and value > 0
        for name, value in settings
    )
    return "off" if reason or dropout and config.shared_prefix == "auto" else config.shared_prefix


def takes_packs(model: PreTrainedModel, length: int) -> bool:
    """Whether sequences up to `length` may be computed as packs, in several passes, by a causal language model."""
    return keeps_keys(model, length) and _why_no_packs(model.config, False, length) is None


def keeps_keys(model: PreTrainedModel, length: int) -> bool:
    """Whether the keys and values of one pass serve the next, in sequences up to `length`."""
    return length <= rotary_border(model) and _is_usual(model) and model.config._attn_implementation != ALONE


def rotary_border(model: PreTrainedModel) -> int:
    """How many positions a pass may have so that its rotary embeddings are those of every other pass.

    In a pass with more, those of all tokens are others with some models (longrope: Phi-3's; dynamic).
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        return sys.maxsize
    return rope.get("original_max_position_embeddings") or config.max_position_embeddings


def check_masks(model: PreTrainedModel, config: Any, option: str, length: int) -> None:
    """Raises InputError where our masks would not separate what `--option` puts into one sequence.

    config: a script's Config. length: tokens that see each other at most.
    """
    reason = _why_no_packs(model.config, False, length)
    if reason:
        raise InputError(f"--{option} true: not with {config.model}, because {reason}.")


def _why_no_packs(config: PretrainedConfig, encoder: bool, max_length: int) -> str | None:
    name, config = config._attn_implementation, config.get_text_config()  # of a model for pictures, its text part
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if encoder or not getattr(config, "is_causal", True):
        return "it attends in both directions"
    if name == ALONE:
        return "a trial of two rows in a pack failed, or gave other numbers than the rows alone"
    if name != NAME:
        return f"its attention ({name}) knows none"
    if window is not None and window < max_length:
        return f"its sliding window of {window} tokens is shorter than a row's {max_length}"
    return None
