"""Attention in bf16 on a CPU: two batched matrix products over the key-value heads.

torch's fused CPU kernel multiplies bf16 at a fraction of the speed of a plain product, and transformers copies the keys
and values of grouped-query attention once a query head. Here the query heads of a group are stacked as further rows,
so that nothing is copied. The scores are held, so long sequences, and all that this form cannot express, stay with
torch's kernel.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "grouped_bf16"
MAX_SCORES = 2**24  # rows x heads x queries x keys: 32 MB a layer


def grouped_attention(
    query: torch.Tensor,  # [rows, heads, queries, size]
    key: torch.Tensor,  # [rows, key-value heads, keys, size]
    value: torch.Tensor,  # [rows, key-value heads, keys, size]
    mask: torch.Tensor | None,  # [rows or 1, 1, queries, keys], True where a query sees a key; None: causal
    scaling: float,
) -> torch.Tensor:  # [rows, queries, heads, size]
    """softmax(query @ key^T * scaling + mask) @ value, in the tensors' own dtype."""
    rows, heads, queries, size = query.shape
    shared, keys = key.shape[1], key.shape[2]
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    bias = bias.masked_fill(~mask, torch.finfo(query.dtype).min)
    stacked = (query * scaling).reshape(rows * shared, -1, size)  # heads of a group are neighbours
    scores = torch.bmm(stacked, key.reshape(rows * shared, keys, size).transpose(1, 2))
    weights = (scores.view(rows, heads, queries, keys) + bias).softmax(-1)
    output = torch.bmm(weights.view(rows * shared, -1, keys), value.reshape(rows * shared, keys, -1))
    return output.view(rows, heads, queries, -1).transpose(1, 2)


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = not dropout and not any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    masked = attention_mask.dtype == torch.bool if attention_mask is not None else causal
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and plain and masked and scores <= MAX_SCORES:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return grouped_attention(query, key, value, attention_mask, scaling), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
