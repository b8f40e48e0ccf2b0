"""Token ids -> batches of tensors, in three layouts with the same losses and gradients.

Padded: one row per sequence. Rows are padded on the left, so that they end together.
Shared-prefix pack: one sequence `[prefix][row 1][row 2]...`. The prefix, which all prompts begin with, is computed once
instead of once per row; each row continues its positions, and sees the prefix and itself.
Padding-free: one sequence `[row 1][row 2]...` without padding; each row has its own positions and sees itself only.

common/model/attention.py has a worked example.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from common.data.corpus import Block, document_starts
from common.text.chat import ChatRow
from common.text.prompts import AnswerRow, HeadRow


@dataclass(frozen=True)
class Layout:
    """How the rows of a batch share one sequence, for attention (common/model/attention.py).

    rows: number of rows. prefix: tokens at the front that all rows see, 0 if there are none. lengths: of a padding-free
    batch, the tokens of each row; empty for a pack, whose rows are equally long.
    """

    rows: int
    prefix: int = 0
    lengths: tuple[int, ...] = ()


@dataclass
class Batch:
    """One micro-batch: what the model reads, and the targets that it predicts at `positions`.

    A target is a token (generative), or what a classification head should answer for a row.

    input_ids, position_ids: [rows, length]; of a pack [1, prefix + rows x row]; padding-free [1, tokens].
    attention_mask: [rows, length], 1 for a token and 0 for padding; or True where a query sees a key, [rows, 1, length,
        length], of a pack [rows, 1, row, prefix + row]; padding-free [rows, 1, 1, longest row], True for a token.
    positions: [targets], where in the flattened input_ids each target is predicted; of a head [rows], the last tokens.
    targets: [targets] token ids; of a head [rows], the index of the label (a number, for a regression), or
        [rows, labels], 0.0 or 1.0 each, if a row may have several labels.
    weights: the weight of each target in the loss, float, in the shape of targets; 0 where it does not count.
    rows: [targets], the row of each target; None for a head.
    pos_weight: [labels], the factor of each label's positive targets in binary cross-entropy, or None.
    layout: None for a padded batch.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor | None = None
    pos_weight: torch.Tensor | None = None
    layout: Layout | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward pass, which sees no targets."""
        names = ("input_ids", "attention_mask", "position_ids", "positions", "layout")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def for_head(self) -> bool:
        """Whether a classification head answers once per row; else tokens are predicted."""
        return self.rows is None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with all tensors on `device`; a GPU copies them itself, and nothing waits for it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned = torch.device(device).type == "cuda"  # only from pinned memory does it copy by itself
        moved: dict[str, Any] = {
            name: (value.pin_memory() if pinned else value).to(device, non_blocking=pinned)
            for name, value in values.items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


# --- layouts


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, position_ids, each [rows, length]: rows end together, so that answers align.

    The mask comes from the lengths, never from the pad id, which may be the end token's.
    """
    lengths = np.array([len(ids) for ids in sequences])
    tokens = np.arange(lengths.max()) >= lengths.max() - lengths[:, None]
    filled = np.full(tokens.shape, pad_id)
    filled[tokens] = _joined(sequences)
    input_ids, attention_mask = torch.from_numpy(filled), torch.from_numpy(tokens.astype(np.int64))
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


def pack(sequences: Sequence[Sequence[int]], prefix: int, pad_id: int) -> dict[str, Any]:
    """Inputs of a shared-prefix pack of sequences whose first `prefix` tokens are the same.

    The rest of each is padded on the left. Shapes as in Batch.
    """
    rows = pad_left([ids[prefix:] for ids in sequences], pad_id)
    count, length = rows["input_ids"].shape
    own = torch.ones(length, length, dtype=torch.bool).tril() & rows["attention_mask"][:, None].bool()
    mask = torch.cat([torch.ones(count, length, prefix, dtype=torch.bool), own], 2)
    shared = torch.tensor(sequences[0][:prefix])
    return {
        "input_ids": torch.cat([shared, rows["input_ids"].flatten()])[None],
        "attention_mask": mask[:, None],
        "position_ids": torch.cat([torch.arange(prefix), rows["position_ids"].flatten() + prefix])[None],
        "layout": Layout(count, prefix),
    }


def flatten(sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Inputs of a padding-free batch. Shapes as in Batch."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    return {
        "input_ids": torch.from_numpy(_joined(sequences))[None],
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None])[:, None, None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in sequences])[None],
        "layout": Layout(len(sequences), lengths=tuple(lengths.tolist())),
    }


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """Number of tokens that all prompts begin with; at least one token of each prompt is left out of it."""
    first, last = min(prompts), max(prompts)  # in lexicographic order: what these two share, all share
    shortest = min(len(ids) for ids in prompts) - 1
    return next((i for i in range(shortest) if first[i] != last[i]), shortest)


def pays(prefix: int, lengths: Sequence[int]) -> bool:
    """Whether a pack is worth it: its work is prefix + rows x row instead of rows x (prefix + row) tokens.

    Cutting the rows from the prefix and joining them again costs about as much as 5 % of the tokens.
    """
    longest = max(lengths)
    return prefix + len(lengths) * (longest - prefix) < 0.95 * len(lengths) * longest


def join(
    prompts: Sequence[list[int]], sequences: Sequence[list[int]], pad_id: int, shared_prefix: str
) -> tuple[dict[str, Any], torch.Tensor]:
    """Inputs of the sequences, which begin with the prompts, and [rows], where each row's last token is.

    Places are those in the flattened batch. As padding is on the left, the other tokens of a row are found by counting
    back. shared_prefix: `on`, `off`, or `auto`, a pack where it pays.
    """
    prefix = common_prefix(prompts) if shared_prefix != "off" and len(prompts) > 1 else 0
    if prefix and (shared_prefix == "on" or pays(prefix, [len(ids) for ids in sequences])):
        inputs = pack(sequences, prefix, pad_id)
    else:
        prefix, inputs = 0, pad_left(sequences, pad_id)
    row = (inputs["input_ids"].numel() - prefix) // len(sequences)
    return inputs, prefix - 1 + row * torch.arange(1, len(sequences) + 1)


def describe_prefix(prompts: Sequence[list[int]], lengths: Sequence[int], batch_size: int, shared_prefix: str) -> str:
    """For people: what `shared_prefix` means for micro-batches of rows with these prompts and lengths."""
    prefix, mean = common_prefix(prompts), sum(lengths) // len(lengths)
    packed = shared_prefix == "on" or shared_prefix == "auto" and pays(prefix, [mean] * batch_size)
    how = "once per micro-batch" if packed and batch_size > 1 and prefix else "in every row"
    return f"rows begin with the same {prefix} tokens of about {mean}, computed {how}"


# --- collators: (row, counts) pairs -> batch. A row that does not count has weight 0.


def collate_answers(rows: Sequence[tuple[AnswerRow, bool]], pad_id: int, shared_prefix: str = "off") -> Batch:
    """Prompts with their answers; the answers' tokens are the targets."""
    sequences = [row.prompt + row.answer for row, _ in rows]
    inputs, ends = join([row.prompt for row, _ in rows], sequences, pad_id, shared_prefix)
    return _token_batch(inputs, ends, [row.answer for row, _ in rows], [row.weight * counts for row, counts in rows])


def collate_head(
    rows: Sequence[tuple[HeadRow, bool]],
    pad_id: int,
    shared_prefix: str = "off",
    encoder: bool = False,
    pos_weight: Sequence[float] | None = None,
) -> Batch:
    """Texts, each with its target for a classification head, which reads the hidden state of the last token.

    Encoders have absolute positions that start at the left, so they are padded on the right; they pool by themselves.
    """
    prompts = [row.prompt for row, _ in rows]
    inputs, ends = join(prompts, prompts, pad_id, shared_prefix)
    if encoder:
        inputs = {name: _flip_padding(tensor, inputs["attention_mask"]) for name, tensor in inputs.items()}
    targets = torch.tensor([row.target for row, _ in rows])
    weights = torch.tensor([row.weight * counts for row, counts in rows])
    if targets.ndim == 2:
        weights = weights[:, None].expand_as(targets).contiguous()
    factors = None if pos_weight is None else torch.tensor(pos_weight)
    return Batch(**inputs, positions=ends, targets=targets, weights=weights, pos_weight=factors)


def collate_rows(
    rows: Sequence[tuple[AnswerRow | HeadRow, bool]],
    pad_id: int,
    shared_prefix: str = "off",
    encoder: bool = False,
    pos_weight: Sequence[float] | None = None,
) -> Batch:
    """Rows of a classification: all generative, or all for a head."""
    if isinstance(rows[0][0], AnswerRow):
        return collate_answers(rows, pad_id, shared_prefix)  # type: ignore[arg-type]
    return collate_head(rows, pad_id, shared_prefix, encoder, pos_weight)  # type: ignore[arg-type]


def collate_blocks(
    rows: Sequence[tuple[Block, bool]], start: Sequence[int], end_id: int, pad_id: int, document_masking: bool = False
) -> Batch:
    """Blocks of text; their tokens are the targets, but for those that the block before has predicted.

    start: ids in front of every block (a BOS), never predicted. A block's first token is, if something is in front.
    document_masking: each document has its own positions, and no token sees another document or is predicted by one.
    Without it a block is a window of text in which documents follow each other (wrapped packing).
    """
    inputs = pad_left([[*start, *block.tokens] for block, _ in rows], pad_id)
    count, length = inputs["input_ids"].shape
    starts = [document_starts(block.tokens, end_id) if document_masking else [] for block, _ in rows]
    trained = [np.arange(len(block.tokens)) >= max(block.seen, 0 if start else 1) for block, _ in rows]
    for predicted, own in zip(trained, starts, strict=True):
        predicted[own] = False
    if document_masking:
        columns = [[length - len(block.tokens) + s for s in own] for (block, _), own in zip(rows, starts, strict=True)]
        _separate_documents(inputs, columns)
    ends, tokens = length * torch.arange(1, count + 1) - 1, [block.tokens for block, _ in rows]
    return _token_batch(inputs, ends, tokens, [float(counts) for _, counts in rows], trained)


def collate_chat(
    rows: Sequence[tuple[ChatRow, bool]], pad_id: int, shared_prefix: str = "off", packing: bool = False
) -> Batch:
    """Conversations; a token is a target where the row's mask says so.

    A pack's prefix is what all rows begin with and none is trained on, a long system turn for instance. packing: a
    padding-free batch instead.
    """
    sequences = [row.ids for row, _ in rows]
    if packing:
        inputs, ends = flatten(sequences), torch.tensor([row.length for row, _ in rows]).cumsum(0) - 1
    else:
        inputs, ends = join([row.prompt for row, _ in rows], sequences, pad_id, shared_prefix)
    trained = [np.array(row.mask, bool) for row, _ in rows]
    return _token_batch(inputs, ends, sequences, [float(counts) for _, counts in rows], trained)


def _token_batch(
    inputs: dict[str, Any],
    ends: torch.Tensor,  # [rows], where in the flattened input_ids each row's last token is
    tokens: Sequence[Sequence[int]],  # of each row, the last ones
    weights: Sequence[float],  # of each row's targets
    trained: Sequence[np.ndarray] | None = None,  # of each row [tokens], which are targets; None: all
) -> Batch:
    """A batch whose targets are tokens; each is predicted at the place in front of its own."""
    lengths = np.array([len(ids) for ids in tokens])
    rows = np.repeat(np.arange(len(tokens)), lengths)
    # A row's tokens end at its end, and in the joined ones at the sum of the lengths up to it.
    positions = np.arange(len(rows)) + np.repeat(ends.numpy() - lengths.cumsum(), lengths)
    columns = [rows, positions, _joined(tokens), np.array(weights, np.float32)[rows]]
    if trained is not None:
        columns = [column[np.concatenate(trained)] for column in columns]
    rows_of, places, targets, factors = map(torch.from_numpy, columns)
    return Batch(**inputs, positions=places, targets=targets, weights=factors, rows=rows_of)


def _joined(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """All ids, one sequence after another, [tokens]."""
    return np.fromiter(chain.from_iterable(sequences), np.int64)


def _separate_documents(inputs: dict[str, torch.Tensor], starts: Sequence[Sequence[int]]) -> None:
    """Gives every document its own positions, and an attention mask under which it sees itself only.

    starts: for every row, the columns in which further documents begin.
    """
    count, length = inputs["input_ids"].shape
    document = torch.zeros(count, length, dtype=torch.long)
    for i, columns in enumerate(starts):
        for column in columns:
            document[i, column:] += 1
            inputs["position_ids"][i, column:] = torch.arange(length - column)
    same = document[:, :, None] == document[:, None]
    real = inputs["attention_mask"][:, None].bool()
    seen = same & real & torch.ones(length, length, dtype=torch.bool).tril()
    inputs["attention_mask"] = (seen | torch.eye(length, dtype=torch.bool))[:, None]  # padding sees itself: no NaN


def _flip_padding(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.stack([row.roll(int(real.sum())) for row, real in zip(tensor, mask, strict=True)])
