"""The first hour with a GPU, in one command: its tests, then speed, memory and profiles beside the bars.

    python benchmarks/gpu.py --minutes 40
    python benchmarks/gpu.py --minutes 40 --embedded path/to/smollm2.gguf --shapes smollm2 llama-1b
    python benchmarks/gpu.py --tiny true          # what it does, in a minute on a CPU; its figures say nothing

Nothing is downloaded: models have random weights in the shapes of Llama-3.2-1B, Llama-3.2-3B and Mistral-7B, and rows
are drawn, in the shapes of Banking77, arXiv, running text and conversations. Every measurement is a process of its own
with a time limit, and a line of <output_dir>/gpu.jsonl as soon as it is there; one that fails is a line that says why.
Called again, it measures what is missing. Each step may take its share of the minutes, and leaves the rest to the
next.

Tokens are those of the rows, whatever is computed. The share of the peak counts the floating-point operations that the
layout needs (a prefix once in a pack; the vocabulary at the targets alone; nothing twice), and never the peers' waste.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import score_speed, train_speed  # noqa: E402
from common.disk import read_lines  # noqa: E402
from common.errors import InputError, cli_errors  # noqa: E402
from common.options import option, parse_config  # noqa: E402

PEAK = 989e12  # dense bf16 FLOP/s of an H100 or H200 (SXM)
SHARES = {"tests": 8, "classification": 10, "long texts": 4, "causal LM": 5, "chat": 4, "scoring": 5, "profile": 4}
SHAPES = {  # Llama's architecture: vocabulary, hidden, feed-forward, layers, heads, key-value heads
    "llama-1b": (128256, 2048, 8192, 16, 32, 8),
    "mistral-7b": (32768, 4096, 14336, 32, 32, 8),
    "llama-3b": (128256, 3072, 8192, 28, 24, 8),
    "smollm2": (49152, 576, 1536, 30, 9, 3),
    "tiny": (600, 64, 128, 2, 4, 2),
}
DATA = {  # labels, words of a text from .. to, as Banking77 and arXiv have them
    "classification": (77, 5, 25),
    "long texts": (5, 120, 220),
    "scoring": (77, 5, 25),
}
BARS = {  # what the issue asks of one H100 or H200: job -> [(figure, least)]
    "classification/llama-1b/lora/plainlora": [("times trl_tuned", 8.0)],
    "classification/llama-1b/nf4/plainlora": [("times trl_tuned", 8.0)],
    "long texts/llama-1b/lora/plainlora": [("times trl_tuned", 1.5)],
    "causal LM 1024/llama-1b/lora/plainlora": [("times trl_tuned", 1.0), ("share of peak", 0.5)],
    "causal LM 1024/llama-1b/nf4/plainlora": [("share of peak", 0.45)],
    "causal LM 1024/mistral-7b/lora/plainlora": [("times trl_tuned", 1.0), ("share of peak", 0.5)],
    "causal LM 1024/mistral-7b/nf4/plainlora": [("share of peak", 0.45)],
    "chat/llama-1b/lora/packing": [("times trl_tuned", 1.0)],
    "scoring/smollm2/bf16/plainlora_answers": [("texts per second", 5000.0)],
    "scoring/llama-1b/bf16/plainlora_answers": [("texts per second", 1000.0)],
}
MEMORY = 0.9  # of the peer's, at most, in causal LM and chat


@dataclass
class Config:
    """gpu"""

    minutes: float = option(40.0, "what all steps may take together", at_least=0)
    shapes: list[str] | None = option(None, f"unset: llama-1b mistral-7b llama-3b; there are {' '.join(SHAPES)}")
    embedded: str | None = option(None, "file or folder of the embedded model; unset: random weights in its shape")
    steps: list[str] | None = option(None, f"unset: all, {', '.join(SHARES)}")
    again: bool = option(False, "measure again what the file has")
    tiny: bool = option(False, "tiny shapes and few rows, on whatever device is there, to try this file")
    output_dir: str = option("benchmarks/results", "where the lines, and for a while the models, go")
    worker: str | None = option(None, "internal: a job, as JSON")


@dataclass
class Job:
    """One measurement. kind: the function that makes it."""

    step: str
    work: str
    shape: str
    precision: str  # lora, nf4, bf16, fp32
    way: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.work, self.shape, self.precision, self.way)))


def jobs(config: Config) -> Iterator[Job]:
    """All measurements, the most telling ones of each step first."""
    shapes = config.shapes or (["tiny"] if config.tiny else ["llama-1b", "mistral-7b", "llama-3b"])
    yield Job("tests", "tests", "", "", "pytest", "run_tests")
    for step, works, ways, precisions in (
        ("classification", {"classification": {}}, ("plainlora", "trl_tuned", "padded", "plain_loop"), ("lora", "nf4")),
        ("long texts", {"long texts": {}}, ("plainlora", "trl_tuned"), ("lora",)),
        ("causal LM", {f"causal LM {n}": {"block_size": n} for n in ((16, 32) if config.tiny else (1024, 128))},
         ("plainlora", "trl_tuned"), ("lora", "nf4")),
        ("chat", {"chat": {}}, ("packing", "trl_tuned", "plainlora"), ("lora",)),
    ):  # fmt: skip
        for shape in shapes:
            for precision in precisions:
                for work, options in works.items():
                    for way in ways:
                        yield Job(step, work, shape, precision, way, "train", options)
        if step == "classification":  # two layers in fp32: the losses of 30 updates
            for way in ("plainlora", "trl_tuned", "plain_loop"):
                yield Job(step, "losses", shapes[0], "fp32", way, "train", {"checking": True})
    for shape in ([] if config.tiny else ["smollm2"]) + shapes:
        for way in ("plainlora_answers", "plainlora", "generate"):
            yield Job("scoring", "scoring", shape, "bf16", way, "score")
    block = 32 if config.tiny else 1024
    for precision in ("lora", "nf4"):
        for work in ("classification", f"causal LM {block}", "chat", "long texts"):
            options = {"block_size": block} if work.startswith("causal LM") else {}
            yield Job("profile", work, shapes[0], precision, "profile", "profile", options)
    yield Job("profile", "scoring", shapes[0], "bf16", "profile", "profile")


def main() -> None:
    config = parse_config(Config)
    if unknown := {*(config.shapes or [])} - {*SHAPES} or {*(config.steps or [])} - {*SHARES}:
        raise InputError(f"There is no {' '.join(unknown)}: --shapes {' '.join(SHAPES)}, --steps {', '.join(SHARES)}.")
    folder = Path(config.output_dir)
    if config.worker:
        job = Job(**json.loads(config.worker))
        print(f"RESULT {json.dumps(KINDS[job.kind](config, job, folder))}")
        return
    import torch

    if not torch.cuda.is_available() and not config.tiny:
        raise InputError("There is no GPU here, or this torch has no CUDA. `--tiny true` tries this file on a CPU.")
    folder.mkdir(parents=True, exist_ok=True)
    ledger = folder / "gpu.jsonl"
    found = {} if config.again or not ledger.exists() else read(ledger)
    if ledger.exists() and not ledger.read_text(encoding="utf-8").endswith("\n"):  # a crash has cut a line short
        with ledger.open("a", encoding="utf-8") as file:
            file.write("\n")
    chosen = [job for job in jobs(config) if not config.steps or job.step in config.steps]
    started = time.monotonic()
    for step in [step for step in SHARES if any(job.step == step for job in chosen)]:
        left = config.minutes * 60 - (time.monotonic() - started)
        later = [name for name in list(SHARES)[list(SHARES).index(step) :] if any(job.step == name for job in chosen)]
        until = time.monotonic() + left * SHARES[step] / sum(SHARES[name] for name in later)
        for job in (job for job in chosen if job.step == step and not found.get(job.name, {}).get("figures")):
            if time.monotonic() >= until:
                print(f"{job.name}: no time left in this step", flush=True)
                continue
            found[job.name] = {"job": job.name, **measured(config, job, until - time.monotonic())}
            with ledger.open("a", encoding="utf-8") as file:  # as it comes: nothing that was measured is lost
                file.write(json.dumps({**found[job.name], "device": device_name(), "time": time.time()}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            print(described(job.name, found), flush=True)
    print("\n" + "\n".join(described(name, found) for name in found))


def read(ledger: Path) -> dict[str, dict[str, Any]]:
    """The last line of each job; one that a crash has cut short is passed over."""
    return {entry["job"]: entry for entry in read_lines(ledger)}


def measured(config: Config, job: Job, seconds: float) -> dict[str, Any]:
    """{"figures": ...} of a process of its own, or {"failed": why}."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", json.dumps(asdict(job))]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings.setdefault("OMP_NUM_THREADS", "8")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=settings,
                               cwd=ROOT, start_new_session=True)  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it has started as well
        output, _ = process.communicate()
        return {"failed": f"not done after {seconds:.0f} s", "output": output[-3000:]}
    results = [line for line in output.splitlines() if line.startswith("RESULT ")]
    if process.returncode or not results:
        return {"failed": f"exit code {process.returncode}", "output": output[-3000:]}
    return {"figures": json.loads(results[-1].removeprefix("RESULT "))}


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def described(name: str, found: dict[str, dict[str, Any]]) -> str:
    """One line: the figures, and beside them the bars."""
    entry = found[name]
    if "failed" in entry:
        return f"{name}: FAILED, {entry['failed']}"
    figures, peer = dict(entry["figures"]), found.get(f"{name.rpartition('/')[0]}/trl_tuned", {}).get("figures")
    if peer and peer.get("rows per second") and figures.get("rows per second") and peer is not entry["figures"]:
        figures["times trl_tuned"] = figures["rows per second"] / peer["rows per second"]
        figures["of trl_tuned's memory"] = figures["peak memory MB"] / max(1e-9, peer["peak memory MB"])
    if peer and figures.get("losses") and peer.get("losses"):
        pairs = zip(figures["losses"], peer["losses"], strict=False)
        figures["largest difference to trl_tuned's"] = max(abs(a - b) for a, b in pairs)
    shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
             if not isinstance(value, list)]  # fmt: skip
    for figure, least in BARS.get(name, []):
        if figure in figures:
            shown.append(f"[{figure} at least {least:g}: {'met' if figures[figure] >= least else 'MISSED'}]")
    memory = figures.get("of trl_tuned's memory")
    if memory is not None and name.startswith(("causal LM", "chat")) and not name.endswith("trl_tuned"):
        shown.append(f"[memory at most {MEMORY:g} of trl_tuned's: {'met' if memory <= MEMORY else 'MISSED'}]")
    return f"{name}: " + ", ".join(shown)


# --- models and data


def model_of(config: Config, job: Job, folder: Path) -> str:
    """The folder of a random-weight model of the shape, made once; or the embedded one, where its file is given."""
    if job.shape == "smollm2" and config.embedded:
        return config.embedded
    path = folder / "models" / job.shape
    if (path / "done").exists():
        return str(path)
    import torch
    import transformers

    vocabulary, hidden, wide, layers, heads, shared = SHAPES[job.shape]
    shape = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=shared, max_position_embeddings=4096, bos_token_id=1,
        eos_token_id=2, pad_token_id=2, tie_word_embeddings=job.shape != "mistral-7b",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(path)
    tokenizer_of(path)
    (path / "done").touch()
    return str(path)


def tokenizer_of(path: Path) -> None:
    """A byte-level BPE in which nearly every drawn word is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=599, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(words()) for _ in range(4)] * 8, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(path)


def words() -> list[str]:
    """80 words of two syllables."""
    return [a + b for a in ("ba", "ke", "li", "mo", "nu", "pa", "re", "so") for b in ("dan", "fel", "gim", "hop", "jur",
            "kas", "lem", "nit", "pox", "tuz")]  # fmt: skip


def text_of(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(words(), k=rng.randint(least, most)))


def data_of(job: Job, count: int, folder: Path) -> dict[str, Any]:
    """Options that name a file of drawn rows."""
    rng, path = random.Random(job.work), folder / "rows"
    if job.work.startswith("causal LM"):
        path = path.with_suffix(".txt")
        lines = [text_of(rng, 60, 100) for _ in range(count * job.options["block_size"] // 40)]
        path.write_text("\n".join(lines), encoding="utf-8")
        return {"task": "causal_lm", "train_file": str(path)}
    path = path.with_suffix(".jsonl")
    if job.work == "chat":
        answers = [min(300, 5 + round(rng.lognormvariate(4.6, 0.7))) for _ in range(count)]  # words
        rows = [{"instruction": text_of(rng, 5, 60), "response": text_of(rng, n, n)} for n in answers]
        options: dict[str, Any] = {"task": "chat", "chat_template": "plain", "max_length": 512}
    else:
        labels, least, most = DATA.get(job.work, DATA["classification"])
        names = [" ".join(rng.sample(words(), 3)) for _ in range(labels)]
        rows = [{"text": text_of(rng, least, most), "label": names[i % labels]} for i in range(count)]
        options = {"task": "classification", "label_column": "label", "max_length": 1024}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"train_file": str(path), **options}


# --- kinds of measurements


def run_tests(config: Config, job: Job, folder: Path) -> dict[str, Any]:
    """`pytest -m cuda`: what passed, failed or was skipped, and the failures' names."""
    files = ["tests/test_cuda.py"] if config.tiny else ["tests"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "cuda",
        "-q",
        "-rfE",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        *files,
    ]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    wanted = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    marks = "".join(line.partition(" ")[0] for line in lines if set(line.partition(" ")[0]) <= set(".FsxE"))
    return {"passed": marks.count("."), "failed": marks.count("F") + marks.count("E"), "skipped": marks.count("s"),
            "failures": wanted}  # fmt: skip


def train(config: Config, job: Job, folder: Path) -> dict[str, Any]:
    """Speed, share of the peak and memory of one trainer on one work; its losses where they are compared."""
    import torch

    from common.log import peak_memory

    on_gpu, checking = torch.cuda.is_available(), bool(job.options.get("checking"))
    rows = 4 if config.tiny else 8 if checking else 32
    warmup, updates = (1, 2) if config.tiny else (5, 10)
    tiny_checking = {"CHECKED": (1, 2)} if config.tiny else {}
    with tempfile.TemporaryDirectory() as scratch, mock.patch.multiple(train_speed, **tiny_checking):
        count = rows * (max(train_speed.CHECKED) if checking else warmup + updates)
        own = {"block_size": job.options["block_size"]} if "block_size" in job.options else {}
        settings = train_speed.Config(
            model=model_of(config, job, folder), **data_of(job, count + 2 * rows, Path(scratch)), **own,
            rows_per_update=rows, micro_batch=rows, own_micro_batch=rows, warmup=warmup, updates=updates,
            load_in_4bit=job.precision == "nf4", device="cuda" if on_gpu else "cpu", validation_fraction=0.0,
            test_fraction=0.0, lora_r=16, lora_alpha=32,
        )  # fmt: skip
        settings.packing, settings.shared_prefix = job.way == "packing", "off" if job.way == "padded" else "auto"
        for size in (rows, rows // 4):  # a peer's pass of all rows may not fit
            settings.micro_batch = settings.own_micro_batch = size
            try:
                work = train_speed.prepare(settings, checking, Path(scratch))
                counted: list[Counts] = []
                with counts_of(counted):
                    way = "plainlora" if job.way in ("packing", "padded") else job.way
                    ticks, losses = train_speed.WORKERS[way](work, Path(scratch) / f"run{size}")
                break
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        else:
            raise InputError("Neither size of a pass fits the GPU's memory.")
    if checking:
        return {"losses": [losses[i - 1] for i in train_speed.CHECKED if i <= len(losses)]}
    seconds = sum(ticks[warmup:])
    timed = work.rows[warmup * rows :]
    tokens, targets = sum(len(p) + len(a) for p, a in timed), sum(len(a) for _, a in timed)
    needed = counted[warmup:] or [Counts(tokens, sum((len(p) + len(a)) ** 2 // 2 for p, a in timed), targets)]
    flops = sum(flops_of(job.shape, counts) for counts in needed)
    return {
        "rows per second": len(timed) / seconds, "tokens per second": tokens / seconds,
        "label tokens per second": targets / seconds, "share of peak": flops / seconds / PEAK,
        "peak memory MB": peak_memory() / 1e6, "rows per pass": size, "seconds": seconds,
    }  # fmt: skip


@dataclass
class Counts:
    """What an update computes: tokens, pairs of a query and a key that it sees, targets."""

    tokens: int = 0
    pairs: int = 0
    targets: int = 0


def flops_of(shape: str, counts: Counts) -> float:
    """Of LoRA training, forward and back: 4 per frozen weight and token, 6 per one of the adapter, 12 per pair."""
    vocabulary, hidden, wide, layers, heads, shared = SHAPES[shape]
    narrow = hidden // heads * shared
    weights = layers * (2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * wide)
    adapter = 16 * layers * (2 * 2 * hidden + 2 * (hidden + narrow) + 3 * (hidden + wide))
    head = 4 * hidden * vocabulary * counts.targets
    return (4 * weights + 6 * adapter) * counts.tokens + head + 12 * layers * hidden * counts.pairs


def counts_of(found: list[Counts]) -> Any:
    """Notes the counts of every update of our scripts."""
    from common.train import loop

    real = loop.micro_batches

    def noted(*args: Any) -> Any:
        made, counts = real(*args), Counts()
        for batch in made:
            counts.targets += len(batch.targets)
            if batch.layout is None:
                lengths = batch.attention_mask.sum(1).tolist() if batch.attention_mask.ndim == 2 else []
            else:
                lengths = list(batch.layout.lengths)
            counts.tokens += sum(lengths)
            counts.pairs += sum(length**2 // 2 for length in lengths)
            if batch.layout and not lengths:  # a pack
                rows, prefix, tokens = batch.layout.rows, batch.layout.prefix, batch.input_ids.numel()
                row = (tokens - prefix) // rows
                counts.tokens += tokens
                counts.pairs += prefix**2 // 2 + rows * row * (prefix + row // 2)
        found.append(counts)
        return made

    return mock.patch.object(loop, "micro_batches", noted)


def score(config: Config, job: Job, folder: Path) -> dict[str, Any]:
    """Texts per second after an instruction with 77 labels."""
    import torch
    import transformers

    from common.data.classification import load_classification
    from common.log import peak_memory
    from common.model import base_model, classifier
    from common.text.prompts import read_template

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = model_of(config, job, folder)
    settings = SimpleNamespace(
        model=path, revision=None, trust_remote_code=False, load_in_4bit=False, load_in_8bit=False,
        attn_implementation=None, mixed_precision="bf16", full_finetuning=False,
    )  # fmt: skip
    count = 8 if config.tiny else 1024 if job.way == "plainlora_answers" else 128
    with tempfile.TemporaryDirectory() as scratch:
        data_config = train_speed.Config(**data_of(job, count * 2, Path(scratch)), validation_fraction=0.0,
                                         test_fraction=0.0)  # fmt: skip
        data = load_classification(data_config)
    if config.embedded and job.shape == "smollm2":
        from common.hub import resolve_model

        path = resolve_model(path, None)
    model, _ = base_model.load_base(path, settings, device=device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    prompt = classifier.classification_prompt(
        tokenizer, False, labels=data.labels, multi_label=False, template=read_template(None, "generative"),
        max_length=1024,
    )  # fmt: skip
    subject: Any = SimpleNamespace(
        classifier=classifier.Classifier(model, prompt, tokenizer), device=device, precision="bf16"
    )
    examples, size = data.splits["train"], 4 if config.tiny else 64

    def seconds(some: Sequence[Any]) -> float:
        started = time.perf_counter()
        with base_model.precision(device, "bf16"):
            score_speed.SCORERS[job.way](subject, some, size)
        return time.perf_counter() - started

    seconds(examples[:count])  # compiles
    return {"texts per second": count / seconds(examples[count : 2 * count]), "peak memory MB": peak_memory() / 1e6}


def profile(config: Config, job: Job, folder: Path) -> dict[str, Any]:
    """The kernels that take most of the device's time in a training run, and their share of it."""
    import torch
    from torch.profiler import ProfilerActivity

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    way = {"chat": "packing", "scoring": "plainlora_answers"}.get(job.work, "plainlora")
    with torch.profiler.profile(activities=activities) as profiler:
        (score if job.work == "scoring" else train)(config, replace(job, way=way), folder)
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events) or 1.0
    table = [[event.key[:120], event.count, round(getattr(event, name) / total, 4)] for event in events[:20]]
    return {"slowest": table[0][0], "its share": table[0][2], "kernels": table}


KINDS: dict[str, Callable[[Config, Job, Path], dict[str, Any]]] = {
    "run_tests": run_tests, "train": train, "score": score, "profile": profile,
}  # fmt: skip


if __name__ == "__main__":
    with cli_errors():
        main()
