"""A classifier: a model and the renderer of its prompts; a classification head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from common.errors import InputError
from common.model.base_model import start_ids
from common.text.prompts import ClassificationPrompt


class HeadClassifier(nn.Module):
    """A sequence classifier that reads a decoder's hidden state at one given position of each row.

    transformers' own pooling looks for the last id that is not the pad id, which is the wrong token where a text ends
    with that id (pad == eos). Encoders pool in their own way, and need no positions. A decoder's head is in fp32
    (base_model.load_base) and computes in it; an encoder's computes as its other layers do.
    """

    def __init__(self, model: nn.Module, encoder: bool) -> None:
        super().__init__()
        self.model, self.encoder = model, encoder

    def forward(
        self,
        positions: torch.Tensor,  # [rows], where in the flattened batch the hidden states to classify are
        **inputs: Any,  # input_ids, attention_mask, position_ids, layout: see common.text.batches.Batch
    ) -> torch.Tensor:  # logits [rows, labels], fp32
        base: Any = self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model
        if self.encoder:
            return base(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()
        hidden = getattr(base, base.base_model_prefix)(**inputs, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):  # in bf16, logits of 4 are multiples of 1/32
            return base.score(hidden.flatten(0, 1)[positions].float())


def classification_prompt(tokenizer: PreTrainedTokenizerBase, encoder: bool, **fields: Any) -> ClassificationPrompt:
    """A prompt renderer with the tokenizer's own special ids: BOS at the front, the end token after an answer.

    Encoders get their own pair ([CLS] ... [SEP]); a decoder with a head reads the end token that closes the text.
    fields: the other arguments of ClassificationPrompt. Raises InputError if the tokenizer has no end token.
    """
    if encoder:
        special = tokenizer("")["input_ids"]
        start, end = special[:1], special[-1:]
    else:
        if tokenizer.eos_token_id is None:
            raise InputError("The tokenizer has no end token (eos), so an answer could not end.")
        start, end = start_ids(tokenizer), [tokenizer.eos_token_id]

    def encode(texts: Sequence[str], plain: bool) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=plain)["input_ids"]

    return ClassificationPrompt(encode, start=start, end=end, **fields)


@dataclass
class Classifier:
    """A model with what is needed to prompt it and to read its answers.

    model: a HeadClassifier, or a causal language model, which answers with a label's text.
    """

    model: nn.Module
    prompt: ClassificationPrompt
    tokenizer: PreTrainedTokenizerBase

    @property
    def head(self) -> bool:
        return isinstance(self.model, HeadClassifier)

    @property
    def encoder(self) -> bool:
        return isinstance(self.model, HeadClassifier) and self.model.encoder
