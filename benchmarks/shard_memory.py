"""What a process holds of a model in training, with the whole base or a part of it; on Linux, on the CPU.

    torchrun --nproc_per_node 2 benchmarks/shard_memory.py --load_in_4bit false --mixed_precision no
    torchrun --nproc_per_node 2 benchmarks/shard_memory.py --load_in_4bit false --mixed_precision no --shard_model true

Three updates on 256 random tokens, as the training scripts make them. Printed in MB, for the first process: what its
weights and AdamW's state are on paper, and how its own memory has grown since the libraries were imported; and in kB
per token and layer, how it grows in a forward pass. The options are those of the training scripts.
"""

import ctypes
import gc
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.errors import cli_errors  # noqa: E402
from common.hub import resolve_model  # noqa: E402
from common.log import say  # noqa: E402
from common.model import base_model, lora  # noqa: E402
from common.model.token_losses import TokenLosses  # noqa: E402
from common.options import RunConfig, parse_config  # noqa: E402
from common.train import loop  # noqa: E402

TOKENS = 256


def own_memory() -> float:
    """Bytes of this process's own memory, without mapped files and what was freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    config = parse_config(RunConfig)
    path = resolve_model(config.model, config.revision)
    base_model.resolve_options(config, encoder=False)
    accelerator = loop.start_accelerator(config)
    before = own_memory()
    base, missing = base_model.load_base(path, config, device=accelerator.device)
    base = lora.make_trainable(base, config, missing)
    module = TokenLosses(base)
    optimizer = loop.make_optimizer(module, config)
    model, optimizer = loop.prepare(accelerator, module, optimizer, loop.make_scheduler(optimizer, config, 3), config)
    model.train()
    per_token = []
    for _ in range(3):
        ids = torch.randint(0, base.config.vocab_size, (1, TOKENS))
        places = torch.arange(TOKENS)[None]
        start = own_memory()
        losses = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=places,
                       positions=places[0, :-1], targets=ids[0, 1:])  # fmt: skip
        per_token.append((own_memory() - start) / TOKENS / base.config.num_hidden_layers)
        accelerator.backward(losses.sum())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # so that gradients count
    weights = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters() if not p.requires_grad]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in weights)
    state = trained * (20 if accelerator.num_processes > 1 else 16)  # weights, gradients, two moments; DDP's buckets
    say(
        accelerator,
        f"on paper: frozen {frozen / 1e6:.0f} MB + trained {state / 1e6:.0f} MB = {(frozen + state) / 1e6:.0f} MB; "
        f"measured: {(own_memory() - before) / 1e6:.0f} MB; a forward pass adds {per_token[-1] / 1e3:.1f} kB per token "
        "and layer",
    )
    loop.finish(accelerator, model, optimizer)


if __name__ == "__main__":
    with cli_errors():
        main()
