"""`--packing true`: the loss and gradients of the padded batch without its padding, and no row that sees another."""

import dataclasses
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.models import FAMILIES, build_model
from helpers.packs import LENGTH, make
from helpers.runs import CHAT, assert_same_updates, quick
from helpers.runs import train_chat as train
from torch.utils.flop_counter import FlopCounterMode

import train_sft
from common.errors import InputError
from common.model import cuda
from common.model.losses import token_losses
from common.model.token_losses import TokenLosses
from common.text import batches
from common.text.batches import Layout
from common.text.chat import ChatRow

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel for rows of unequal length is CUDA's")


def chat_rows(count: int) -> list[ChatRow]:
    """Rows from two tokens to the greatest length, each with trained tokens here and there."""
    generator = torch.Generator().manual_seed(count)
    rows = []
    for i in range(count):
        length = {0: LENGTH, 1: 2}.get(i, 3 + (i * 11) % 40)
        ids = torch.randint(3, 600, (length,), generator=generator).tolist()
        rows.append(ChatRow(ids, [0] + [int(t % 3 != i % 2) for t in range(length - 2)] + [1]))
    return rows


def measure(model: TokenLosses, rows: list[ChatRow], packing: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss per target, and the gradient of every trained weight; row 2 is a filler that must not count."""
    batch = batches.collate_chat([(row, i != 2) for i, row in enumerate(rows)], 2, packing=packing)
    tokens = sum(row.length for row in rows) if packing else len(rows) * LENGTH
    assert batch.input_ids.numel() == tokens or len(rows) == 1
    loss = train_sft.loss_of(model, batch) / batch.weights.sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


def test_rows_follow_each_other():
    """Each with its own positions: rotary embeddings are relative, so a loss would not tell."""
    inputs = batches.flatten([[5, 6, 7], [8]])
    assert inputs.pop("layout") == Layout(2, lengths=(3, 1))
    assert {name: tensor.tolist() for name, tensor in inputs.items()} == {
        "input_ids": [[5, 6, 7, 8]],
        "position_ids": [[0, 1, 2, 0]],
        "attention_mask": [[[[True, True, True]]], [[[True, False, False]]]],
    }


@pytest.mark.parametrize(
    ("count", "options"),
    [(1, {}), (2, {}), (7, {}), (7, {"checkpointing": True}), (7, {"load_in_4bit": True})],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_padded_batch(models, family, count, options):
    """fp32, LoRA B not zero."""
    model, rows = make(models[family], **options), chat_rows(count)
    loss, gradients = measure(model, rows, packing=True)
    expected, wanted = measure(model, rows, packing=False)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == wanted.keys() and any("lora_A" in name for name in wanted)
    for name, gradient in wanted.items():
        assert gradient.norm() > 0
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_sees_itself_alone(models, family):
    """A changed row moves its own losses; in one long sequence it would move those after it too."""
    model, rows = make(models[family]).eval(), chat_rows(5)

    def losses(changed: int | None = None) -> list[torch.Tensor]:
        some = list(rows)
        if changed is not None:
            ids = list(rows[changed].ids)
            ids[0] = 3 + ids[0] % 500
            some[changed] = dataclasses.replace(rows[changed], ids=ids)
        batch = batches.collate_chat([(row, True) for row in some], 2, packing=True)
        with torch.no_grad():
            found = token_losses(model, batch)
        return [found[batch.rows == i] for i in range(len(rows))]

    before = losses()
    for changed in range(len(rows)):
        moved = [not torch.equal(a, b) for a, b in zip(before, losses(changed), strict=True)]
        assert moved == [i == changed for i in range(len(rows))]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_hands_mask_and_layout_through(models, family, checkpointing):
    """What padding-free batches rest on: both reach every layer as they are."""
    seen = []
    model = make(models[family], checkpointing=checkpointing)
    for layer in model.model.get_decoder().layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((kwargs["attention_mask"], kwargs["layout"])), with_kwargs=True
        )
    batch = batches.collate_chat([(row, True) for row in chat_rows(3)], 2, packing=True)
    train_sft.loss_of(model, batch).backward()
    assert len(seen) == (4 if checkpointing else 2)  # the layers are computed again
    assert all(mask is batch.attention_mask and layout is batch.layout for mask, layout in seen)


# --- the kernel for rows of unequal length

LENGTHS = [5, 1, 9]


def tensors(device: str, dtype: torch.dtype, heads: int = 4, shared: int = 2, size: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(1, n, sum(LENGTHS), size) for n in (heads, shared, shared)]
    return [torch.randn(shape, dtype=dtype).to(device).requires_grad_() for shape in shapes]


def one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    rows = zip(*(tensor.split(LENGTHS, 2) for tensor in (query, key, value)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(*row, scale=0.3, is_causal=True, enable_gqa=True) for row in rows], 2
    )


def assert_same_attention(output: torch.Tensor, ours: list, theirs: list, tolerance: float) -> None:
    expected = one_by_one(*theirs).transpose(1, 2)
    weight = torch.randn_like(expected)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in [(output, expected), *((mine.grad, other.grad) for mine, other in zip(ours, theirs, strict=True))]:
        assert a.shape == b.shape and (a - b).norm() <= tolerance * b.norm()


def test_the_kernel_gets_the_rows(monkeypatch):
    """On a CPU, where a stand-in that takes the nested tensors apart computes what the kernel would."""
    kernel, calls = F.scaled_dot_product_attention, []

    def stand_in(*nested: torch.Tensor, **options) -> torch.Tensor:
        calls.append(options)
        assert all((tensor._get_min_seqlen(), tensor._get_max_seqlen()) == (1, 9) for tensor in nested)
        assert all(tensor.transpose(1, 2).is_contiguous() for tensor in nested)
        rows = zip(*(tensor.unbind() for tensor in nested), strict=True)
        rows = [kernel(*(part[None] for part in row), **options)[0].transpose(0, 1) for row in rows]
        assert [len(row) for row in rows] == LENGTHS
        return torch.nested.nested_tensor_from_jagged(torch.cat(rows), nested[0].offsets()).transpose(1, 2)

    ours, theirs = tensors("cpu", torch.float32), tensors("cpu", torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", stand_in)
        output = cuda.jagged_attention(*ours, torch.tensor(LENGTHS), max(LENGTHS), 0.3, 0.0)
    assert_same_attention(output, ours, theirs, 1e-6)
    assert calls == [{"dropout_p": 0.0, "scale": 0.3, "is_causal": True}]


def test_torch_takes_the_rows_to_its_kernel():
    """Through torch's own preparation of flash attention, forward and back, in shapes only (the meta device)."""
    ours = tensors("meta", torch.bfloat16, size=64)
    with FlopCounterMode(display=False):  # under it torch lets nested tensors without a device pass
        output = cuda.jagged_attention(*ours, torch.tensor(LENGTHS, device="meta"), max(LENGTHS), 0.3, 0.1)
        assert output.shape == (1, sum(LENGTHS), 4, 64)
        output.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in ours)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("heads", [2, 4])
def test_the_kernel_equals_rows_one_by_one(dtype, tolerance, heads):
    ours, theirs = tensors("cuda", dtype, heads, size=64), tensors("cuda", dtype, heads, size=64)
    output = cuda.jagged_attention(*ours, torch.tensor(LENGTHS, device="cuda"), max(LENGTHS), 0.3, 0.0)
    assert_same_attention(output, ours, theirs, tolerance)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_a_gpu_computes_the_padded_batch_s_losses(models, family):
    model, losses = make(models[family]).cuda(), []
    for packing in (True, False):
        batch = batches.collate_chat([(row, True) for row in chat_rows(7)], 2, packing=packing)
        losses.append(token_losses(model, batch.to("cuda")))
    assert (losses[0] - losses[1]).norm() <= 1e-4 * losses[1].norm()


# --- the option


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_the_same_with_and_without(models, chat_files, tmp_path, monkeypatch, capsys, family):
    """The whole script: accumulation, a short last micro-batch, evaluations."""
    sizes = ["--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 2, "--max_steps", 5]
    for choice in ("true", "false"):
        options = [*CHAT, "--model", models[family], *chat_files, *sizes, "--packing", choice, "--baselines", "true"]
        monkeypatch.setattr(sys, "argv", ["train_sft.py", *map(str, options), "--output_dir", str(tmp_path / choice)])
        with quick():
            train_sft.main()
        assert ("batches without padding" in capsys.readouterr().out) == (choice == "true")
    assert_same_updates(tmp_path / "true", tmp_path / "false")
    for name in ("metrics.json", "baselines.json"):
        with_, without = (
            json.loads((tmp_path / choice / "eval/test" / name).read_text()) for choice in ("true", "false")
        )
        with_, without = (found.get("untrained base", found) for found in (with_, without))
        assert with_["eval_loss"] == pytest.approx(without["eval_loss"], rel=1e-5)


def test_where_rows_would_see_each_other_it_is_refused(models, chat_files, tmp_path):
    """A sliding window shorter than a row, an attention that is not ours; a window as long as a row is none."""
    short = build_model(tmp_path / "short", "mistral", sliding_window=95)
    with pytest.raises(InputError, match="--packing true: not with .*sliding window of 95 tokens is shorter than.* 96"):
        train("--model", short, *chat_files, "--packing", "true")
    for name in ("eager", "sdpa"):
        with pytest.raises(InputError, match=rf"--packing true: not with .*attention \({name}\) knows none"):
            train("--model", models["llama"], *chat_files, "--packing", "true", "--attn_implementation", name)
    long = build_model(tmp_path / "long", "mistral", sliding_window=96)
    train("--model", long, *chat_files, "--packing", "true", "--max_steps", 1, "--output_dir", tmp_path / "run")


def test_packs_and_padding_free_batches_exclude_each_other(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_sft.py", "--packing", "true", "--shared_prefix", "on"])
    with pytest.raises(InputError, match="--packing true and --shared_prefix on exclude each other"):
        train_sft.main()
