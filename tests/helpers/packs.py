"""Models with an adapter, and the loss and gradients of a batch with and without a shared prefix."""

import dataclasses

import pytest
import torch

import train_cls
from common.model import base_model, classifier, lora
from common.model.token_losses import TokenLosses
from common.text.batches import collate_rows

LENGTH = 120
PRECISIONS = [{}, {"mixed_precision": "bf16"}, {"load_in_8bit": True, "mixed_precision": "bf16"},
              {"load_in_4bit": True, "mixed_precision": "bf16", "bnb_4bit_compute_dtype": "bfloat16"}]  # fmt: skip


@dataclasses.dataclass
class Options:
    model: str = "tiny"
    revision: str | None = None
    trust_remote_code: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: str = "float32"
    attn_implementation: str | None = None
    mixed_precision: str = "no"
    full_finetuning: bool = False
    lora_r: int = 4
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    target_modules: tuple = ("all-linear",)
    train_layers: int | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = "true"
    shared_prefix: str = "auto"
    max_length: int = LENGTH


def make(path, head: str | None = None, checkpointing: bool = False, **options) -> torch.nn.Module:
    """A model with an adapter whose B is not zero: with zeros, a wrong gradient of A would go unseen."""
    config = Options(target_modules=["all-linear"], **options)
    labels = ["a", "b", "c"] if head else None
    torch.manual_seed(0)
    model, missing = base_model.load_base(str(path), config, labels=labels, multi_label=head == "multi", device="cpu")
    model = lora.add_lora(model, config, missing, bool(head))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return (classifier.HeadClassifier(model, False) if head else TokenLosses(model)).train()


def measure(model: torch.nn.Module, rows: list, shared_prefix: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss per target, and the gradient of every trained weight."""
    pairs = [(row, i != 2) for i, row in enumerate(rows)]  # row 2 is a filler that must not count
    batch = collate_rows(pairs, pad_id=2, shared_prefix=shared_prefix)
    assert bool(batch.layout) == (shared_prefix == "on" and len(rows) > 1)
    loss = train_cls.loss_of(model, batch) / batch.weights.sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


def assert_same(model: torch.nn.Module, rows: list, apart: float = 1e-5) -> None:
    """apart: how far gradients may be, relative to their norm; rounding grows with the layers that they go through."""
    loss, gradients = measure(model, rows, "on")
    expected, wanted = measure(model, rows, "off")
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == wanted.keys() and any("lora_A" in name for name in wanted)
    for name, gradient in wanted.items():
        assert gradient.norm() > 0
        assert (gradients[name] - gradient).norm() <= apart * gradient.norm(), name
