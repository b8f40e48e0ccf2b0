"""Losses row by row, in batches of like lengths."""

import pytest
import torch
import transformers
from accelerate import Accelerator
from helpers.models import FAMILIES

from common.measure.perplexity import row_losses
from common.model.token_losses import TokenLosses
from common.text.batches import collate_chat
from common.text.chat import ChatRow

LENGTHS = [30, 3, 17, 5, 30, 4, 16, 29, 6, 18, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_like_lengths_share_a_batch(models, family):
    """Whatever the batch size, every row's own loss, in the rows' order; and hardly any padding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32)
    torch.manual_seed(0)
    rows = [ChatRow(torch.randint(3, 600, (n,)).tolist(), [0] + [1] * (n - 1)) for n in LENGTHS]
    with torch.no_grad():
        alone = [model(torch.tensor([row.ids]), labels=torch.tensor([row.ids])).loss.item() for row in rows]
    batches = []

    def collate(pairs):
        batches.append([row.length for row, counts in pairs if counts])
        return collate_chat(pairs, 2)

    accelerator = Accelerator(cpu=True)
    for size in (1, 3, 8):
        options = {"collate": collate, "accelerator": accelerator, "batch_size": size, "what": "test"}
        losses = row_losses(TokenLosses(model), rows, **options)
        assert [count for _, count in losses] == [n - 1 for n in LENGTHS]
        assert [nats / count for nats, count in losses] == pytest.approx(alone, rel=1e-5)
    # 168 places for 160 tokens; in the rows' order it would be 303
    assert batches[11:15] == [[30, 30, 29], [18, 17, 16], [6, 5, 4], [3, 2]]
