"""The cross-entropy of tokens without the logits of all of them in memory at once."""

from collections.abc import Sequence
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

CHUNK = 2**22  # logits that are held at a time: 16 MB in fp32
CHUNK_ON_GPU = 2**26  # a GPU reads the vocabulary's matrix for each chunk, so few positions at a time would be slow


class TokenLosses(nn.Module):
    """A causal language model that returns the loss of every target token instead of logits.

    The vocabulary's matrix is applied to a few positions at a time. Where it is frozen, as under LoRA, the gradient of
    the hidden states is computed along with the losses, so nothing is computed twice; where it is trained, the logits
    are computed again in the backward pass. A model that changes its logits behind that matrix (a soft cap, a scale)
    is found out by a trial and computes them all at once, its own way.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.chunked = _head_gives_logits(model)

    def forward(
        self,
        keep: torch.Tensor,  # [targets], the positions in the flattened batch that predict them
        targets: torch.Tensor,  # [targets]
        **inputs: torch.Tensor,  # input_ids, attention_mask, position_ids
    ) -> torch.Tensor:  # [targets], nats, fp32
        base = _base(self.model)
        if not self.chunked:
            length = inputs["input_ids"].shape[1]
            columns, places = (keep % length).unique(return_inverse=True)
            logits = self.model(**inputs, use_cache=False, logits_to_keep=columns).logits
            if logits.shape[1] == length:  # a few models return all, whatever they are asked for
                logits = logits[:, columns]
            return F.cross_entropy(logits[keep // length, places].float(), targets, reduction="none")
        hidden = _body(base)(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[keep]
        head = base.get_output_embeddings()
        size = max(1, (CHUNK if hidden.device.type == "cpu" else CHUNK_ON_GPU) // head.weight.shape[0])
        if any(parameter.requires_grad for parameter in head.parameters()):
            parts = zip(hidden.split(size), targets.split(size), strict=True)
            return torch.cat([checkpoint(_losses, head, *part, use_reentrant=False) for part in parts])
        return _FrozenHeadLosses.apply(hidden, targets, head, size)


class _FrozenHeadLosses(torch.autograd.Function):
    """Losses in chunks, with d loss / d hidden of each: a token's loss depends on its own hidden state alone."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module, size: int) -> torch.Tensor:
        losses, gradients = [], []
        for states, wanted in zip(hidden.split(size), targets.split(size), strict=True):
            if not ctx.needs_input_grad[0]:
                losses.append(_losses(head, states, wanted))
                continue
            with torch.enable_grad():
                states = states.detach().requires_grad_()
                logits = head(states)
            scores = logits.detach().float()
            total = scores.logsumexp(1)
            losses.append(total - scores.gather(1, wanted[:, None])[:, 0])
            share = scores.sub_(total[:, None]).exp_()  # softmax, and then its difference to the target
            share[torch.arange(len(wanted), device=share.device), wanted] -= 1
            gradients += torch.autograd.grad(logits, states, share.to(logits.dtype))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Sequence[torch.Tensor | None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None


def _losses(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def _body(base: nn.Module) -> nn.Module:
    """The model below its vocabulary head."""
    return getattr(base, base.base_model_prefix)


@torch.no_grad()
def _head_gives_logits(model: nn.Module) -> bool:
    """Whether the logits are the head's output and nothing else, tried on a few tokens."""
    base = _base(model)
    head = base.get_output_embeddings()
    if head is None or not hasattr(base, base.base_model_prefix):
        return False
    training, dtype = base.training, base.dtype
    ids = torch.arange(4, device=head.weight.device)[None]
    base.eval()
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):  # adapters are in fp32
        hidden = _body(base)(input_ids=ids, use_cache=False).last_hidden_state
        same = torch.equal(head(hidden), base(input_ids=ids, use_cache=False).logits)
    base.train(training)
    return same
