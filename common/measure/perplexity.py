"""The losses of a text's blocks or of conversations, row by row, however batched or shared among processes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from common.log import Progress
from common.text.batches import Batch, to_device

UNTRAINED = "untrained base"
SAMPLE_TOKENS = 60


@torch.inference_mode()
def row_losses(
    model: nn.Module,
    lengths: Sequence[int],
    accelerator: Any,
    batch_size: int,
    collate: Callable[[list[tuple[int, bool]]], Batch],
    what: str,
) -> list[tuple[float, int]]:
    """(nats, predicted tokens) of every row, in their order, on every process.

    model: a TokenLosses. lengths: tokens of each row; a batch has rows of like lengths. collate: (row number, True)
    pairs -> batch, whose `rows` say which row a target belongs to.
    """
    model = accelerator.unwrap_model(model).eval()
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])  # the most memory is asked for first
    share = order[accelerator.process_index :: accelerator.num_processes]
    progress = Progress(accelerator, what, len(share))
    results = []
    for start in range(0, len(share), batch_size):
        numbers = share[start : start + batch_size]
        batch = to_device(collate([(number, True) for number in numbers]), accelerator.device)
        with accelerator.autocast():
            losses = model(**batch["inputs"]).double()
        row = batch["rows"]
        nats = torch.zeros(len(numbers), dtype=torch.double, device=row.device).index_add(0, row, losses)
        counts = torch.bincount(row, minlength=len(numbers))
        results += zip(numbers, nats.tolist(), counts.tolist(), strict=True)
        progress(len(numbers))
    gathered = sorted(gather_object(results))
    return [(nats, count) for _, nats, count in gathered]


@torch.inference_mode()
def continue_text(model: nn.Module, tokenizer: Any, prompt: str, accelerator: Any, seed: int) -> str:
    """The prompt and up to SAMPLE_TOKENS tokens behind it, drawn (temperature 0.8, top_p 0.95) by `seed`."""
    model.eval()
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    inputs = torch.tensor([ids], device=accelerator.device)
    torch.manual_seed(seed)
    with accelerator.autocast():
        output = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=SAMPLE_TOKENS, use_cache=True,
            do_sample=True, temperature=0.8, top_p=0.95, top_k=0, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    return tokenizer.decode(output[0], skip_special_tokens=True)
