"""A run in every format that it can be taken home in: size on disk, tokens per second, and whether answers stay.

    python benchmarks/export_formats.py --run RUN --gguf_types f16 q8_0 q4_k_m

Each format answers the same held-out questions greedily, one after the other. `fp32`: the adapter on its base,
computed in fp32, whose answers the others are compared with; `adapter`: computed as trained; `merged`: in bf16; `NF4`:
the merged model, quantized while loading. Exports that RUN/export has are used again.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402

from common import export as command  # noqa: E402
from common import open_run  # noqa: E402
from common.data.report import table  # noqa: E402
from common.disk import read_json  # noqa: E402
from common.errors import InputError, cli_errors  # noqa: E402
from common.model import generation  # noqa: E402
from common.model.base_model import load_base, precision  # noqa: E402
from common.model.llama_cpp import LlamaCpp  # noqa: E402
from common.options import CHAT, Sampling, option, parse_config  # noqa: E402
from common.use import export  # noqa: E402


@dataclasses.dataclass
class Config:
    """export_formats"""

    run: str | None = option(None, "run folder of train_sft.py")
    gguf_types: list[str] | None = option(None, "GGUF files to make; unset: f16 and q8_0")
    questions: int = option(50, "held-out questions", at_least=1)
    max_new_tokens: int = option(32, "tokens of an answer at most", at_least=1)
    threads: int = option(1, "CPU threads", at_least=1)


def main() -> None:
    config = parse_config(Config)
    torch.set_num_threads(config.threads)
    run = open_run(config.run)
    if run.task != CHAT or run.folder is None:
        raise InputError(f"{run.name}: give a run of train_sft.py.")
    options = export.replay_options(run, command.Config(run=run.name))
    held_out = export.HeldOut(run, options, None, config.questions)
    home = run.run_folder / "export"
    if not (home / "merged").is_dir():
        export.export_merged(run, home / "merged", "bf16", held_out)
    files = {kind: home / f"gguf-{kind}" for kind in config.gguf_types or ("f16", "q8_0")}
    for kind, folder in files.items():
        if not folder.is_dir():
            export.export_gguf(run, folder, kind, held_out)
    side = export.load_side(run, held_out, torch.device("cpu"))
    prompts, count = [row.prompt for row in side.rows], lambda text: len(side.tokenizer(text)["input_ids"])
    folders = {"fp32": run.folder, "adapter": run.folder, "merged": home / "merged", "NF4": home / "merged"}
    folders |= {f"GGUF {kind}": folder for kind, folder in files.items()}
    answers: dict[str, list[str]] = {}
    rows = []
    for name, folder in folders.items():
        answer = in_llama_cpp(folder, config) if "GGUF" in name else in_transformers(folder, config, name)
        answer(prompts[0])  # the first one is slower
        started = time.perf_counter()
        answers[name] = [answer(prompt) for prompt in prompts]
        speed = sum(map(count, answers[name])) / (time.perf_counter() - started)
        same = sum(a == b for a, b in zip(answers[name], answers["fp32"], strict=True))
        size = sum(file.stat().st_size for kind in ("safetensors", "gguf") for file in folder.glob(f"*.{kind}"))
        certificate = read_json(folder / "certificate.json") if name != "NF4" else {}
        kl = f"{certificate['tokens']['kl_per_token']:.5f}" if certificate else ""
        rows.append([name, f"{size / 2**20:.0f} MB", f"{speed:.1f}", f"{same} of {len(prompts)}", kl])
    print(table(["format", "on disk", "tokens/s", "answers as in fp32", "KL of its certificate"], rows))


def in_transformers(folder: Path, config: Config, name: str) -> Callable[[list[int]], str]:
    """Answers by transformers on the CPU, in the precision of the training unless `name` is fp32."""
    run, device = open_run(str(folder)), torch.device("cpu")
    options = export.ReplayConfig(mixed_precision=None)
    run.resolve(options)
    model = run.load_text_model(options, device)
    if name == "fp32":
        export.compute_in_fp32(model, model.model)
    if name == "NF4":
        four_bits = dataclasses.replace(options, load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
        four_bits.full_finetuning = False
        generation_config = model.model.generation_config
        model.model = load_base(str(folder), four_bits)[0].eval()
        model.model.generation_config = generation_config
    sampling = Sampling(do_sample=False, max_new_tokens=config.max_new_tokens)

    def answer(prompt: list[int]) -> str:
        with precision(device, model.precision):
            (found,) = generation.answer_prompts(
                model.model, model.tokenizer, model.template, [prompt], sampling, 1, device
            )
        return found.text

    return answer


def in_llama_cpp(folder: Path, config: Config) -> Callable[[list[int]], str]:
    """Answers by llama.cpp."""
    (file,) = folder.glob("*.gguf")
    llama = LlamaCpp(file, 4096, config.threads)
    return lambda prompt: llama.answer(prompt, config.max_new_tokens).strip()


if __name__ == "__main__":
    with cli_errors():
        main()
