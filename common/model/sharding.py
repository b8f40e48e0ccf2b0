"""A frozen base whose layers are shared out over the processes: each holds a part of every layer's weights.

torch's `fully_shard` (FSDP2) gathers a layer's weights where they are computed with, in the forward and in the backward
pass, and frees them again. Trained weights stay whole in every process, where DDP averages their gradients, so that
optimizer, checkpoints and saving are as without shards.
"""

import contextlib
from collections.abc import Iterator
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from common.errors import InputError
from common.model.lora import layer_stack


def keep_from_ddp(model: nn.Module, device: torch.device) -> None:
    """Lets DDP leave alone what `shard` will share out, and moves all else to the device.

    Accelerate wraps no model that is sharded already, and DDP would send the whole base to all processes.
    """
    shared = _shared_weights(model)
    names = [name for name, parameter in model.named_parameters() if parameter in shared]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor not in shared:
            tensor.data = tensor.to(device)


def shard(model: nn.Module, device: torch.device) -> str:
    """Shares out the frozen weights of a model on the CPU, in place, layer by layer; a line that says so.

    Whole in every process stay what is trained, norms after the layers, the vocabulary head, embeddings that are tied
    to it, and the scales of 4-bit weights. Raises InputError for weights that are quantized in another way.
    """
    base = _library_model(model)
    if getattr(base, "hf_quantizer", None) and not getattr(base, "is_loaded_in_4bit", False):
        raise InputError("--shard_model true: weights that are stored quantized can be sharded as NF4 or FP4 only.")
    keep_from_ddp(model, device)
    shared = _shared_weights(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in _parts(base):
        sharded = fully_shard(part, mesh=mesh, ignored_params=set(part.parameters()) - shared)
        sharded.unshard()  # makes the buffers that weights are gathered in: those made in inference mode serve it alone
        sharded.reshard()
    # The body, which is in every pass, has no weights of its own to share out, but makes the next layer's arrive early.
    body = _body(base)
    fully_shard(body, mesh=mesh, ignored_params={p for p in body.parameters() if not isinstance(p, DTensor)})
    parts = [(p.to_local().nbytes, p.nbytes) for p in base.parameters() if isinstance(p, DTensor)]
    mine, whole = map(sum, zip(*parts, strict=True))
    rest = sum(p.nbytes for p in base.parameters() if not isinstance(p, DTensor) and not p.requires_grad)
    return (
        f"The base is sharded: a process holds {mine / 1e6:.1f} of {whole / 1e6:.1f} MB of its layers, and whole "
        f"{rest / 1e6:.1f} MB of other frozen weights"
    )


@contextlib.contextmanager
def lock_step(model: nn.Module) -> Iterator[None]:
    """Processes make as many passes as they need, though a pass of a sharded model takes all of them.

    Before a pass, each says that it has one to make; one that has finished makes passes of a single token until the
    others have finished too. All processes enter the block together, without gradients and in the precision of the
    model. Of a model that is not sharded, nothing changes.
    """
    body = next((module for module in model.modules() if isinstance(module, FSDPModule)), None)
    if body is None:
        yield
        return
    device = next(body.parameters()).device  # type: ignore[attr-defined]

    def passes(mine: int) -> bool:
        """Whether any process has a pass to make."""
        count = torch.tensor(mine, device=device)
        dist.all_reduce(count)
        return count.item() > 0

    def announce(*_: object) -> None:
        passes(1)

    hook = body.register_forward_pre_hook(announce, prepend=True)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        hook.remove()
    with torch.no_grad():
        while passes(0):
            body(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))  # type: ignore[operator]


def _library_model(model: nn.Module) -> PreTrainedModel:
    """transformers' model inside PEFT's and our own modules."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _body(base: PreTrainedModel) -> nn.Module:
    return getattr(base, base.base_model_prefix, base)


def _parts(base: PreTrainedModel) -> list[nn.Module]:
    """What is gathered at a time: each layer, and the input embeddings where they are not the output's too."""
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    return [*layer_stack(base)[1], *([] if tied else [embeddings])]


def _shared_weights(model: nn.Module) -> set[nn.Parameter]:
    """The frozen weights of the parts."""
    parts = _parts(_library_model(model))
    return {parameter for part in parts for parameter in part.parameters() if not parameter.requires_grad}
