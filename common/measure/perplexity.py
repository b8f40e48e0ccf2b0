"""The losses of blocks of text or of conversations, row by row, and a sample of what a model writes."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from common.data.corpus import Block
from common.log import Progress
from common.memory import give_back
from common.model.losses import token_losses
from common.model.sharding import lock_step
from common.text.batches import Batch
from common.text.chat import ChatRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLE_TOKENS = 60


@torch.inference_mode()
def row_losses(
    model: nn.Module,
    rows: Sequence[Block] | Sequence[ChatRow],
    *,
    collate: Callable[[list[tuple[Any, bool]]], Batch],
    accelerator: Accelerator,
    batch_size: int,
    what: str,
) -> list[tuple[float, int]]:
    """(loss sum in nats, predicted tokens) of every row, in the rows' order, on every process.

    The processes share the rows, and a batch has rows of similar lengths. model: a TokenLosses. collate: (row, True)
    pairs -> batch. what: of the progress bar.
    """
    model = accelerator.unwrap_model(model).eval()
    lengths = [row.length for row in rows]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])  # the batch that needs most memory first
    share = order[accelerator.process_index :: accelerator.num_processes]
    progress = Progress(accelerator, what, len(share))
    results: list[tuple[int, float, int]] = []
    give_back(accelerator.device.type, at_once=True)  # of what came before, as training
    with accelerator.autocast(), lock_step(model):
        for start in range(0, len(share), batch_size):
            numbers = share[start : start + batch_size]
            batch = collate([(rows[number], True) for number in numbers]).to(accelerator.device)
            losses = token_losses(model, batch).double()
            nats = losses.new_zeros(len(numbers)).index_add(0, batch.rows, losses)
            counts = torch.bincount(batch.rows, minlength=len(numbers))
            results += zip(numbers, nats.tolist(), counts.tolist(), strict=True)
            progress(len(numbers))
            give_back(accelerator.device.type)
    gathered = sorted(gather_object(results))
    return [(nats, count) for _, nats, count in gathered]


@torch.inference_mode()
def continue_text(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, accelerator: Accelerator, seed: int
) -> str:
    """The prompt and up to SAMPLE_TOKENS tokens after it, drawn (temperature 0.8, top_p 0.95) by `seed`."""
    model.eval()
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    inputs = torch.tensor([ids], device=accelerator.device)
    torch.manual_seed(seed)
    with accelerator.autocast(), lock_step(model):  # one process may draw another token, and end earlier
        output = model.generate(  # type: ignore[operator]
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=SAMPLE_TOKENS, use_cache=True,
            do_sample=True, temperature=0.8, top_p=0.95, top_k=0, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
