"""Rows -> tensors. Every batch has `inputs` for the model, and `targets` and `weights` of one shape for the loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.data import Example
from common.prompts import ClassificationPrompt

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


def collate_answers(rows: Sequence[tuple[AnswerRow, bool]], pad_id: int) -> Batch:
    """Prompts with their answers; targets and weights [rows, longest answer], weight 0 where there is no target.

    The model returns logits only where an answer's token is predicted (`logits_to_keep`).
    """
    longest = max(len(row.answer) for row, _ in rows)
    inputs = pad_left([row.prompt + row.answer for row, _ in rows], pad_id)
    targets = torch.zeros(len(rows), longest, dtype=torch.long)
    weights = torch.zeros(len(rows), longest)
    for i, (row, counts) in enumerate(rows):
        targets[i, longest - len(row.answer) :] = torch.tensor(row.answer)
        weights[i, longest - len(row.answer) :] = row.weight * counts
    return {"inputs": {**inputs, "logits_to_keep": last(inputs, longest + 1)}, "targets": targets, "weights": weights}


def last(inputs: dict[str, torch.Tensor], positions: int) -> torch.Tensor:
    """The numbers of a batch's last positions, for `logits_to_keep`.

    A whole number there slices the hidden states, and torch then multiplies by one copy of the vocabulary matrix a row.
    """
    length = inputs["input_ids"].shape[1]
    return torch.arange(length - positions, length)


def collate_head(
    rows: Sequence[tuple[HeadRow, bool]], pad_id: int, encoder: bool = False, pos_weight: Sequence[float] | None = None
) -> Batch:
    """Texts with their targets; `pool` is the position whose hidden state is classified: the last, as padding is left.

    Encoders have absolute positions that start at the left, so they are padded on the right and pool by themselves.
    """
    inputs = pad_left([row.prompt for row, _ in rows], pad_id)
    if encoder:
        inputs = {name: _flip_padding(tensor, inputs["attention_mask"]) for name, tensor in inputs.items()}
    inputs["pool"] = torch.full((len(rows),), inputs["input_ids"].shape[1] - 1)
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
    encoder: bool = False,
    pos_weight: Sequence[float] | None = None,
) -> Batch:
    """The micro-batch of the rows with these (number, counts) pairs."""
    chosen = [(rows[i], counts) for i, counts in numbers]
    if isinstance(chosen[0][0], AnswerRow):
        return collate_answers(chosen, pad_id)
    return collate_head(chosen, pad_id, encoder, pos_weight)


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
