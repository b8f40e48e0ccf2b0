"""Rows -> tensors. Every batch has `inputs` for the model, and for the loss the `weights` of its targets.

Rows stand in a padded batch, or in a shared-prefix pack: one sequence `[prefix][row 1][row 2]...`, where the prefix is
what all prompts begin with, positions go on after it in every row, and a row sees the prefix and itself. The numbers
are the same, and the prefix is computed once instead of once a row. Conversations can also stand in a padding-free
batch, one behind the other in one sequence, and none sees another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.data.classification import Example
from common.data.corpus import Block, document_starts
from common.text.chat import ChatRow
from common.text.prompts import ClassificationPrompt

Batch = dict[str, Any]


@dataclass(frozen=True)
class AnswerRow:
    """A generative row: the prompt's ids, the answer's ids (its end included), and the row's weight in the loss."""

    prompt: list[int]
    answer: list[int]
    weight: float = 1.0

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class HeadRow:
    """A row for a classification head: ids, the target (a label's index, or one 0/1 a label), and its weight."""

    prompt: list[int]
    target: int | list[float]
    weight: float = 1.0

    @property
    def length(self) -> int:
        return len(self.prompt)


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, position_ids, each [rows, length]: rows end together, so that answers align.

    The mask comes from the lengths, never from the pad id, which may be the end token's.
    """
    length = max(len(ids) for ids in sequences)
    input_ids = torch.tensor([[pad_id] * (length - len(ids)) + list(ids) for ids in sequences])
    attention_mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in sequences])
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, at least one left in each."""
    first, last = min(prompts), max(prompts)  # in lexicographic order: what these two share, all share
    shortest = min(len(ids) for ids in prompts) - 1
    return next((i for i in range(shortest) if first[i] != last[i]), shortest)


def pays(prefix: int, lengths: Sequence[int]) -> bool:
    """Whether a pack is worth it: its work is prefix + rows x row instead of rows x (prefix + row) tokens.

    Cutting the rows from the prefix and joining them again costs about as much as 5 % of the tokens.
    """
    longest = max(lengths)
    return prefix + len(lengths) * (longest - prefix) < 0.95 * len(lengths) * longest


def pack(sequences: Sequence[Sequence[int]], prefix: int, pad_id: int) -> dict[str, torch.Tensor]:
    """A shared-prefix pack of sequences that begin with the same `prefix` tokens; the rows are padded on the left.

    input_ids and position_ids [1, prefix + rows x row]; attention_mask [rows, 1, row, prefix + row], True where a
    row's token sees one of the prefix or of its row (common/attention.py).
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
    }


def flatten(sequences: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """A padding-free batch: the sequences behind each other as one, with positions that start anew in each.

    input_ids and position_ids [1, tokens]; attention_mask int32 [sequences, 1, 1, longest], 1 where a sequence has a
    token (common/attention.py).
    """
    lengths = torch.tensor([len(ids) for ids in sequences])
    return {
        "input_ids": torch.tensor([[token for ids in sequences for token in ids]]),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).int()[:, None, None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in sequences])[None],
    }


def join(
    prompts: Sequence[Sequence[int]], sequences: Sequence[Sequence[int]], pad_id: int, shared_prefix: str
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of the sequences, which begin with the prompts, and the position of each row's last token.

    Positions are those in the flattened batch; padding is on the left, so what stands in front of a row's last token
    is found by counting back. shared_prefix: `on`, `off`, or `auto`, a pack where that pays.
    """
    prefix = common_prefix(prompts) if shared_prefix != "off" and len(prompts) > 1 else 0
    if prefix and (shared_prefix == "on" or pays(prefix, [len(ids) for ids in sequences])):
        inputs = pack(sequences, prefix, pad_id)
    else:
        prefix, inputs = 0, pad_left(sequences, pad_id)
    row = (inputs["input_ids"].numel() - prefix) // len(sequences)
    return inputs, prefix - 1 + row * torch.arange(1, len(sequences) + 1)


def describe_prefix(
    prompts: Sequence[Sequence[int]], lengths: Sequence[int], batch_size: int, shared_prefix: str
) -> str:
    """What `shared_prefix` means for micro-batches of rows with these prompts and lengths, for people."""
    prefix, mean = common_prefix(prompts), sum(lengths) // len(lengths)
    packed = shared_prefix == "on" or shared_prefix == "auto" and pays(prefix, [mean] * batch_size)
    how = "once a micro-batch" if packed and batch_size > 1 and prefix else "in every row"
    return f"rows begin with the same {prefix} tokens of about {mean}, computed {how}"


def collate_answers(rows: Sequence[tuple[AnswerRow, bool]], pad_id: int, shared_prefix: str = "off") -> Batch:
    """Prompts with their answers for common/token_losses.py, as `collate_blocks`: the answers' tokens are targets."""
    inputs, ends = join(
        [row.prompt for row, _ in rows], [row.prompt + row.answer for row, _ in rows], pad_id, shared_prefix
    )
    found = []
    for i, (row, counts) in enumerate(rows):
        first = int(ends[i]) - len(row.answer)  # of the flattened batch, the position of the prompt's last token
        found += [(i, first + t, token, row.weight * counts) for t, token in enumerate(row.answer)]
    return _with_targets(inputs, found)


def collate_head(
    rows: Sequence[tuple[HeadRow, bool]],
    pad_id: int,
    shared_prefix: str = "off",
    encoder: bool = False,
    pos_weight: Sequence[float] | None = None,
) -> Batch:
    """Texts with their targets; `pool` is the position whose hidden state is classified: each row's last.

    Encoders have absolute positions that start at the left, so they are padded on the right and pool by themselves.
    """
    prompts = [row.prompt for row, _ in rows]
    inputs, ends = join(prompts, prompts, pad_id, shared_prefix)
    if encoder:
        inputs = {name: _flip_padding(tensor, inputs["attention_mask"]) for name, tensor in inputs.items()}
    inputs["pool"] = ends
    multi_label = isinstance(rows[0][0].target, list)
    targets = torch.tensor([row.target for row, _ in rows], dtype=torch.float if multi_label else torch.long)
    weights = torch.tensor([row.weight * counts for row, counts in rows])
    if multi_label:
        weights = weights[:, None].expand_as(targets).contiguous()
    batch = {"inputs": inputs, "targets": targets, "weights": weights}
    return batch if pos_weight is None else {**batch, "pos_weight": torch.tensor(pos_weight)}


def collate_rows(
    rows: Sequence[AnswerRow] | Sequence[HeadRow],
    numbers: Sequence[tuple[int, bool]],
    *,
    pad_id: int,
    shared_prefix: str = "off",
    encoder: bool = False,
    pos_weight: Sequence[float] | None = None,
) -> Batch:
    """The micro-batch of the rows with these (number, counts) pairs."""
    chosen = [(rows[i], counts) for i, counts in numbers]
    if isinstance(chosen[0][0], AnswerRow):
        return collate_answers(chosen, pad_id, shared_prefix)
    return collate_head(chosen, pad_id, shared_prefix, encoder, pos_weight)


def collate_blocks(
    rows: Sequence[tuple[Block, bool]], start: Sequence[int], end_id: int, pad_id: int, document_masking: bool = False
) -> Batch:
    """Blocks of text for common/token_losses.py: `keep` and `targets` [predicted tokens]; beside them, their `weights`
    and which of the `rows` they belong to.

    start: ids in front of every block (a BOS), never predicted. A block's first token is, if something is in front.
    document_masking: positions start anew behind every end token, and no token sees another document or is predicted
    by one. Without it a block is a window of text in which documents follow each other (wrapped packing).
    """
    inputs = pad_left([[*start, *block.tokens] for block, _ in rows], pad_id)
    count, length = inputs["input_ids"].shape
    starts = [document_starts(block.tokens, end_id) if document_masking else [] for block, _ in rows]
    found = []
    for i, (block, counts) in enumerate(rows):
        offset = (i + 1) * length - len(block.tokens)
        for t in range(max(block.seen, 0 if start else 1), len(block.tokens)):
            if t not in starts[i]:
                found.append((i, offset + t - 1, block.tokens[t], counts))
    if document_masking:
        document = torch.zeros(count, length, dtype=torch.long)
        for i, (block, _) in enumerate(rows):
            for begin in starts[i]:
                column = length - len(block.tokens) + begin
                document[i, column:] += 1
                inputs["position_ids"][i, column:] = torch.arange(length - column)
        same = document[:, :, None] == document[:, None]
        real = inputs["attention_mask"][:, None].bool()
        seen = same & real & torch.ones(length, length, dtype=torch.bool).tril()
        inputs["attention_mask"] = (seen | torch.eye(length, dtype=torch.bool))[:, None]  # padding sees itself: no NaN
    return _with_targets(inputs, found)


def collate_chat(
    rows: Sequence[tuple[ChatRow, bool]], pad_id: int, shared_prefix: str = "off", packing: bool = False
) -> Batch:
    """Conversations for common/token_losses.py, as `collate_blocks`: a token is a target where the row's mask says so.

    A pack's prefix is what all rows begin with and none is trained on, a long system turn for instance. packing: a
    padding-free batch instead.
    """
    sequences = [row.ids for row, _ in rows]
    if packing:
        inputs, ends = flatten(sequences), torch.tensor([row.length for row, _ in rows]).cumsum(0) - 1
    else:
        inputs, ends = join([row.front for row, _ in rows], sequences, pad_id, shared_prefix)
    found = []
    for i, (row, counts) in enumerate(rows):
        first = int(ends[i]) - row.length  # of the flattened batch, the position in front of the row's first token
        found += [(i, first + t, row.ids[t], counts) for t, trained in enumerate(row.mask) if trained]
    return _with_targets(inputs, found)


def _with_targets(inputs: dict[str, torch.Tensor], found: Sequence[tuple[int, int, int, float]]) -> Batch:
    """found: of every target its row, the position that predicts it, its id, and its weight."""
    *numbers, weights = torch.tensor(found, dtype=torch.double).reshape(-1, 4).unbind(1)
    rows, keep, targets = (column.long() for column in numbers)
    return {"inputs": {**inputs, "keep": keep, "targets": targets}, "weights": weights.float(), "rows": rows}


def collate_numbered(
    collate: Callable[..., Batch], rows: Sequence[Any], numbers: Sequence[tuple[int, bool]], **options: Any
) -> Batch:
    """`collate` (of blocks or chats) of the rows with these (number, counts) pairs."""
    return collate([(rows[i], counts) for i, counts in numbers], **options)


def classification_rows(
    examples: Sequence[Example], prompt: ClassificationPrompt, weights: Sequence[float] | None
) -> list[AnswerRow] | list[HeadRow]:
    """Training rows; with one label a row, each weighs as much as its label (`weights`)."""
    rows = []
    for example in examples:
        ids = prompt.prompt(example.text).ids
        weight = weights[example.labels[0]] if weights and not prompt.multi_label else 1.0
        if prompt.first_ids:
            rows.append(AnswerRow(ids, prompt.answer(example.labels), weight))
        else:
            rows.append(HeadRow(ids, prompt.target(example.labels), weight))
    return rows


def show_row(row: AnswerRow | HeadRow, tokenizer: Any) -> str:
    """The row as the model sees it, what is trained on in [[ ]]."""
    if isinstance(row, AnswerRow):
        return f"{tokenizer.decode(row.prompt)}[[{tokenizer.decode(row.answer)}]]"
    return f"{tokenizer.decode(row.prompt)} [[target {row.target}]]"


def _flip_padding(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.stack([row.roll(int(real.sum())) for row, real in zip(tensor, mask, strict=True)])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with all its tensors on `device`."""
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch["inputs"].items()}
    return {**{k: v.to(device) for k, v in batch.items() if k != "inputs"}, "inputs": inputs}
