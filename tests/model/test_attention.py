"""bf16 attention on a CPU: the same numbers as torch's own, from scores to gradients, and no copies of big weights."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers.models import FAMILIES, build_model
from torch.utils._python_dispatch import TorchDispatchMode

from common.model import attention
from common.model.losses import token_losses
from common.model.token_losses import TokenLosses
from common.text.batches import collate_answers
from common.text.prompts import AnswerRow

ROWS, HEADS, SIZE = 3, 6, 8


def tensors(queries: int, keys: int, shared: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(HEADS, queries), (shared, keys), (shared, keys)]
    return [torch.randn(ROWS, heads, n, SIZE, dtype=dtype, requires_grad=True) for heads, n in shapes]


def left_padded(queries: int, keys: int) -> torch.Tensor:
    """Causal, and row i does not see its first i keys; a padded query sees itself."""
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None].repeat(ROWS, 1, 1, 1)
    for row in range(ROWS):
        mask[row, :, :, :row] = False
    return mask | torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).triu(keys - queries)


@pytest.mark.parametrize("shared", [1, 2, 6])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 9), (4, 9)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("at_once", [2**20, 100, 1])  # all scores, those of a few rows or queries, of one
def test_equals_torch_in_output_and_gradients(shared, queries, keys, masked, at_once, monkeypatch):
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", at_once)
    mask = left_padded(queries, keys) if masked else None
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    ours, theirs = tensors(queries, keys, shared, torch.float64), tensors(queries, keys, shared, torch.float64)
    output = attention.grouped_attention(*ours, mask, scaling=0.3)
    expected = F.scaled_dot_product_attention(
        *theirs, attn_mask=causal if mask is None else mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    assert output.shape == (ROWS, queries, HEADS, SIZE)
    torch.testing.assert_close(output, expected)
    weight = torch.randn_like(expected)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_packs_are_tried_where_the_model_is(models):
    """Its inputs are made on the CPU, whatever `torch.device` is around."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"]).to("meta")
    seen = []

    def forward(**inputs):
        seen.append({tensor.device.type for tensor in inputs.values() if isinstance(tensor, torch.Tensor)})
        raise ValueError

    model.forward = forward
    assert not attention._packs_work(model) and seen == [{"meta"}]


@pytest.mark.parametrize("at_once", [2**20, 700, 1])  # all scores, those of two rows, of one
@pytest.mark.parametrize("shared", [1, 2, 6])
def test_a_prefix_is_the_same_as_a_copy_of_it_in_every_row(shared, at_once, monkeypatch):
    """Output and every gradient; the mask is that of a row's own keys."""
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", at_once)
    mask = left_padded(4, 9)
    torch.manual_seed(1)
    first = [torch.randn(1, shared, 5, SIZE, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    q, k, v = rows = tensors(4, 9, shared, torch.float64)
    ours = attention.grouped_attention(q, k, v, mask, 0.3, prefix=tuple(first))
    joined = [torch.cat([a.expand(ROWS, -1, -1, -1), b], 2) for a, b in zip(first, (k, v), strict=True)]
    wide = torch.cat([torch.ones(ROWS, 1, 4, 5, dtype=torch.bool), mask], 3)
    theirs = F.scaled_dot_product_attention(q, *joined, attn_mask=wide, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(theirs)
    expected = torch.autograd.grad((theirs * weight).sum(), [*rows, *first])
    for mine, other in zip(torch.autograd.grad((ours * weight).sum(), [*rows, *first]), expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_in_bf16_is_its_padded_batch(models, family):
    """As near as bf16 lets it: the same answers' probabilities."""
    rows = [(AnswerRow([*range(3, 33), *range(40, 40 + n)], [7, 2]), True) for n in (9, 4, 6)]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        models[family], dtype=torch.bfloat16, attn_implementation=attention.NAME
    )
    likely = []
    for shared_prefix in ("off", "on"):
        batch = collate_answers(rows, pad_id=2, shared_prefix=shared_prefix)
        inputs = batch.inputs
        positions = inputs.pop("positions")
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[positions].float()
        likely.append(logits.softmax(-1))
    assert (likely[0] - likely[1]).abs().max() < 3e-2


def test_a_bias_of_the_keys_costs_no_digits():
    """Qwen2's keys have one; in bf16, scores of several hundred would differ by whole units."""
    q, k, v = (tensor.detach() for tensor in tensors(40, 40, 2, torch.float32))
    k = k + 100 * torch.randn(1, 2, 1, SIZE)
    exact = attention.grouped_attention(q, k, v, None, SIZE**-0.5)
    assert (q @ k.repeat_interleave(3, 1).transpose(2, 3)).abs().max() > 500
    rounded = attention.grouped_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, SIZE**-0.5)
    torch_own = F.scaled_dot_product_attention(
        q.bfloat16(), k.bfloat16(), v.bfloat16(), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    assert (rounded - exact).norm() < 1.5 * (torch_own - exact).norm()


def test_empty_places_of_a_static_cache_stay_with_torch(monkeypatch):
    """There the queries are the first of the keys, not the last."""
    calls = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: (calls.append(k), None))
    attention._forward(SimpleNamespace(is_causal=True), *tensors(5, 9, 2, torch.bfloat16), None)
    assert calls


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_answers_as_with_torchs_kernel(family, models):
    ids = torch.arange(3, 51).view(4, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    logits = []
    for name in ("sdpa", attention.NAME):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            models[family], dtype=torch.bfloat16, attn_implementation=name
        )
        logits.append(model(ids, attention_mask=mask).logits.float()[mask.bool()].log_softmax(-1).exp())
    assert (logits[0] - logits[1]).abs().max() < 3e-2


@pytest.mark.parametrize(
    ("change", "own"),
    [
        ({}, True),
        ({"dropout": 0.1}, False),
        ({"softcap": 30.0}, False),
        ({"dtype": torch.float32}, False),
        ({"is_causal": False}, False),
        ({"limit": 100}, False),
    ],
)
def test_what_it_cannot_express_stays_with_torch(change, own, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: (calls.append(k), None))
    change = dict(change)
    monkeypatch.setattr(attention, "MAX_SCORES", change.pop("limit", attention.MAX_SCORES))
    q, k, v = tensors(5, 5, 2, change.pop("dtype", torch.bfloat16))
    attention._forward(SimpleNamespace(is_causal=True), q, k, v, None, **change)
    assert bool(calls) != own


class Copies(TorchDispatchMode):
    """Notes the largest tensor that any operation writes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.bmm.default:
            self.largest = max(self.largest, *(arg.numel() for arg in args))
        return result


def test_the_vocabulary_matrix_is_not_copied_once_a_row(tmp_path):
    """Sliced hidden states make torch multiply by an expanded copy of a frozen matrix: 15 % of a step of SmolLM2."""
    build_model(tmp_path, "llama", vocab_size=5000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    batch = collate_answers([(AnswerRow([5] * n, [7, 2]), True) for n in (9, 4, 6)], pad_id=2)
    losses = TokenLosses(model)
    with Copies() as copies:
        token_losses(losses, batch).sum().backward()
    assert copies.largest < 5000 * 32
    with Copies() as copies:
        model(batch.input_ids, use_cache=False, logits_to_keep=3).logits.sum().backward()
    assert copies.largest >= 5000 * 32  # what the test looks for does happen when a number is given
