"""What CUDA computes in a kernel, here on a CPU: the same code, FlexAttention without a kernel."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers.models import FAMILIES
from helpers.packs import assert_same, make
from helpers.scoring import LABELS, TEXTS, load, prompt_of
from torch.nn.attention import flex_attention
from torch.utils.checkpoint import checkpoint

from common.measure import scoring
from common.model import attention, cuda
from common.model.classifier import Classifier
from common.model.losses import token_losses
from common.model.token_losses import TokenLosses
from common.text import batches
from common.text.batches import Layout, collate_answers
from common.text.prompts import AnswerRow

HEADS, SIZE = 6, 16


@pytest.fixture
def graphs(monkeypatch):
    """As on CUDA: packs take the kernel, from the first one on; traced by torch.compile, then run as torch's products.

    The list has every graph that was traced.
    """
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph

    torch._dynamo.reset()
    kernel = torch.compile(flex_attention.flex_attention, backend=backend, dynamic=True, fullgraph=True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)  # it has no gradients for CPUs
    monkeypatch.setattr(cuda, "kernel", lambda: kernel)
    monkeypatch.setattr(cuda, "is_used", lambda tensor: True)
    monkeypatch.setattr(cuda, "_compiles", lambda *heads: True)
    monkeypatch.setattr(cuda, "FEWEST", 0)
    monkeypatch.setattr(cuda, "SMALLEST", 1)
    yield traced
    torch._dynamo.reset()


def pack_of(rows: int, prefix: int, new: int, cached: int = 0, shared: int = 2, dtype=torch.float32, first=True):
    """Query, key, value of a pack, and a mask by which a row sees the prefix and some of its own tokens."""
    torch.manual_seed(rows * prefix + new)
    keys = prefix + rows * (cached + new)
    shapes = [(HEADS, (prefix if first else 0) + rows * new), (shared, keys), (shared, keys)]
    tensors = [torch.randn(1, heads, n, SIZE, dtype=dtype, requires_grad=True) for heads, n in shapes]
    mask = torch.rand(rows, 1, new, prefix + cached + new) < 0.6
    mask[..., :prefix] = True
    mask[..., prefix + cached :] &= torch.ones(new, new, dtype=torch.bool).tril()
    mask[..., prefix + cached :] |= torch.eye(new, dtype=torch.bool)
    return tensors, mask, Layout(rows, prefix)


def densely(tensors: list, mask: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The same by torch's own attention under a mask of the complete sequence, [1, queries, heads, size]."""
    query, key, value = tensors
    rows, new, width, prefix = layout.rows, mask.shape[2], mask.shape[3], layout.prefix
    first, own = query.shape[2] - rows * new, width - prefix
    whole = torch.zeros(query.shape[2], key.shape[2], dtype=torch.bool)
    whole[:first, :first] = torch.ones(first, first, dtype=torch.bool).tril()
    for row in range(rows):
        own_queries = slice(first + row * new, first + (row + 1) * new)
        whole[own_queries, :prefix] = mask[row, 0, :, :prefix]
        whole[own_queries, prefix + row * own : prefix + (row + 1) * own] = mask[row, 0, :, prefix:]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=whole, scale=0.3, enable_gqa=True).transpose(
        1, 2
    )


SHAPES = [
    {"rows": 2, "prefix": 3, "new": 2},
    {"rows": 3, "prefix": 37, "new": 20},
    {"rows": 4, "prefix": 300, "new": 33},
    {"rows": 5, "prefix": 128, "new": 128},  # at the edges of blocks
    {"rows": 9, "prefix": 260, "new": 31, "shared": 6},
    {"rows": 2, "prefix": 140, "new": 200, "shared": 1},
    {"rows": 7, "prefix": 150, "new": 5, "cached": 40, "first": False},
    {"rows": 3, "prefix": 0, "new": 70, "cached": 90, "first": False},
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_attention_under_a_mask_of_the_sequence(graphs, shape, dtype, tolerance):
    tensors, mask, layout = pack_of(**shape, dtype=dtype)
    others = [tensor.detach().float().requires_grad_() for tensor in tensors]
    output, expected = cuda.pack_attention(*tensors, mask, layout, 0.3), densely(others, mask, layout)
    assert output.shape == expected.shape and output.dtype == dtype
    weight = torch.randn_like(expected)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    pairs = [(output, expected), *((mine.grad, other.grad) for mine, other in zip(tensors, others, strict=True))]
    for mine, other in pairs:
        assert (mine - other).norm() <= tolerance * other.norm()


def dense_blocks(number: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    found = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for block, (count, order) in enumerate(zip(number[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        found[block, order[:count]] = True
    return found


def both_kinds(blocks: flex_attention.BlockMask) -> tuple[torch.Tensor, torch.Tensor]:
    """[query blocks, key blocks]: those that the mask is read for, and those seen completely."""
    return (
        dense_blocks(blocks.kv_num_blocks, blocks.kv_indices),
        dense_blocks(blocks.full_kv_num_blocks, blocks.full_kv_indices),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [2, 16, 128])
def test_blocks_hold_whatever_is_seen_and_whole_ones_nothing_else(monkeypatch, shape, size):
    """The kernel looks at no others, and reads no mask of whole ones."""
    monkeypatch.setattr(cuda, "BLOCK", size)
    cuda._plan.cache_clear()
    (query, key, _), mask, layout = pack_of(**shape)
    mask[:] = True
    plan = cuda._plan(layout.rows, layout.prefix, query.shape[2], mask.shape[2], mask.shape[3], query.device)
    cuda._plan.cache_clear()
    of_prefix = (plan.key_row == 0) & ((plan.row[:, None] > 0) | torch.ones(query.shape[2], key.shape[2]).tril().bool())
    seen = of_prefix | (plan.row[:, None] == plan.key_row)
    partial, whole = both_kinds(plan.blocks)
    assert not (partial & whole).any()
    for a in range(len(partial)):
        for b in range(partial.shape[1]):
            part = seen[a * size : (a + 1) * size, b * size : (b + 1) * size]
            assert partial[a, b] or whole[a, b] or not part.any()
            assert not whole[a, b] or part.all() and part.shape == (size, size)
    if shape["prefix"] >= 3 * size and shape.get("first", True):
        assert whole.any()


def test_a_plan_made_in_an_evaluation_can_be_trained_with():
    """autograd saves no tensor that was made in inference mode."""
    cuda._plan.cache_clear()
    with torch.inference_mode():
        made = cuda._plan(2, 3, 7, 2, 5, torch.device("cpu"))
    cuda._plan.cache_clear()
    assert not made.row.is_inference() and not made.blocks.kv_indices.is_inference()


def test_the_drawing_of_the_docstring(monkeypatch):
    monkeypatch.setattr(cuda, "BLOCK", 2)
    cuda._plan.cache_clear()
    blocks = cuda._plan(2, 3, 7, 2, 5, torch.device("cpu")).blocks
    cuda._plan.cache_clear()
    partial, whole = both_kinds(blocks)
    drawn = [
        line[9:32].split() for line in cuda.__doc__.splitlines() if set(line[9:32]) & set("/#.") and "," not in line
    ]
    signs = [
        ["/" if p else "#" if w else "." for p, w in zip(*rows, strict=True)]
        for rows in zip(partial, whole, strict=True)
    ]
    assert drawn == signs


def test_one_graph_serves_packs_of_all_shapes(graphs):
    """Of any number of rows, lengths and prefixes, growing and shrinking; sizes of one block are torch's exception."""
    torch.manual_seed(0)
    for rows, prefix, new in [(8, 560, 30), (8, 561, 44), (16, 560, 29), (4, 300, 100), (2, 150, 20), (32, 700, 9)]:
        tensors, mask, layout = pack_of(rows, prefix, new)
        cuda.pack_attention(*tensors, mask, layout, 0.3)
    assert len(graphs) == 1
    for _ in range(2):
        tensors, mask, layout = pack_of(3, 20, 9)
        cuda.pack_attention(*tensors, mask, layout, 0.3)
    assert len(graphs) == 2


# --- models


def rows_of(count: int) -> list[AnswerRow]:
    generator = torch.Generator().manual_seed(count)
    draw = lambda n: torch.randint(42, 600, (n,), generator=generator).tolist()  # noqa: E731
    return [AnswerRow([*range(5, 42), *draw(1 + i * 11 % 40)], [7 + i % 4, 9, 2][-(1 + i % 3) :]) for i in range(count)]


@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True}, {"checkpointing": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_a_model_are_those_of_the_padded_batch(graphs, models, family, options):
    assert_same(make(models[family], **options), rows_of(7))
    assert graphs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_bf16_is_as_near_as_bf16_lets_it(graphs, models, family):
    model = TokenLosses(
        transformers.AutoModelForCausalLM.from_pretrained(
            models[family], dtype=torch.bfloat16, attn_implementation=attention.NAME
        )
    )
    pairs = [(row, True) for row in rows_of(5)]
    with torch.no_grad():
        packed, padded = (token_losses(model, collate_answers(pairs, 2, choice)) for choice in ("on", "off"))
    assert graphs and (packed - padded).abs().max() < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_scored_the_same(graphs, models, family):
    """Rows after a cached prefix, and the tree of the labels."""
    model, tokenizer = load(models, family)
    classifier = Classifier(model, prompt_of(tokenizer), tokenizer)
    prompts = [rendered.ids for rendered in classifier.prompt.prompts(TEXTS)]
    options = {"batch_size": 2, "device": "cpu"}
    ours = scoring.score_labels(classifier, prompts, **options)
    assert graphs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "is_used", lambda tensor: False)
        expected = scoring.score_labels(classifier, prompts, **options)
    for one, other in zip(ours, expected, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6) and len(one.probabilities) == len(
            LABELS
        )


def test_what_the_kernel_does_not_take_stays_with_torch(graphs, monkeypatch):
    """Dropout, a cap, heads that are too small, and packs that are too small to be worth it."""
    tensors, mask, layout = pack_of(3, 37, 20)
    calls = []
    monkeypatch.setattr(cuda, "pack_attention", lambda *args: (calls.append(args), None)[1])
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda module, query, *args, **k: (query.transpose(1, 2), None)
    )

    def taken(**options) -> bool:
        calls.clear()
        attention._forward(SimpleNamespace(is_causal=True), *tensors, mask, layout=layout, scaling=0.3, **options)
        return bool(calls)

    assert taken() and not taken(dropout=0.1) and not taken(softcap=30.0)
    monkeypatch.setattr(cuda, "SMALLEST", SIZE + 1)
    assert not taken()
    monkeypatch.setattr(cuda, "SMALLEST", SIZE)
    monkeypatch.setattr(cuda, "FEWEST", 3 * 37 + 1)
    assert not taken()
    monkeypatch.setattr(cuda, "FEWEST", 3 * 37)
    assert taken()


TRIAL = cuda._compiles.__wrapped__


def test_a_kernel_that_cannot_be_compiled_is_not_used(graphs, monkeypatch, capsys):
    """Tried with gradients, wherever the first pack comes: in an evaluation, and under gradient checkpointing."""
    heads = HEADS, 2, SIZE, SIZE, torch.float32, torch.device("cpu")
    runs = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        runs.append(TRIAL(*heads, True))
        return x * x

    with torch.inference_mode():
        assert TRIAL(*heads, False) and TRIAL(*heads, True)
    checkpoint(layer, torch.ones(3, requires_grad=True), use_reentrant=False).sum().backward()
    assert runs == [True, True] and not capsys.readouterr().err  # forward, and recomputed once

    def failing(query, *args, **options):
        if query.requires_grad:
            raise RuntimeError("No valid triton configs.\nOut of shared memory")

    monkeypatch.setattr(cuda, "kernel", lambda: failing)
    monkeypatch.setattr(cuda, "_compiles", cache(TRIAL))
    (query, _, value), _, layout = pack_of(3, 37, 20)
    assert not any(cuda.takes_pack(query, value, layout, 0.0) for _ in range(2))
    monkeypatch.setattr(cuda, "pack_attention", lambda query, *args: failing(query) or query)
    with torch.no_grad():
        assert cuda.takes_pack(query, value, layout, 0.0)  # an evaluation needs no gradients
    assert capsys.readouterr().err.count("cannot be compiled here, so packs take more memory and time (No valid") == 1


def test_padding_free_batches_take_their_kernel(graphs, models, monkeypatch):
    """`jagged_attention`, with what each layer of a model hands it."""
    from common.text.chat import ChatRow

    rows = [(ChatRow([5] * n, [0] + [1] * (n - 1)), True) for n in (9, 2, 5)]
    calls = []

    def stand_in(query, key, value, lengths, longest, scaling, dropout):
        calls.append((lengths.tolist(), longest))
        parts = zip(*(tensor.split(lengths.tolist(), 2) for tensor in (query, key, value)), strict=True)
        kernel = F.scaled_dot_product_attention
        outputs = [kernel(*part, scale=scaling, is_causal=True, enable_gqa=True) for part in parts]
        return torch.cat(outputs, 2).transpose(1, 2)

    monkeypatch.setattr(cuda, "jagged_attention", stand_in)
    model = make(models["llama"]).eval()
    with torch.no_grad():
        ours = token_losses(model, batches.collate_chat(rows, 2, packing=True))
        expected = token_losses(model, batches.collate_chat(rows, 2))
    assert calls == [([9, 2, 5], 9)] * 2
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
