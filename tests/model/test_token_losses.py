"""Losses of tokens in chunks: the same numbers as from all logits at once, in less memory."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers.models import FAMILIES
from helpers.packs import PRECISIONS, make
from peft import LoraConfig, get_peft_model

from common.model import token_losses
from common.model.token_losses import TokenLosses

LENGTH = 24


def small(kind: type, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(kind(**{**shape, **changes})).float()


def batch(vocabulary: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(vocabulary, (3, LENGTH))
    keep = torch.tensor([i for i in range(3 * LENGTH - 1) if i % LENGTH != LENGTH - 1 and i % 5])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, keep, ids.flatten()[keep + 1]


def compare(model: torch.nn.Module, vocabulary: int, chunked: bool) -> None:
    """Losses and every gradient, against the model's own logits."""
    inputs, keep, targets = batch(vocabulary)
    weights = torch.rand(len(keep))
    ours = TokenLosses(model)
    assert ours.chunked is chunked
    wanted = F.cross_entropy(model(**inputs).logits.flatten(0, 1)[keep], targets, reduction="none")
    losses = ours(keep, targets, **inputs)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad((wanted * weights).sum() / 7, list(trained.values()))
    found = torch.autograd.grad((losses * weights).sum() / 7, list(trained.values()))
    for name, a, b in zip(trained, expected, found, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm() + 1e-9, name
    with torch.no_grad():
        torch.testing.assert_close(ours(keep, targets, **inputs), wanted, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Seven tokens of these vocabularies at a time."""
    monkeypatch.setattr(token_losses, "CHUNK", 7 * 60)


def adapted(model: torch.nn.Module, **options) -> torch.nn.Module:
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options))
    return model.train()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("whole", [False, True], ids=["lora", "full"])
def test_losses_and_gradients_are_those_of_all_logits(models, family, whole):
    """LoRA (a frozen head) and full fine-tuning, where a tied vocabulary matrix gets gradient from both its uses."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32)
    compare(model.train() if whole else adapted(model, target_modules="all-linear"), 600, chunked=True)


def test_lora_on_the_head_itself_is_trained():
    model = adapted(small(transformers.LlamaConfig), target_modules=["q_proj", "lm_head"])
    compare(model, 60, chunked=True)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (transformers.Gemma2Config, {"final_logit_softcapping": 2.0}),
        (transformers.GraniteConfig, {"logits_scaling": 3.0}),
        (transformers.CohereConfig, {"logit_scale": 0.5}),
    ],
)
def test_a_model_that_changes_its_logits_keeps_its_own_way(kind, changes):
    """At the columns of the batch that predict something, or, if it knows no such choice, at all."""
    base, seen = small(kind, **changes), []
    model = adapted(base, target_modules="all-linear")
    compare(model, 60, chunked=False)
    base.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    inputs, _, targets = batch(60)
    TokenLosses(model)(torch.tensor([20, 22, LENGTH + 22]), targets[:3], **inputs)
    assert seen[-1] == (3, 2, 60)
    forward = base.forward
    base.forward = lambda logits_to_keep=0, **inputs: forward(**inputs)
    compare(model, 60, chunked=False)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_known_in_every_precision(models, family, precision):
    """The trial compares bits; adapters in fp32 and quantized layers must not hide that they are the same."""
    assert make(models[family], **precision).chunked


def test_checkpointing_and_an_update_without_a_target(models):
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    model = adapted(model, target_modules="all-linear")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compare(model, 600, chunked=True)
    inputs, keep, targets = batch(600)
    TokenLosses(model)(keep[:0], targets[:0], **inputs).sum().backward()  # a rank's share may be rows that do not count
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_logits_are_never_all_in_memory(monkeypatch):
    """However long the rows, the head sees a chunk of them."""
    model = adapted(small(transformers.LlamaConfig), target_modules="all-linear")
    ours, seen = TokenLosses(model), []
    head = ours.model.get_base_model().lm_head
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel()))
    inputs, keep, targets = batch(60)
    ours(keep, targets, **inputs).sum().backward()
    assert max(seen) == 7 * 60 and sum(seen) == len(keep) * 60
