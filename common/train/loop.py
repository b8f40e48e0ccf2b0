"""The steps of a training loop, as functions that return values; the loop itself is in the scripts."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from common.errors import InputError, Terminated
from common.log import reset_peak_memory, say, set_threads, uses_gpu
from common.memory import give_back, keep_few_kernels
from common.model.base_model import unpacked_size
from common.model.lora import outside_text
from common.model.sharding import keep_from_ddp, shard
from common.options import LoopConfig
from common.text.batches import Batch
from common.text.plan import rank_share
from common.train.checkpoints import register_hooks

T = TypeVar("T")
ONE_SIGNAL = 1.0  # seconds; a terminal sends Ctrl-C to all processes, and torchrun passes it on to those it started
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # names of their number in config.json
PATIENCE = timedelta(hours=12)  # one process reads a long corpus or fits TF-IDF, and the others wait for it
# What shards a model, by the flag that `accelerate launch` sets. On a CPU, Accelerate itself would ignore it.
ENGINES = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
           "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM", "parallelism": "ACCELERATE_USE_PARALLELISM_CONFIG"}  # fmt: skip


def start_accelerator(config: Any, trackers: Sequence[str] = ()) -> Accelerator:
    """The Accelerator of one run or evaluation; sets threads, TF32 and what oneDNN keeps."""
    for engine, flag in ENGINES.items():
        if os.environ.get(flag, "false").lower() == "true":
            raise InputError(
                f"The launcher asks for {engine}, which is not supported here. What shards a base that is too large "
                "for one GPU is --shard_model true, launched with configs/accelerate/multi_gpu.yaml."
            )
    if config.mixed_precision == "fp16" and not uses_gpu():
        raise InputError("fp16 (--mixed_precision, or as trained) needs a GPU. Set --mixed_precision bf16 or no.")
    keep_few_kernels()
    accelerator = Accelerator(
        cpu=not uses_gpu(),  # without it, several CPU processes would each train alone
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=1,  # accumulation is the loop's own
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(logging_dir="logs"),  # RunLog sets the real folder
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    reset_peak_memory()  # of this run alone
    if accelerator.device.type == "cpu":
        set_threads(config.num_threads, int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
    if config.shard_model and accelerator.num_processes == 1:
        raise InputError("--shard_model true needs several processes, and there is one. Launch with --num_processes 2.")
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    return accelerator


def micro_batches(
    rows: Sequence[Any],
    batch_size: int,
    accelerator: Accelerator,
    collate: Callable[[Sequence[tuple[Any, bool]]], Batch],
) -> list[Batch]:
    """This rank's share of the rows of one update, collated, on its device.

    collate: (row, counts) pairs -> batch; a row that does not count fills up the share of a rank that lacks one.
    """
    shares = rank_share(rows, batch_size, accelerator.process_index, accelerator.num_processes)
    return [collate(share).to(accelerator.device) for share in shares]


def count_targets(batches: Sequence[Batch]) -> torch.Tensor:
    """The sum of the weights: what the update's loss is divided by, once summed over the ranks."""
    return torch.stack([batch.weights.sum() for batch in batches]).sum()


@contextlib.contextmanager
def sync_context(accelerator: Accelerator, model: torch.nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged in an update's last micro-batch only."""
    with contextlib.nullcontext() if last else accelerator.no_sync(model):
        yield


def finite_mean(
    loss_sum: float,
    target_count: float,
    norm: float,
    accelerator: Accelerator,
    update: int,
    rows: Iterable[str],
) -> float:
    """The mean loss per target of one update; stops the run before a broken gradient reaches saved weights.

    norm: of the gradient; under fp16 the scaler itself skips an update whose gradient overflows. rows: the ids of the
    update's rows. Raises InputError for an update without a target, FloatingPointError for a loss or gradient that is
    not finite.
    """
    if target_count <= 0:
        raise InputError(f"Update {update + 1} has no target to learn from (rows {', '.join(rows)}).")
    loss = loss_sum / target_count
    if not math.isfinite(loss) or accelerator.scaler is None and not math.isfinite(norm):
        raise FloatingPointError(
            f"Update {update + 1} has loss {loss} and gradient norm {norm}, so nothing of it was saved. Its rows: "
            f"{', '.join(rows)}. "
            "Try a lower --learning_rate, a longer --warmup_ratio or --mixed_precision no."
        )
    return loss


def make_optimizer(model: torch.nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
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


def make_scheduler(optimizer: torch.optim.Optimizer, config: LoopConfig, updates: int) -> LRScheduler:
    """Stepped once per update, so it is not prepared: a prepared one steps `num_processes` times.

    transformers' schedule, begun at its second step if there is a warm-up: at its first one the rate is 0, so that the
    first update, and with one update the whole run, would change nothing.
    """
    warmup = math.ceil(config.warmup_ratio * updates)
    first = min(1, warmup)
    sample = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    shape = transformers.get_scheduler(config.lr_scheduler_type, sample, warmup, updates + first).lr_lambdas[0]
    return LambdaLR(optimizer, lambda step: shape(step + first))


def learning_rates(scheduler: LRScheduler) -> dict[str, float]:
    """The rates of the next update by name: of the first parameter group, and of those that have another one."""
    first, *others = map(float, scheduler.get_last_lr())
    return {"learning_rate": first} | {f"learning_rate_{i}": r for i, r in enumerate(others, 1) if r != first}


def total_updates(config: LoopConfig, updates_per_epoch: int) -> int:
    """--max_steps, else --num_train_epochs in updates."""
    return config.max_steps or max(1, round(config.num_train_epochs * updates_per_epoch))


def is_due(strategy: str, steps: int | None, update: int, updates_per_epoch: int, total: int) -> bool:
    """Whether something happens after `update` updates: every `steps`, or at an epoch's end, and at the very end."""
    if strategy == "no":
        return False
    return update == total or update % (steps if strategy == "steps" else updates_per_epoch) == 0


def flops_per_token(model: transformers.PreTrainedModel) -> float:
    """Without attention and the vocabulary: 6 per trained weight, 4 per frozen one, which has no gradient of its own.

    The product with the vocabulary is computed for targets alone. Only 2 per weight below the lowest trained one, where
    the backward pass ends. Of experts, those count that a token takes.
    """
    flops, backward, settings = 0.0, False, model.config.get_text_config()
    experts = next(filter(None, (getattr(settings, name, None) for name in EXPERTS)), 1)
    taken = (getattr(settings, "num_experts_per_tok", None) or experts) / experts
    unused = {getattr(model.get_output_embeddings(), "weight", None), *outside_text(model)}
    for name, parameter in model.named_parameters():
        backward |= parameter.requires_grad
        if "embed" not in name and parameter not in unused:
            share = taken if ".experts." in name else 1
            flops += share * unpacked_size(parameter) * (6 if parameter.requires_grad else 4 if backward else 2)
    return flops


def prepare(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler,
    config: Any,
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Model and optimizer wrapped for the ranks; checkpoints will hold the trained weights, not the base's.

    config: a script's Config.
    """
    if config.torch_compile:
        model.compile(dynamic=True)
    quantized = config.load_in_4bit or config.load_in_8bit  # such weights cannot be moved
    if config.shard_model:
        keep_from_ddp(model, accelerator.device)
    movable = not quantized and not config.shard_model
    model, optimizer = accelerator.prepare(model, optimizer, device_placement=[movable, True])
    if config.shard_model:
        say(accelerator, shard(accelerator.unwrap_model(model), accelerator.device))
    register_hooks(accelerator, scheduler)
    return model, optimizer


def until_stopped(updates: Iterable[T], accelerator: Accelerator, save: Callable[[], None]) -> Generator[T]:
    """The updates, until SIGTERM or Ctrl-C: then the update in progress is finished, and saved.

    Raises Terminated or KeyboardInterrupt after that, on all ranks; at a second signal at once.
    """
    signals = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    came: dict[int, float] = {}  # signal -> when

    def note(number: int, frame: Any) -> None:
        if number in came:
            if time.monotonic() - came[number] > ONE_SIGNAL:
                raise signals[signal.Signals(number)]
            return
        came[number] = time.monotonic()
        say(accelerator, "Stopping after this update, with a checkpoint. Ctrl-C again stops at once.")

    before = {number: signal.signal(number, note) for number in signals}
    try:
        for update in updates:
            yield update
            give_back(accelerator.device.type)
            flags = torch.tensor([number in came for number in signals], dtype=torch.int)
            if accelerator.num_processes > 1:  # a signal may reach the ranks in different updates
                flags = accelerator.reduce(flags.to(accelerator.device), "sum")
            for error, flag in zip(signals.values(), flags.tolist(), strict=True):
                if flag:
                    save()
                    raise error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe_plan(accelerator: Accelerator, updates: int, rows_per_update: int, what: str = "rows") -> str:
    """How much will be trained, and on what, for people."""
    return (
        f"{updates} updates of {rows_per_update} {what}; {accelerator.num_processes} process(es) on "
        f"{accelerator.device.type}, {torch.get_num_threads()} thread(s) each"
    )


def finish(accelerator: Accelerator, *objects: Any, last: bool = True) -> None:
    """Ends a run; two processes can hang at exit unless memory is freed and all have arrived first.

    last: no further run follows in these processes, so they may disconnect.
    """
    accelerator.free_memory(*objects)
    accelerator.wait_for_everyone()
    if last:
        accelerator.end_training()
    else:
        for tracker in accelerator.trackers:
            tracker.finish()
        AcceleratorState._reset_state()  # the next one may have another precision
