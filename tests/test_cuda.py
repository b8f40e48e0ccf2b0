"""On an NVIDIA GPU: everything that has its own way there gives the numbers of a CPU, or of the plain way.

    pytest -m cuda

Skipped where there is none. What can be shown without one is in tests/model/test_cuda.py and tests/train/test_ahead.py.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers.models import FAMILIES, build_model
from helpers.packs import LENGTH, Options, make
from helpers.rows import toy_options
from helpers.runs import Stopped, log_lines, stop_at, train, train_chat, train_text, weights
from helpers.scoring import TEXTS, prompt_of
from helpers.texts import prose
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_cls
from common.data.classification import load_classification
from common.measure import scoring
from common.model import attention, base_model, cuda, lora
from common.model.classifier import Classifier
from common.model.losses import token_losses
from common.model.token_losses import TokenLosses
from common.options import TrainingConfig
from common.text.batches import Layout, collate_answers, collate_chat
from common.text.chat import ChatRow
from common.text.prompts import AnswerRow
from common.train import ahead, loop
from common.use.runs import open_run

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU, or a torch without CUDA"),
]
DTYPES = [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)]
NF4 = ["--load_in_4bit", "true", "--mixed_precision", "bf16"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> dict[str, Path]:
    """Models whose heads are large enough for every kernel, and whose weights divide into NF4's blocks of 64."""
    base = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 64, "head_dim": 64, "intermediate_size": 128}
    return {family: build_model(base / family, family, **shape) for family in FAMILIES}


@pytest.fixture
def small_packs(monkeypatch):
    """Packs take the kernel, however small."""
    monkeypatch.setattr(cuda, "FEWEST", 0)


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return bool((one.float() - other.float()).norm() <= tolerance * other.float().norm())


def answer_rows(count: int) -> list[tuple[AnswerRow, bool]]:
    generator = torch.Generator().manual_seed(count)

    def ids(n: int) -> list[int]:
        return torch.randint(42, 600, (n,), generator=generator).tolist()

    return [(AnswerRow([*range(5, 42), *ids(1 + i * 11 % 40)], [*ids(1 + i % 3), 2]), i != 2) for i in range(count)]


def chat_rows(count: int) -> list[tuple[ChatRow, bool]]:
    generator = torch.Generator().manual_seed(count)
    lengths = [LENGTH, 2, *(3 + i * 11 % 40 for i in range(2, count))]
    return [(ChatRow(torch.randint(3, 600, (n,), generator=generator).tolist(), [0] + [1] * (n - 1)), True)
            for n in lengths]  # fmt: skip


# --- kernels


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    ("rows", "prefix", "new", "shared"), [(4, 300, 33, 2), (5, 128, 128, 1), (9, 260, 31, 6), (32, 560, 30, 3)]
)
def test_the_kernel_of_packs_equals_torchs_attention(rows, prefix, new, shared, dtype, tolerance):
    torch.manual_seed(0)
    tokens = prefix + rows * new
    shapes = [(heads, tokens) for heads in (6, shared, shared)]
    tensors = [torch.randn(1, *shape, 64, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    others = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    own = torch.ones(new, new, dtype=torch.bool, device="cuda").tril()
    mask = torch.cat([own.new_ones(new, prefix), own], 1).expand(rows, 1, new, prefix + new).contiguous()
    output = cuda.pack_attention(*tensors, mask, Layout(rows, prefix), 0.1)

    row = torch.cat([torch.zeros(prefix), 1 + torch.arange(rows).repeat_interleave(new)]).cuda()
    seen = ((row == 0) | (row == row[:, None])) & torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril()
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(*others, attn_mask=seen, scale=0.1, enable_gqa=True).transpose(1, 2)
    weight = torch.randn_like(expected)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    assert close(output, expected, tolerance)
    for mine, other in zip(tensors, others, strict=True):
        assert close(mine.grad, other.grad, tolerance)


def test_one_compilation_serves_packs_of_all_shapes(small_packs):
    """Else every batch would wait for the compiler; two graphs more at most: short sequences, and no gradients."""
    torch._dynamo.reset()
    cuda.kernel.cache_clear()
    torch._dynamo.utils.counters.clear()
    for rows, prefix, new in [(8, 560, 30), (8, 561, 44), (16, 560, 29), (4, 300, 100), (32, 700, 9), (6, 400, 60)]:
        tokens = prefix + rows * new
        tensors = [torch.randn(1, h, tokens, 64, device="cuda", dtype=torch.bfloat16) for h in (6, 2, 2)]
        mask = torch.ones(rows, 1, new, prefix + new, dtype=torch.bool, device="cuda")
        cuda.pack_attention(*[t.requires_grad_() for t in tensors], mask, Layout(rows, prefix), 0.1).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_a_pack_needs_no_copy_of_its_prefix():
    """64 rows after 2,048 tokens: the copies alone would take 64 times the prefix's keys and values."""
    rows, prefix, new = 64, 2048, 16
    tokens = prefix + rows * new
    q, k, v = (torch.randn(1, h, tokens, 64, device="cuda", dtype=torch.bfloat16) for h in (8, 4, 4))
    mask = torch.ones(rows, 1, new, prefix + new, dtype=torch.bool, device="cuda")
    cuda.pack_attention(q, k, v, mask, Layout(rows, prefix), 0.1)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cuda.pack_attention(q, k, v, mask, Layout(rows, prefix), 0.1)
    copies = rows * k[:, :, :prefix].numel() * 2 * k.element_size()
    assert torch.cuda.max_memory_allocated() - before < copies / 4


# --- batches: packs, padded ones, and rows without padding


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("kernel", ["flex", "sdpa"])
@pytest.mark.parametrize("padded_by", ["eager", "flash or efficient", "math", "ours"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packs_equal_padded_batches(wide, monkeypatch, family, padded_by, kernel, dtype, tolerance):
    """Losses, and the gradients of the embeddings, whatever computes a padded batch's attention."""
    monkeypatch.setattr(cuda, "FEWEST", 0 if kernel == "flex" else 10**9)
    found = []
    for shared_prefix, name in (
        ("on", attention.NAME),
        ("off", {"eager": "eager", "ours": attention.NAME}.get(padded_by)),
    ):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            wide[family], dtype=dtype, attn_implementation=name or "sdpa", device_map={"": "cuda"}
        )
        batch = collate_answers(answer_rows(9), 2, shared_prefix).to("cuda")
        backends = {
            "math": [SDPBackend.MATH],
            "flash or efficient": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
        }
        with sdpa_kernel(
            backends.get(padded_by if shared_prefix == "off" else "", list(SDPBackend.__members__.values())[1:])
        ):
            losses = token_losses(TokenLosses(model), batch)
            (losses * batch.weights).sum().backward()
        found.append((losses.detach(), model.get_input_embeddings().weight.grad))
    (packed, ours), (padded, theirs) = found
    assert close(packed, padded, tolerance) and close(ours, theirs, 4 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_without_padding_equal_padded_ones(wide, family, dtype, tolerance):
    model = TokenLosses(
        transformers.AutoModelForCausalLM.from_pretrained(
            wide[family], dtype=dtype, attn_implementation=attention.NAME, device_map={"": "cuda"}
        )
    )
    found = []
    for packing in (True, False):
        losses = token_losses(model, collate_chat(chat_rows(7), 2, packing=packing).to("cuda"))
        model.zero_grad()
        losses.sum().backward()
        found.append((losses.detach(), model.model.get_input_embeddings().weight.grad.clone()))
    assert close(found[0][0], found[1][0], tolerance) and close(found[0][1], found[1][1], 4 * tolerance)


@pytest.mark.parametrize("way", ["packs", "padding-free"])
def test_nothing_waits_for_the_device(wide, small_packs, way):
    """An update from the collated batch to the changed weights, once everything is compiled."""
    model = make(wide["llama"], mixed_precision="bf16").cuda()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batch = collate_answers(answer_rows(9), 2, "on") if way == "packs" else collate_chat(chat_rows(7), 2, packing=True)

    def update() -> None:
        moved = batch.to("cuda")
        target_count = loop.count_targets([moved])
        with torch.autocast("cuda", torch.bfloat16):
            loss = train_cls.loss_of(model, moved)
        (loss / target_count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    update()
    update()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- runs of the scripts


def few(model: Path, folder: Path, *options) -> list:
    return ["--model", model, "--max_steps", 6, "--eval_strategy", "no", "--output_dir", folder, *options]


def test_nf4_trains_resumes_and_is_the_same_after_reload(wide, toy_files, tmp_path, monkeypatch):
    data = [*toy_options(toy_files), *NF4, "--save_strategy", "steps", "--save_steps", 2, "--learning_rate", 1e-2]
    train(*few(wide["llama"], tmp_path / "straight", *data))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, loop, "finite_mean", 4)
        train(*few(wide["llama"], tmp_path / "resumed", *data))
    train(*few(wide["llama"], tmp_path / "resumed", *data, "--resume_from_checkpoint", "latest"))
    lines, resumed = log_lines(tmp_path / "straight"), log_lines(tmp_path / "resumed")
    assert [line["update"] for line in resumed] == [1, 2, 3, 4, 5, 6] and lines[-1]["loss"] < lines[0]["loss"]
    for line, same in zip(lines, resumed, strict=True):
        assert line["loss"] == pytest.approx(same["loss"], rel=2e-2)

    saved = [json.loads(line) for line in (tmp_path / "straight/eval/test/predictions.jsonl").read_text().splitlines()]
    run = open_run(str(tmp_path / "straight"))
    again = run.classifier()
    assert "Linear4bit" in {type(module).__name__ for module in again.classifier.model.modules()}
    examples = load_classification(TrainingConfig(**run.options), training=False).splits["test"]
    for line, answer in zip(saved, again.label_examples(examples, 4), strict=True):
        assert answer.probabilities == pytest.approx(line["probabilities"], abs=2e-2)


@pytest.mark.parametrize("script", ["train_cls", "train_clm", "train_sft"])
def test_a_run_that_reads_late_is_the_same(wide, toy_files, chat_files, tmp_path, script):
    text = tmp_path / "text.txt"
    text.write_text(prose(200))
    run, data = {
        "train_cls": (train, toy_options(toy_files)),
        "train_clm": (train_text, ["--train_file", text]),
        "train_sft": (train_chat, chat_files),
    }[script]
    run(*few(wide["qwen"], tmp_path / "late", *data))
    real = ahead.Ledger.__init__

    def at_once(ledger, *args) -> None:
        real(ledger, *args)
        assert ledger.late
        ledger.late = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead.Ledger, "__init__", at_once)
        run(*few(wide["qwen"], tmp_path / "now", *data))
    for line, same in zip(log_lines(tmp_path / "late"), log_lines(tmp_path / "now"), strict=True):
        assert line["update"] == same["update"] and line["loss"] == pytest.approx(same["loss"], rel=1e-3)


def test_a_broken_update_is_not_saved(wide, toy_files, tmp_path, monkeypatch):
    real, calls = train_cls.loss_of, []

    def loss_of(model, batch):
        calls.append(1)
        return real(model, batch) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(train_cls, "loss_of", loss_of)
    with pytest.raises(FloatingPointError, match="Update 3 has loss nan"):
        train(*few(wide["llama"], tmp_path, *toy_options(toy_files), "--save_strategy", "steps", "--save_steps", 1))
    assert not (tmp_path / "checkpoints" / "step_3").exists() and len(calls) == 3


VARIANTS = {
    "gradient checkpointing": ["--gradient_checkpointing", "true"],
    "compiled": ["--torch_compile", "true"],
    "compiled and padded": ["--torch_compile", "true", "--shared_prefix", "off"],
    "padded": ["--shared_prefix", "off"],
    "micro-batches": ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4],
    "NF4 with checkpointing": [*NF4, "--gradient_checkpointing", "true"],
    "8 bit": ["--load_in_8bit", "true", "--mixed_precision", "bf16"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_is_the_same_in_another_way(wide, toy_files, tmp_path, small_packs, name):
    """In fp32 to rounding; quantized, as near as that leaves it."""
    options, quantized = VARIANTS[name], "--mixed_precision" in VARIANTS[name]
    plain = NF4 if name.startswith("NF4") else []
    train(*few(wide["llama"], tmp_path / "plain", *toy_options(toy_files), *plain))
    train(*few(wide["llama"], tmp_path / "other", *toy_options(toy_files), *options))
    lines, others = log_lines(tmp_path / "plain"), log_lines(tmp_path / "other")
    assert len(lines) == 6
    for line, same in zip(lines, others, strict=True):
        assert line["loss"] == pytest.approx(same["loss"], rel=5e-2 if quantized else 1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_packing_conversations_is_the_same(wide, chat_files, tmp_path, precision):
    for choice in ("true", "false"):
        options = ["--packing", choice, "--shared_prefix", "off", "--mixed_precision", precision]
        train_chat(*few(wide["llama"], tmp_path / choice, *chat_files, *options))
    for line, same in zip(log_lines(tmp_path / "true"), log_lines(tmp_path / "false"), strict=True):
        assert line["loss"] == pytest.approx(same["loss"], rel=1e-3 if precision == "no" else 3e-2)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_optimizers_in_8_bit_learn_and_resume(wide, toy_files, tmp_path, optimizer):
    options = [*toy_options(toy_files), *NF4, "--optim", optimizer, "--learning_rate", 1e-2]
    options += ["--save_strategy", "steps", "--save_steps", 3]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, loop, "finite_mean", 5)
        train(*few(wide["llama"], tmp_path, *options))
    train(*few(wide["llama"], tmp_path, *options, "--resume_from_checkpoint", "latest"))
    lines = log_lines(tmp_path)
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[-1]["loss"] < lines[0]["loss"]


def test_fp16_with_its_scaler(wide, toy_files, tmp_path):
    """Updates whose gradient overflows are left out while the scale falls; then it learns."""
    options = [*toy_options(toy_files), "--mixed_precision", "fp16", "--learning_rate", 1e-2]
    options += ["--save_strategy", "steps", "--save_steps", 20]
    train(*few(wide["llama"], tmp_path, *options, "--max_steps", 40))
    lines = log_lines(tmp_path)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert (tmp_path / "checkpoints" / "step_20" / "scaler.pt").is_file()


def test_full_finetuning_and_tf32(wide, toy_files, tmp_path):
    options = [*toy_options(toy_files), "--full_finetuning", "true", "--tf32", "true", "--learning_rate", 1e-3]
    train(*few(wide["qwen"], tmp_path, *options, "--mixed_precision", "bf16"))
    torch.set_float32_matmul_precision("highest")
    assert log_lines(tmp_path)[-1]["loss"] < log_lines(tmp_path)[0]["loss"] and weights(tmp_path / "model")


def test_updates_of_a_cpu(wide, toy_files, tmp_path, small_packs):
    """The same run in fp32 here and there, packs in the kernel: losses and weights."""
    train(*few(wide["llama"], tmp_path / "gpu", *toy_options(toy_files)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        train(*few(wide["llama"], tmp_path / "cpu", *toy_options(toy_files)))
    for line, same in zip(log_lines(tmp_path / "gpu"), log_lines(tmp_path / "cpu"), strict=True):
        assert line["loss"] == pytest.approx(same["loss"], rel=1e-3)


# --- answers


@pytest.mark.parametrize("kernel", ["flex", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_generated_answers_are_those_of_a_cpu(wide, monkeypatch, family, kernel):
    """fp32: probabilities of all labels, the likeliest one, and greedy text."""
    monkeypatch.setattr(cuda, "FEWEST", 0 if kernel == "flex" else 10**9)
    config, found = Options(), {}
    for device in ("cpu", "cuda"):
        model, _ = base_model.load_base(str(wide[family]), config, device=device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(wide[family])
        classifier = Classifier(model, prompt_of(tokenizer), tokenizer)
        prompts = [rendered.ids for rendered in classifier.prompt.prompts(TEXTS)]
        options = {"batch_size": 4, "device": device}
        found[device] = (
            [answer.probabilities for answer in scoring.score_labels(classifier, prompts, **options)],
            [answer.text for answer in scoring.generate_answers(classifier, prompts, **options)],
        )
    for one, other in zip(found["cuda"][0], found["cpu"][0], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert found["cuda"][1] == found["cpu"][1]


def test_a_merged_adapter_answers_as_the_adapter(wide):
    model, missing = base_model.load_base(str(wide["llama"]), Options(), device="cuda")
    model = lora.add_lora(model, Options(target_modules=["all-linear"]), missing, False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    ids = torch.arange(5, 45, device="cuda").view(4, 10)
    with torch.no_grad():
        adapted = model.eval()(input_ids=ids).logits
        assert close(model.merge_and_unload()(input_ids=ids).logits, adapted, 1e-3)


def test_memory_of_a_report_is_the_allocators_peak(wide, toy_files, tmp_path):
    figures = train(*few(wide["llama"], tmp_path, *toy_options(toy_files)))
    assert figures["peak_memory_bytes"] == torch.cuda.max_memory_allocated() > 0
