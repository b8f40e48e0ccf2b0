"""Collation: every target is the token after its place, whatever the layout; batches go to a GPU without a wait."""

import random

import pytest
import torch

from common.data.corpus import Block
from common.text import batches
from common.text.chat import ChatRow
from common.text.prompts import AnswerRow

PAD, END = 2, 3


def ids(count: int) -> list[int]:
    return [random.randrange(3, 90) for _ in range(count)]


def some_rows(kind: str) -> list[tuple]:
    """(row, counts, tokens that may be targets, which of them are, weight) of five rows of unequal length."""
    random.seed(kind)
    found, prefix = [], ids(6)
    for i, length in enumerate((1, 17, 4, 9, 4)):
        counts = i != 2  # a filler
        if kind == "answers":
            row = AnswerRow(prefix + ids(length), [*ids(1 + i % 3), END], 0.5 + i)
            found.append((row, counts, row.answer, [True] * len(row.answer), row.weight * counts))
        elif kind == "chat":
            mask = [0] * 7 + [int(random.random() < 0.6) for _ in range(length)] + [1]
            row = ChatRow(prefix + ids(len(mask) - 6), mask)
            found.append((row, counts, row.ids, list(map(bool, mask)), float(counts)))
        else:
            row = Block(str(i), ids(length + 1), seen=min(i, length))
            trained = [t >= max(row.seen, int(kind == "no start")) for t in range(length + 1)]
            if kind == "documents":
                trained = [yes and not (t and row.tokens[t - 1] == END) for t, yes in enumerate(trained)]
            found.append((row, counts, row.tokens, trained, float(counts)))
    return found


COLLATE = {
    "answers": [(batches.collate_answers, {"shared_prefix": choice}) for choice in ("off", "on")],
    "chat": [
        (batches.collate_chat, {"shared_prefix": "off"}),
        (batches.collate_chat, {"shared_prefix": "on"}),
        (batches.collate_chat, {"packing": True}),
    ],
    "start": [(batches.collate_blocks, {"start": [1], "end_id": END})],
    "no start": [(batches.collate_blocks, {"start": [], "end_id": END})],
    "documents": [(batches.collate_blocks, {"start": [1], "end_id": END, "document_masking": True})],
}


@pytest.mark.parametrize(("kind", "way"), [(kind, i) for kind, ways in COLLATE.items() for i in range(len(ways))])
def test_targets_are_found_token_by_token(kind, way):
    """Row, id and weight in the rows' order; each stands after the place that predicts it."""
    collate, options = COLLATE[kind][way]
    rows = some_rows(kind)
    batch = collate([(row, counts) for row, counts, *_ in rows], pad_id=PAD, **options)
    expected = [
        (i, token, weight)
        for i, (_, _, tokens, trained, weight) in enumerate(rows)
        for token, yes in zip(tokens, trained, strict=True)
        if yes
    ]
    assert list(zip(batch.rows.tolist(), batch.targets.tolist(), batch.weights.tolist(), strict=True)) == expected
    flat = batch.input_ids.flatten()
    layout = batch.layout
    after = [place + 1 for place in batch.positions.tolist()]
    if layout and layout.prefix:  # the prefix's last token predicts nothing: a row has a token of its own in front
        assert min(batch.positions.tolist()) >= layout.prefix
    assert [int(flat[place]) for place in after] == batch.targets.tolist()
    assert (batch.rows.dtype, batch.positions.dtype, batch.targets.dtype) == (torch.int64,) * 3
    assert batch.weights.dtype == torch.float32


def test_padding_is_on_the_left():
    inputs = batches.pad_left([[5, 6, 7], [8]], PAD)
    assert {name: tensor.tolist() for name, tensor in inputs.items()} == {
        "input_ids": [[5, 6, 7], [PAD, PAD, 8]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
        "position_ids": [[0, 1, 2], [0, 0, 0]],
    }


def test_a_gpu_copies_a_batch_by_itself(monkeypatch):
    """From pinned memory, without blocking; on a CPU nothing is copied."""
    batch = batches.collate_answers([(AnswerRow([5, 6], [7]), True)], PAD)
    pinned, moved = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **options: moved.append(options) or tensor)
    batch.to("cuda:0")
    assert len(pinned) == 7 and moved == [{"non_blocking": True}] * 7
    batch.to("cpu")
    assert len(pinned) == 7 and moved[7:] == [{"non_blocking": False}] * 7
