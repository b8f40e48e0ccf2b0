"""Losses of target tokens without the logits of all of them in memory at once."""

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from common.model.losses import cross_entropy

CHUNK = 2**22  # logits that are held at a time: 16 MB in fp32
CHUNK_ON_GPU = 2**26  # a GPU reads the head's weights for each chunk, so few positions at a time would be slow

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits [n, vocabulary], targets [n] -> losses [n]


class TokenLosses(nn.Module):
    """A causal language model that returns losses, or logits, at the target tokens only.

    For losses, the vocabulary head is applied to a few positions at a time. Where the head is frozen, as under LoRA,
    the gradient of the hidden states is computed along with the losses, so nothing is computed twice; where it is
    trained, the logits are computed again in the backward pass. A model whose logits are not the head's output (a soft
    cap, a scale), which a trial finds out, computes them all at once in its own way.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.chunked = _head_gives_logits(model)

    def forward(
        self,
        positions: torch.Tensor,  # [targets], where in the flattened batch they are predicted
        targets: torch.Tensor | None = None,  # [targets]; None: logits are wanted
        loss: Loss = cross_entropy,
        **inputs: Any,  # input_ids, attention_mask, position_ids, layout: see common.text.batches.Batch
    ) -> torch.Tensor:  # losses [targets], or logits [targets, vocabulary], fp32
        if not self.chunked:
            logits = self._logits(positions, inputs)
            return logits if targets is None else loss(logits, targets)
        base = _base(self.model)
        hidden = _body(base)(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[positions]
        head = base.get_output_embeddings()
        if targets is None:
            return head(hidden).float()
        size = max(1, (CHUNK if hidden.device.type == "cpu" else CHUNK_ON_GPU) // head.weight.shape[0])
        if any(parameter.requires_grad for parameter in head.parameters()):
            parts = zip(hidden.split(size), targets.split(size), strict=True)
            return torch.cat([checkpoint(_losses, head, loss, *part, use_reentrant=False) for part in parts])
        return _FrozenHeadLosses.apply(hidden, targets, head, loss, size)

    def _logits(self, positions: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """[targets, vocabulary], as the model computes them, for the columns of the batch with a target."""
        length = inputs["input_ids"].shape[1]
        columns, places = (positions % length).unique(return_inverse=True)
        logits = self.model(**inputs, use_cache=False, logits_to_keep=columns).logits
        if logits.shape[1] == length:  # a few models ignore logits_to_keep
            logits = logits[:, columns]
        return logits[positions // length, places].float()


class _FrozenHeadLosses(torch.autograd.Function):
    """Losses in chunks, with d loss / d hidden of each: a token's loss depends on its own hidden state alone."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module, loss: Loss, size: int
    ) -> torch.Tensor:
        losses, gradients = [], []
        for states, wanted in zip(hidden.split(size), targets.split(size), strict=True):
            if ctx.needs_input_grad[0]:
                part, gradient = _losses_and_gradient(head, loss, states, wanted)
                gradients.append(gradient)
            else:
                part = _losses(head, loss, states, wanted)
            losses.append(part)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0][:, None]).to(gradient.dtype), None, None, None, None


def _losses_and_gradient(
    head: nn.Module, loss: Loss, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [n], and the gradient of each with respect to its hidden state, [n, size]."""
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        logits = head(hidden)
        if loss is not cross_entropy:
            losses = loss(logits.float(), targets)
            return losses.detach(), torch.autograd.grad(losses, hidden, torch.ones_like(losses))[0]
    # Cross-entropy by hand: its gradient is written over the logits, of which autograd would hold several copies.
    scores = logits.detach().float()
    total = scores.logsumexp(1)
    losses = total - scores.gather(1, targets[:, None])[:, 0]
    scores.sub_(total[:, None]).exp_()  # softmax, and then its difference from the target
    scores[torch.arange(len(targets), device=targets.device), targets] -= 1
    return losses, torch.autograd.grad(logits, hidden, scores.to(logits.dtype))[0]


def _losses(head: nn.Module, loss: Loss, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return loss(head(hidden).float(), targets)


def _base(model: nn.Module) -> PreTrainedModel:
    base: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return base


def _body(base: PreTrainedModel) -> nn.Module:
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
