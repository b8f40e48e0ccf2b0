"""Several runs in one call (--seeds): one a seed, on the same split, with a table of their figures."""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.train import run_folder


def runs_of(config: Any) -> list[Any]:
    """The configs of the runs to make: one a seed, each with a folder of its own, or `config` alone."""
    runs = [
        replace(config, seed=seed, seeds=None, output_dir=config.output_dir and f"{config.output_dir}/seed_{seed}")
        for seed in config.seeds or []
    ]
    for run in [] if config.resume_from_checkpoint else runs or [config]:
        run_folder.check_output_dir(run)
    return runs or [config]


@contextlib.contextmanager
def keep_others(results: dict[int, Any], run: Any, config: Any) -> Iterator[None]:
    """Notes the failure of one of several runs in `results`, so that the others still run; Ctrl-C ends all."""
    from accelerate import PartialState
    from accelerate.utils import release_memory

    try:
        yield
    except Exception as error:
        if (
            not config.seeds
            or PartialState().num_processes > 1
            and not isinstance(error, InputError | FloatingPointError)
        ):
            raise  # the other processes may not have failed
        traceback.print_exc()
        results[run.seed] = f"failed: {type(error).__name__}: {error}"
    release_memory()


def finish(results: dict[int, Any], config: Any) -> None:
    """Writes the table of all seeds; exit code 1 where one has failed."""
    from accelerate import PartialState

    from common.measure.run_table import write_seed_table

    if config.seeds and PartialState().is_main_process and not config.dry_run:
        write_seed_table(Path(config.output_dir or run_folder.runs_folder(config)) / "seeds.md", results)
    if any(isinstance(result, str) for result in results.values()):
        sys.exit(1)
