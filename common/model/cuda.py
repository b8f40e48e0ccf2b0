"""What attention does differently on CUDA: one kernel for a pack, and one for rows of unequal length.

A shared-prefix pack is one sequence there, too: FlexAttention (Dong et al., 2024) computes the blocks of 128 queries
and 128 keys in which somebody sees something, and nothing of the rest. So the prefix is not copied to every row, nor
are the key heads of a group to every query head, and no mask of the sequence squared exists. The blocks of a pack of 7
tokens, if a block had 2 (`.`: not computed; `#`: all is seen; `/`: the mask says what):

            A B   C D   E F   G         A B C  the prefix
      A B    /     .     .    .         D E    row 1
      C D    #     /     /    .         F G    row 2
      E F    #     /     /    /
      G      /     /     /    /
"""

from copy import copy
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from common.log import warn
from common.text.batches import Layout

BLOCK = 128
FEWEST = 2**12  # copied tokens of the prefix from which on the kernel is worth its compilation
SMALLEST = 16  # size of a head that FlexAttention takes


def is_used(tensor: torch.Tensor) -> bool:
    """Whether this module computes what the tensor is for."""
    return tensor.is_cuda


def takes_pack(query: torch.Tensor, value: torch.Tensor, layout: Layout, dropout: float) -> bool:
    """Whether `pack_attention` computes this pack, and is worth it; a compiled model has kernels of its own."""
    if torch.compiler.is_compiling() or dropout or min(query.shape[-1], value.shape[-1]) < SMALLEST:
        return False
    if layout.rows * layout.prefix < FEWEST:
        return False
    heads = query.shape[1], value.shape[1], query.shape[-1], value.shape[-1]
    return _compiles(*heads, query.dtype, query.device, torch.is_grad_enabled())


@cache
def _compiles(
    heads: int, key_heads: int, size: int, value_size: int, dtype: torch.dtype, device: torch.device, gradients: bool
) -> bool:
    """Whether this device can compute such heads in the kernel, and its gradients; a warning says so if not.

    Large heads may need more shared memory than it has, and a compiler may be missing. The backward kernel is compiled
    when it is first used, so the trial uses it.
    """
    shapes = (heads, size), (key_heads, size), (key_heads, value_size)
    own = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)  # not those of gradient checkpointing
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), own:
        query, key, value = (
            torch.zeros(1, number, 3 * BLOCK, width, dtype=dtype, device=device, requires_grad=gradients)
            for number, width in shapes
        )
        mask = torch.ones(2, 1, BLOCK, 2 * BLOCK, dtype=torch.bool, device=device)
        try:
            output = pack_attention(query, key, value, mask, Layout(2, BLOCK), None)
            if gradients:
                output.sum().backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler's are of many kinds
            reason = " ".join(str(error).split())[:200]
            warn(f"FlexAttention cannot be compiled here, so packs take more memory and time ({reason}).")
            return False
    return True


def pack_attention(
    query: torch.Tensor,  # [1, heads, prefix + rows x row, size], or [1, heads, rows x row, size] with a cached prefix
    key: torch.Tensor,  # [1, key-value heads, prefix + rows x (cached + row), size]
    value: torch.Tensor,
    mask: torch.Tensor,  # [rows, 1, row, prefix + cached + row], True where a query sees a key
    layout: Layout,
    scaling: float | None,
) -> torch.Tensor:  # [1, queries, heads, size]
    """Attention of a pack in one kernel. All rows see all of the prefix; of its own tokens a row sees what `mask` says.

    The kernel is compiled once, for packs of all shapes: whatever differs between them is in tensors.
    """
    row, key_row, start, column, blocks = _plan(
        layout.rows, layout.prefix, query.shape[2], mask.shape[2], mask.shape[3], query.device
    )
    seen, blocks = mask.flatten(), copy(blocks)

    def visible(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        of_prefix = (key_row[k] == 0) & ((row[q] > 0) | (q >= k))
        return of_prefix | (key_row[k] == row[q]) & seen[start[q] + column[k]]

    blocks.mask_mod = visible
    grouped = query.shape[1] != key.shape[1]
    return kernel()(query, key, value, block_mask=blocks, scale=scaling, enable_gqa=grouped).transpose(1, 2)


@cache
def kernel() -> Any:
    """FlexAttention, compiled when it is first called."""
    return torch.compile(flex_attention, dynamic=True)


class _Plan(NamedTuple):
    """What attention of all packs of one shape has in common.

    row: [queries], the row of each, from 1; -1 in the prefix. key_row: [keys], as row, but 0 in the prefix. A query q
    and a key k of one row are at start[q] + column[k] in the flattened mask. blocks: those that the kernel computes,
    without a `mask_mod`; `full` ones are seen completely.
    """

    row: torch.Tensor
    key_row: torch.Tensor
    start: torch.Tensor
    column: torch.Tensor
    blocks: BlockMask


@lru_cache(8)  # for the layers of a pass; shapes seldom come back, and a plan of a long pack takes some MB
@torch.inference_mode(False)  # a plan that an evaluation has made may come back in training, which saves its tensors
def _plan(rows: int, prefix: int, queries: int, new: int, width: int, device: torch.device) -> _Plan:
    """new, width: queries and columns of a row in its mask. All on the device, which nothing waits for."""
    own, first = width - prefix, queries - rows * new  # keys of a row; queries of the prefix: all, or none
    keys = prefix + rows * own
    q = torch.arange(queries, dtype=torch.int32, device=device) - first
    k = torch.arange(keys, dtype=torch.int32, device=device) - prefix
    row = torch.where(q < 0, -1, q // new + 1)
    key_row = torch.where(k < 0, 0, k // own + 1)
    start = q.clamp(min=0) * width
    column = torch.where(k < 0, 0, prefix + k % own)

    q_first, q_last = _edges(queries, device)
    k_first, k_last = (edge[None] for edge in _edges(keys, device))
    q_first, q_last = q_first[:, None], q_last[:, None]
    has_rows = q_last >= first
    of_prefix = (k_first < prefix) & (has_rows | (k_first <= q_last))
    of_rows = has_rows & (k_last >= prefix)
    of_rows &= (q_first.clamp(min=first) - first) // new <= (k_last - prefix) // own
    of_rows &= (k_first.clamp(min=prefix) - prefix) // own <= (q_last - first) // new
    whole = (k_first + BLOCK <= prefix) & (q_first + BLOCK <= queries)
    whole &= (q_first >= first) | (q_first >= k_first + BLOCK - 1)
    some = (of_prefix | of_rows) & ~whole
    blocks = BlockMask.from_kv_blocks(*_ordered(some), *_ordered(whole), BLOCK, seq_lengths=(queries, keys))
    return _Plan(row, key_row, start, column, blocks)


def _edges(tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last token of every block, [blocks]."""
    first = torch.arange(0, tokens, BLOCK, device=device)
    return first, (first + BLOCK - 1).clamp(max=tokens - 1)


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[query blocks, key blocks], True for some -> their number and indices, as BlockMask has them.

    [1, 1, query blocks], and [1, 1, query blocks, key blocks] with those first.
    """
    number, indices = blocks.sum(1, dtype=torch.int32), blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return number[None, None].contiguous(), indices[None, None].contiguous()


def jagged_attention(
    query: torch.Tensor,  # [1, heads, tokens, size], row after row
    key: torch.Tensor,  # [1, key-value heads, tokens, size]
    value: torch.Tensor,  # [1, key-value heads, tokens, size]
    lengths: torch.Tensor,  # [rows], at least 1
    longest: int,
    scaling: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:  # [1, tokens, heads, size]
    """Causal attention of rows of unequal length in one kernel. `longest` spares a wait for the device."""
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    group = query.shape[1] // key.shape[1]  # the kernels train with as many key heads as query heads only
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(
            tensor[0].transpose(0, 1).contiguous(), offsets, min_seqlen=1, max_seqlen=longest
        ).transpose(1, 2)
        for tensor in (query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1))
    )
    output = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True)
    return output.transpose(1, 2).values()[None]
