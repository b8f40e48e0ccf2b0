"""The verbs of a training loop. Each returns a value; none owns the loop, which stands in the scripts."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from common.errors import InputError
from common.model.base_model import unpacked_size
from common.text.batches import Batch, to_device
from common.text.plan import rank_share


def start_accelerator(config: Any, trackers: list[str]) -> Accelerator:
    """The Accelerator of one run; sets threads and TF32.

    `accelerate launch` gives every CPU process one thread, so threads are set here: the cores this process may use,
    divided by the processes on this machine.
    """
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise InputError("fp16 (--mixed_precision, or as trained) needs a GPU. Set --mixed_precision bf16 or no.")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it, several CPU processes would each train alone
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=1,  # accumulation is the loop's own
        log_with=trackers or None,
        project_config=ProjectConfiguration(logging_dir="logs"),  # RunLog sets the real folder
    )
    if accelerator.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(config.num_threads or max(1, cores // local))
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    return accelerator


def label_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum of weight x loss over rows (one label: cross-entropy) or rows x labels (several: binary cross-entropy).

    batch["pos_weight"], if present: [labels], the factor of the positive targets of each label.
    """
    targets = batch["targets"]
    if targets.is_floating_point():
        losses = F.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=batch.get("pos_weight"), reduction="none"
        )
    else:
        losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * batch["weights"]).sum()


def micro_batches(
    rows: Sequence[int], batch_size: int, accelerator: Accelerator, collate: Callable[[list[tuple[int, bool]]], Batch]
) -> list[Batch]:
    """This rank's share of one update, collated, on its device."""
    shares = rank_share(rows, batch_size, accelerator.process_index, accelerator.num_processes)
    return [to_device(collate(share), accelerator.device) for share in shares]


def count_targets(micro: Sequence[Batch]) -> torch.Tensor:
    """The sum of the weights: what the update's loss is divided by, once summed over the ranks."""
    return torch.stack([batch["weights"].sum() for batch in micro]).sum()


@contextlib.contextmanager
def sync_context(accelerator: Accelerator, model: torch.nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged in an update's last micro-batch only.

    Sets `sync_gradients` too, because DeepSpeed's backward steps whenever that is true.
    """
    accelerator.gradient_state._set_sync_gradients(last)
    with contextlib.nullcontext() if last else accelerator.no_sync(model):
        yield


def finite_mean(
    summed: torch.Tensor,
    targets: torch.Tensor,
    norm: torch.Tensor,
    accelerator: Accelerator,
    update: int,
    rows: Sequence[str],
) -> float:
    """The loss of one update per target; stops the run before a broken gradient reaches the weights.

    norm: of the gradient; under fp16 the scaler itself skips an update whose gradient overflows. rows: the ids of the
    update's rows. Raises InputError for an update without a target, FloatingPointError for a loss or gradient that is
    not finite.
    """
    if targets.item() <= 0:
        raise InputError(f"Update {update + 1} has no target to learn from (rows {', '.join(rows)}).")
    loss = summed.item() / targets.item()
    if not math.isfinite(loss) or accelerator.scaler is None and not math.isfinite(norm):
        raise FloatingPointError(
            f"Update {update + 1} has loss {loss} and gradient norm {float(norm)}, so it was not made. Its rows: "
            f"{', '.join(rows)}. "
            "Try a lower --learning_rate, a longer --warmup_ratio or --mixed_precision no."
        )
    return loss


def make_optimizer(model: torch.nn.Module, config: Any) -> torch.optim.Optimizer:
    """AdamW over the trainable weights; no decay of one-dimensional ones (norms, biases)."""
    groups = [
        {
            "params": [p for p in model.parameters() if p.requires_grad and p.ndim > 1],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in model.parameters() if p.requires_grad and p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    import bitsandbytes

    kind = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kind[config.optim](groups, lr=config.learning_rate)


def make_scheduler(optimizer: torch.optim.Optimizer, config: Any, updates: int) -> Any:
    """Stepped once an update, so it is not prepared: a prepared one steps `num_processes` times."""
    return transformers.get_scheduler(
        config.lr_scheduler_type, optimizer, math.ceil(config.warmup_ratio * updates), updates
    )


def total_updates(config: Any, updates_per_epoch: int) -> int:
    """--max_steps, else --num_train_epochs in updates."""
    return config.max_steps or max(1, round(config.num_train_epochs * updates_per_epoch))


def is_due(strategy: str, steps: int | None, update: int, updates_per_epoch: int, total: int) -> bool:
    """Whether something happens after `update` updates: every `steps`, or at an epoch's end, and at the very end."""
    if strategy == "no":
        return False
    return update == total or update % (steps if strategy == "steps" else updates_per_epoch) == 0


def flops_per_token(model: torch.nn.Module) -> float:
    """Forward and backward: 4 a frozen weight (no gradient of its own), 6 a trained one; attention is left out."""
    flops = 0.0
    for name, parameter in model.named_parameters():
        if "embed" not in name:
            flops += unpacked_size(parameter) * (6 if parameter.requires_grad else 4)
    return flops


def peak_memory(device: torch.device) -> int:
    """Bytes: what the device's allocator held at most, or this process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def evaluation_cost(rows: int, started: float, device: torch.device) -> dict[str, float]:
    """eval_runtime in seconds since `started` (a perf_counter), examples_per_second, peak_memory_bytes."""
    seconds = time.perf_counter() - started
    return {
        "eval_runtime": seconds,
        "examples_per_second": rows / seconds,
        "peak_memory_bytes": peak_memory(device),
    }


def finish(accelerator: Accelerator, *objects: Any, another: bool = False) -> None:
    """Ends a run; two processes can hang at exit unless memory is freed and all have arrived first.

    another: one more run follows in these processes, so they stay connected.
    """
    accelerator.free_memory(*objects)
    accelerator.wait_for_everyone()
    if another:
        for tracker in accelerator.trackers:
            tracker.finish()
    else:
        accelerator.end_training()
