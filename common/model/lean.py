"""Norms and gates of Llama-like models that keep less for the backward pass: the same numbers in less memory.

Written in plain operations, a norm keeps its input in fp32 and a gated layer its activation, though both take a moment
to compute again from what is kept anyway. Applied where a layer's code is that of transformers' Llama layers, which
Mistral, Qwen and most others share word for word; other layers stay as they are.
"""

from types import CodeType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


class _Norm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in fp32 but for the last product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (upstream * normed.to(x.dtype)).flatten(0, -2).sum(0)
        wide = (upstream * weight).float()
        shared = (wide * normed).mean(-1, keepdim=True)
        return wide.sub_(normed.mul_(shared)).mul_(scale), of_weight, None


class _Gate(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(upstream * up, gate), upstream * F.silu(gate)


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return _Norm.apply(hidden_states, self.weight, self.variance_epsilon)


def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(_Gate.apply(self.gate_proj(x), self.up_proj(x)))


def use(model: nn.Module) -> None:
    """Lets the layers that compute as Llama's do keep less."""
    for module in model.modules():
        if _same(type(module), LlamaRMSNorm):
            module.forward = MethodType(_norm, module)
        elif _same(type(module), LlamaMLP) and isinstance(module.act_fn, SiLUActivation):
            module.forward = MethodType(_mlp, module)


def undo(model: nn.Module) -> None:
    """Gives the layers their own way back."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in (_norm, _mlp):
            del module.forward


def _same(kind: type, known: type) -> bool:
    a, b = getattr(kind.forward, "__code__", None), known.forward.__code__
    return isinstance(a, CodeType) and (a.co_code, a.co_names, a.co_consts) == (b.co_code, b.co_names, b.co_consts)
