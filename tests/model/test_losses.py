"""The losses that `loss_of` is made of, and the ones that a user may write in its place."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers.models import FAMILIES
from helpers.packs import make
from torch.nn.parallel import DistributedDataParallel

from common.model import token_losses as token_losses_module
from common.model.losses import cross_entropy, label_losses, target_logits, token_losses
from common.model.token_losses import TokenLosses
from common.text.batches import Batch, collate_answers, collate_head
from common.text.prompts import AnswerRow, HeadRow

PROMPT = list(range(5, 30))


def answers(shared_prefix: str = "off") -> Batch:
    """Two pairs of a better and a worse answer; the last row is a filler that must not count."""
    rows = [AnswerRow([*PROMPT, 30 + i // 2], [50 + i, 7, 2][-(1 + i % 3) :], 1.0 + i) for i in range(4)]
    return collate_answers([(row, i != 3) for i, row in enumerate(rows)], 2, shared_prefix)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and any(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def smoothed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Label smoothing as a user writes it."""
    logs = logits.log_softmax(1)
    return -0.9 * logs.gather(1, targets[:, None])[:, 0] - 0.1 * logs.mean(1)


# --- the default losses


def test_cross_entropy_is_torchs_to_the_last_bit():
    torch.manual_seed(0)
    ours = (10 * torch.randn(40, 500)).requires_grad_()
    theirs, targets, weights = ours.detach().clone().requires_grad_(), torch.randint(500, (40,)), torch.rand(40)
    found, expected = cross_entropy(ours, targets), F.cross_entropy(theirs, targets, reduction="none")
    assert torch.equal(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_a_head_s_losses_have_the_shape_of_the_targets():
    """Several labels are told by the targets' dimensions, and have a factor for their positive targets."""
    logits, prompt = torch.randn(2, 3), [5, 6]
    one = collate_head([(HeadRow(prompt, 2, 0.5), True), (HeadRow(prompt, 0), False)], 2)
    assert one.for_head and one.weights.tolist() == [0.5, 0]
    torch.testing.assert_close(
        label_losses(logits, one), F.cross_entropy(logits, torch.tensor([2, 0]), reduction="none")
    )
    rows = [(HeadRow(prompt, [0.0, 1.0, 1.0]), True), (HeadRow(prompt, [1.0, 0.0, 0.0]), True)]
    several = collate_head(rows, 2, pos_weight=[1.0, 2.0, 5.0])
    p, targets = logits.sigmoid(), several.targets
    expected = -(torch.tensor([1.0, 2.0, 5.0]) * targets * p.log() + (1 - targets) * (1 - p).log())
    torch.testing.assert_close(label_losses(logits, several), expected)


def test_numbers_as_targets_stay_numbers():
    """So that a head can be trained to a regression."""
    batch = collate_head([(HeadRow([5], 2.75), True), (HeadRow([6, 7], -1.5), True)], 2)
    assert batch.targets.tolist() == [2.75, -1.5] and batch.weights.tolist() == [1, 1]
    assert collate_head([(HeadRow([5], 2), True)], 2).targets.dtype == torch.long


# --- other losses


@pytest.mark.parametrize("shared_prefix", ["off", "on"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_loss_in_chunks_is_that_of_all_logits(models, family, shared_prefix, monkeypatch):
    """Under LoRA, with the gradient of each chunk; losses without a gradient as well."""
    monkeypatch.setattr(token_losses_module, "CHUNK", 3 * 600)
    model, batch = make(models[family]), answers(shared_prefix)
    found, expected = token_losses(model, batch, smoothed), smoothed(target_logits(model, batch), batch.targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_close(gradients(model, (found * batch.weights).sum()), gradients(model, (expected * batch.weights).sum()))
    with torch.no_grad():
        torch.testing.assert_close(token_losses(model, batch, smoothed), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["trained head", "soft cap"])
def test_any_loss_where_logits_are_computed_in_other_ways(kind, models, monkeypatch):
    """Again in the backward pass, or all at once by the model itself."""
    monkeypatch.setattr(token_losses_module, "CHUNK", 3 * 600)
    if kind == "trained head":
        base = transformers.AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    else:
        torch.manual_seed(0)
        shape = {"vocab_size": 600, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
        base = transformers.AutoModelForCausalLM.from_config(transformers.Gemma2Config(**shape))
    model, batch = TokenLosses(base.train()), answers()
    assert model.chunked == (kind == "trained head")
    found, expected = token_losses(model, batch, smoothed), smoothed(target_logits(model, batch), batch.targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_close(gradients(model, found.sum()), gradients(model, expected.sum()))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own_where_something_is_predicted(models, family):
    model, batch = make(models[family]).eval(), answers()
    with torch.no_grad():
        logits = model.model(
            batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits
        found = target_logits(model, batch)
    assert found.dtype == torch.float32 and found.shape == (len(batch.targets), 600)
    torch.testing.assert_close(found, logits.flatten(0, 1)[batch.positions])
    assert (batch.input_ids.flatten()[batch.positions + 1] == batch.targets).all()


def test_distillation_and_preference_are_a_few_lines(models):
    """As bodies of `loss_of`: a teacher's probabilities, and the answers of a pair against each other (DPO)."""
    model, batch = make(models["llama"]), answers()
    teacher = copy.deepcopy(model).eval()

    def distillation(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            wanted = target_logits(teacher, batch).softmax(1)
        losses = -(wanted * target_logits(model, batch).log_softmax(1)).sum(1)
        return (losses * batch.weights).sum()

    def preference(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        def log_likelihoods(model: torch.nn.Module) -> torch.Tensor:
            return torch.zeros(4).index_add(0, batch.rows, -token_losses(model, batch))

        with torch.no_grad():
            before = log_likelihoods(teacher)
        better, worse = (log_likelihoods(model) - before).view(-1, 2).unbind(1)
        return -(0.1 * (better - worse)).sigmoid().log().sum()

    # Student and teacher are the same, so a preference has no direction yet, and a student loses the teacher's entropy.
    assert preference(model, batch).item() == pytest.approx(2 * torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    logs = target_logits(model, batch).log_softmax(1)
    entropy = -(logs.exp() * logs).sum(1)
    assert distillation(model, batch).item() == pytest.approx((entropy * batch.weights).sum().item(), rel=1e-5)
    assert all(gradient.norm() < 1e-4 for gradient in gradients(model, distillation(model, batch)).values())
    # One step against the gradient of the preference makes the better answers likelier than the worse ones.
    first = preference(model, batch)
    first.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    assert preference(model, batch) < first


def test_losses_go_through_the_wrapped_model(models, tmp_path):
    """Under DistributedDataParallel too, or gradients would not be averaged; with a pack's layout and another loss."""
    model, batch = make(models["llama"]), answers("on")
    expected = gradients(model, token_losses(model, batch, smoothed).sum())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped, calls = DistributedDataParallel(model), []
        wrapped.register_forward_hook(lambda *of: calls.append(of))
        assert target_logits(wrapped, batch).shape == (len(batch.targets), 600)
        found = gradients(wrapped, token_losses(wrapped, batch, smoothed).sum())
    finally:
        torch.distributed.destroy_process_group()
    assert len(calls) == 2
    assert_close({name.removeprefix("module."): gradient for name, gradient in found.items()}, expected)
