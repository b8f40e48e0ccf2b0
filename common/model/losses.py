"""What `loss_of` of the training scripts is made of: the losses, or the logits, of a batch's targets.

Imports no torch, so that the scripts can import it at their top and still answer `--help` at once.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from common.text.batches import Batch


def cross_entropy(logits: "Tensor", targets: "Tensor") -> "Tensor":
    """-log p(target), [n], in nats; logits: [n, classes], targets: [n]."""
    return -logits.log_softmax(1).gather(1, targets[:, None])[:, 0]


def token_losses(
    model: "nn.Module", batch: "Batch", loss: "Callable[[Tensor, Tensor], Tensor]" = cross_entropy
) -> "Tensor":
    """The loss of every target token, [targets], fp32, without the logits of all of them in memory at once.

    model: a TokenLosses, or what Accelerate has made of one. loss: (logits [n, vocabulary] in fp32, targets [n]) ->
    losses [n], called with a few targets at a time; each loss may depend on its own target and logits only.
    """
    return model(**batch.inputs, targets=batch.targets, loss=loss)


def target_logits(model: "nn.Module", batch: "Batch") -> "Tensor":
    """The logits at every target token, [targets, vocabulary], fp32, all of them in memory.

    For losses that need more than a target and its own logits, a teacher's logits for instance.
    """
    return model(**batch.inputs)


def label_losses(logits: "Tensor", batch: "Batch") -> "Tensor":
    """The losses of a classification head, in the shape of the targets.

    logits: [rows, labels]. Cross-entropy if a row has one label; if it may have several, binary cross-entropy with
    `batch.pos_weight`.
    """
    if batch.targets.ndim == 1:
        return cross_entropy(logits, batch.targets)
    from torch.nn.functional import binary_cross_entropy_with_logits

    return binary_cross_entropy_with_logits(logits, batch.targets, pos_weight=batch.pos_weight, reduction="none")
