"""Scripts in processes of their own, as a user runs them."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT

CPU_SECONDS = 2.0


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


# torchrun would take --run for an option of its own, which `accelerate launch` does not.
CALLS = """
import sys
sys.path.insert(0, sys.argv[1])
import {name} as script
from common.train import loop

finish = loop.finish

def stay_connected(*objects, last=True):
    finish(*objects, last=False)

for number, options in enumerate({calls}, 1):
    loop.finish = finish if number == {count} else stay_connected
    sys.argv[1:] = options
    script.main()
"""


def run_in_two_processes(name: str, folder: Path, *calls: Sequence[object]) -> str:
    """Calls a script with one list of options after the other, in two processes that are started once; its stderr."""
    script = folder / f"{name}_in_two.py"
    options = [list(map(str, call)) for call in calls]
    script.write_text(CALLS.format(name=name, calls=repr(options), count=len(calls)), encoding="utf-8")
    return run_script(str(script), str(ROOT), processes=2).stderr


@dataclass
class Ended:
    code: int
    output: str
    error: str
    cpu: float
    wall: float


def run_alone(*argv: str, script: str = "train_cls.py", cwd: Path, **environment: str) -> Ended:
    """Runs a script as a user does, in an empty folder, with a hub that refuses connections unless told otherwise."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(cwd / "hub"), "NO_PROXY": "*", **environment}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *argv],
        cwd=cwd,
        env=kept | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ended(result.returncode, result.stdout, result.stderr, cpu, time.perf_counter() - started)


def expect_error(ended: Ended, *parts: str) -> None:
    """One paragraph on stderr, nothing else; exit code 2; soon; with what a person needs to know."""
    assert "Traceback" not in ended.error
    assert ended.code == 2, ended.error
    assert ended.error.startswith("error: ") and ended.error.count("\n") == 1, ended.error
    assert ended.output == ""
    assert ended.cpu < CPU_SECONDS
    for part in parts:
        assert part in ended.error
