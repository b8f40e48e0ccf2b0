"""Where the time of a bf16 training step on a CPU goes, and what each change to it is worth.

    OMP_NUM_THREADS=2 python benchmarks/step_profile.py

One LoRA step (forward and backward, loss at 4 answer tokens a row) with transformers and PEFT as they come, and then
with each of our changes on top of the one before, in turns, in CPU seconds; beside the rate of a plain bf16 matrix
product of the model's own size. FLOPs: 4 a frozen weight and token (its own gradient is not needed), 6 a trained one;
attention is left out, and the vocabulary where nothing is predicted.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.errors import cli_errors  # noqa: E402
from common.options import option, parse_config  # noqa: E402

ANSWER = 4


@dataclass
class Config:
    """step_profile"""

    model: str = option("smollm2-135m", "hub id or local folder")
    rows: int = option(4, "rows of a step", at_least=1)
    tokens: int = option(215, "tokens of a row", at_least=8)
    lora_r: int = option(16, "rank", at_least=1)
    rounds: int = option(5, "measurements of each variant", at_least=1)


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    config = parse_config(Config)
    import peft
    import torch
    import torch.nn.functional as F
    import transformers
    from peft.tuners.lora import LoraLayer

    from common.data.report import table
    from common.hub import resolve_model
    from common.model import attention
    from common.model.token_losses import TokenLosses

    model = transformers.AutoModelForCausalLM.from_pretrained(resolve_model(config.model, None), dtype=torch.bfloat16)
    model.config.use_cache = False
    lora = peft.LoraConfig(r=config.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    ids = torch.randint(0, model.config.vocab_size, (config.rows, config.tokens))
    mask = torch.ones_like(ids)
    mask[0, : config.tokens // 10] = 0  # one row is shorter, so that a mask is needed
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    targets = ids[:, -ANSWER:].flatten()
    keep = torch.arange(ids.numel()).view_as(ids)[:, -ANSWER - 1 : -1].flatten()  # the positions that predict them
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    losses = TokenLosses(model)

    def step(positions: bool, ours: bool, autocast_alone: bool) -> None:
        model.set_attn_implementation(attention.NAME if ours else "sdpa")
        for layer in layers:
            layer.cast_input_dtype_enabled = not autocast_alone
        with torch.autocast("cpu", torch.bfloat16):
            if positions:
                loss = losses(keep, targets, **inputs).sum()
            else:
                logits = model(**inputs, logits_to_keep=ANSWER + 1).logits[:, :-1]
                loss = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
        loss.backward()
        model.zero_grad()

    variants = {
        "transformers and PEFT as they come": lambda: step(False, False, False),
        "+ answer positions, no copies of the vocabulary matrix": lambda: step(True, False, False),
        "+ grouped attention": lambda: step(True, True, False),
        "+ casts left to autocast": lambda: step(True, True, True),
    }
    size = model.config.hidden_size, model.config.intermediate_size
    left, right = torch.randn(config.rows * config.tokens, size[0]).bfloat16(), torch.randn(*size).bfloat16()
    variants["product"] = lambda: [left @ right for _ in range(100)]
    for work in variants.values():
        work()
    seconds = {name: [] for name in variants}
    for _ in range(config.rounds):
        for name, work in variants.items():
            seconds[name].append(cpu_seconds(work))
    rate = 100 * 2 * left.shape[0] * size[0] * size[1] / statistics.median(seconds.pop("product"))
    weights = [(name, p.numel() * (6 if p.requires_grad else 4)) for name, p in model.named_parameters()]
    blocks = sum(flops for name, flops in weights if "embed" not in name and "lm_head" not in name)
    head = 4 * model.get_output_embeddings().weight.numel() * ANSWER / config.tokens
    flops = config.rows * config.tokens * (blocks + head)
    rows, first = [], None
    for name, values in seconds.items():
        middle = statistics.median(values)
        first = first or middle
        share = flops / middle / rate
        listed = ", ".join(f"{value:.2f}" for value in values)
        rows.append([name, f"{middle:.2f}", f"{first / middle:.2f}", f"{share:.0%}", listed])
    print(f"{config.rows} rows of {config.tokens} tokens, {torch.get_num_threads()} thread(s), {flops / 1e9:.0f} GFLOP")
    print(f"a plain bf16 product: {rate / 1e9:.0f} GFLOP per CPU second")
    print(table(["step", "CPU s", "faster by", "of the product's rate", "rounds"], rows))


if __name__ == "__main__":
    with cli_errors():
        main()
