"""Losses row by row, in batches of like lengths."""

import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import FAMILIES
from runs import fresh_accelerator  # noqa: F401

from common.chat import ChatRow
from common.collate import collate_chat
from common.perplexity import row_losses
from common.token_losses import TokenLosses

LENGTHS = [30, 3, 17, 5, 30, 4, 16, 29, 6, 18, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_like_lengths_share_a_batch(models, family):
    """CORRECTNESS 14: whatever the batch size, every row's own loss, in the rows' order; and hardly any padding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32)
    torch.manual_seed(0)
    rows = [ChatRow(torch.randint(3, 600, (n,)).tolist(), [0] + [1] * (n - 1)) for n in LENGTHS]
    with torch.no_grad():
        alone = [model(torch.tensor([row.ids]), labels=torch.tensor([row.ids])).loss.item() for row in rows]
    batches = []

    def collate(numbers):
        batches.append([LENGTHS[i] for i, counts in numbers if counts])
        return collate_chat([(rows[i], counts) for i, counts in numbers], 2)

    accelerator = Accelerator(cpu=True)
    for size in (1, 3, 8):
        losses = row_losses(TokenLosses(model), LENGTHS, accelerator, size, collate, "test")
        assert [count for _, count in losses] == [n - 1 for n in LENGTHS]
        assert [nats / count for nats, count in losses] == pytest.approx(alone, rel=1e-5)
    # 168 places for 160 tokens; in the rows' order it would be 303
    assert batches[11:15] == [[30, 30, 29], [18, 17, 16], [6, 5, 4], [3, 2]]
