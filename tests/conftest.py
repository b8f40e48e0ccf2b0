"""Tiny random models with a real tokenizer, and small data files, made once a session."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
os.environ.setdefault("OMP_NUM_THREADS", "2")
FAMILIES = ("llama", "mistral", "gemma", "qwen")
WORDS = {
    "sport": "match goal team coach league striker penalty stadium",
    "science": "atom laser quark enzyme genome telescope isotope theorem",
    "music": "violin chorus melody rhythm concert guitar sonata tempo",
}


def toy_rows(per_label: int, labels: tuple[str, ...] = tuple(WORDS), start: int = 0) -> list[dict[str, str]]:
    """Rows whose words give their label away; lengths differ from row to row."""
    rows = []
    for i in range(start, start + per_label):
        for label in labels:
            words = WORDS[label].split()
            text = " ".join(words[(i + k) % len(words)] for k in range(2 + (i * 7) % 9))
            rows.append({"text": f"{text} number {i}", "label": label})
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def build_tokenizer(folder: Path, pad_is_eos: bool = True) -> None:
    """A byte-level BPE of a few hundred tokens, with BOS in front and, by default, pad == eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = (
        [row["text"] for row in toy_rows(40)] + list(WORDS) * 5 + ["Classify the text into and return the answer"] * 5
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>" if pad_is_eos else "<pad>",
    )
    fast.save_pretrained(folder)


def build_model(folder: Path, family: str, **changes) -> Path:
    """A two-layer random model of the family, saved with its tokenizer, as --model takes it."""
    import torch
    import transformers

    shape = {
        "vocab_size": 600,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": family in ("gemma", "qwen"),
        **changes,
    }
    kind = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "gemma": transformers.GemmaConfig,
        "qwen": transformers.Qwen2Config,
    }[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**shape))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the usual start, so that logits differ clearly
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    build_tokenizer(folder)
    return folder


def build_encoder(folder: Path, family: str) -> Path:
    """A tiny random BERT or DistilBERT, stored without a classification head."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    if family == "bert":
        config = transformers.BertConfig(
            vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    else:
        config = transformers.DistilBertConfig(vocab_size=200, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    words = sorted({word for row in toy_rows(40) for word in row["text"].split()} | {"."})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """family -> folder of a tiny random model."""
    base = tmp_path_factory.mktemp("models")
    return {family: build_model(base / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> dict[str, Path]:
    """bert and distilbert -> folder of a tiny random model."""
    base = tmp_path_factory.mktemp("encoders")
    return {family: build_encoder(base / family, family) for family in ("bert", "distilbert")}


@pytest.fixture(scope="session")
def toy_files(tmp_path_factory) -> dict[str, str]:
    """train, validation and test CSV files of an easy three-label task."""
    base = tmp_path_factory.mktemp("toy")
    return {
        "train": str(write_csv(base / "train.csv", toy_rows(14))),
        "validation": str(write_csv(base / "validation.csv", toy_rows(4, start=20))),
        "test": str(write_csv(base / "test.csv", toy_rows(5, start=30))),
    }


def toy_options(files: dict[str, str]) -> list[str]:
    """The data options of the toy task."""
    return [part for split, path in files.items() for part in (f"--{split}_file", path)]


def run_script(name: str, *options: str, cwd: Path | None = None, processes: int = 1, timeout: int = 240, check=True):
    """Runs a script as a user does; several processes with torchrun on the CPU (gloo)."""
    command = [sys.executable]
    if processes > 1:
        # `accelerate launch` starts several processes for GPUs only; torchrun is what it calls for them.
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--master_port", str(29500 + os.getpid() % 1000)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*command, str(ROOT / name), *options],
        cwd=cwd or ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers as well
        raise
    result = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    if check and result.returncode:
        raise AssertionError(f"exit code {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}")
    return result
