"""Takes a run home: `python -m common.export --run RUN --format merged|gguf|space`.

    python -m common.export --run RUN --format merged                      # for transformers and vLLM
    python -m common.export --run RUN --format gguf --gguf_type q8_0       # for llama.cpp and Ollama
    python -m common.export --run RUN --format space                       # a page on Hugging Face Spaces

Writes RUN/export/<format>, and beside the model a certificate: held-out rows, replayed through what was trained and
through what was exported. Ends with an error where the two differ by more than rounding does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import InputError, cli_errors
from common.options import check, option, parse_config
from common.use.runs import open_run


@dataclass
class Config:
    """export"""

    run: str | None = option(None, "run folder, adapter folder or merged model folder; unset: the newest run")
    format: Literal["merged", "gguf", "space"] = option(
        "merged", "one model for transformers and vLLM; a file for llama.cpp; a page on Hugging Face Spaces"
    )
    gguf_type: Literal["f16", "q8_0", "q4_k_m"] = option("q8_0", "how the weights of a GGUF file are stored")
    dtype: Literal["bf16", "fp16", "fp32"] = option("bf16", "of the weights of a merged model")
    output_dir: str | None = option(None, "unset: RUN/export/<format>")
    test_file: str | None = option(None, "rows for the certificate; unset: the validation split of the run")
    max_eval_samples: int = option(64, "rows of the certificate; of a GGUF file at most 16", at_least=1)
    push_to_hub: str | None = option(None, "upload the folder to this repository on the hub, as owner/name")
    num_threads: int | None = option(None, "CPU threads; unset: all cores", at_least=1)
    trust_remote_code: bool = option(False, "run code that comes with a hub model")


def main() -> None:
    """Exports one run and prints its certificate."""
    config = parse_config(Config)
    check(config)
    run = open_run(config.run)
    if run.folder is None:
        raise InputError(f"--run {run.name} is no folder of a run, so there is nothing to export.")
    target = Path(config.output_dir or run.run_folder / "export" / config.format).resolve()

    import torch

    from common.use import export

    torch.set_num_threads(config.num_threads or torch.get_num_threads())
    held_out = export.HeldOut(run, export.replay_options(run, config), config.test_file, config.max_eval_samples)
    if config.format == "gguf":
        found = export.export_gguf(run, target, config.gguf_type, held_out, config.trust_remote_code)
    else:
        write = export.export_space if config.format == "space" else export.export_merged
        found = write(run, target, config.dtype, held_out, config.trust_remote_code)
    print(f"\nWritten to {target}")
    if found:
        raise InputError(f"{target} is not what was trained: see certificate.txt there. Do not use it.")
    if config.push_to_hub:
        export.push(target, config.push_to_hub, config.format == "space")


if __name__ == "__main__":
    with cli_errors():
        main()
