"""Several runs in one call: one per seed on the same split (--seeds), or one per fold (--folds), and their table."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from common.errors import InputError, printable
from common.log import chosen_trackers
from common.train.run_folder import check_output_dir, runs_folder


def configs_per_seed(config: Any) -> list[Any]:
    """The configs of the runs to make: one per seed or fold, each with a folder of its own, or `config` alone.

    Raises InputError for a tracker that is not installed, and where one of them could not write its folder.
    """
    chosen_trackers(config.report_to)
    several = [(f"seed_{seed}", {"seed": seed, "seeds": None}) for seed in config.seeds or []]
    if getattr(config, "folds", None) and not config.fold:
        several = [(f"fold_{fold}", {"fold": fold}) for fold in range(1, config.folds + 1)]
    runs = [
        replace(config, **changes, output_dir=config.output_dir and f"{config.output_dir}/{name}")
        for name, changes in several
    ]
    for run in [] if config.resume_from_checkpoint else runs or [config]:
        check_output_dir(run)
    for table in ("seeds.md", "folds.md") if runs and config.output_dir else ():
        if (Path(config.output_dir) / table).exists():
            raise InputError(f"--output_dir {config.output_dir}: there is {table} already. Choose another folder.")
    return runs or [config]


def train_each(runs: Sequence[Any], config: Any, train: Callable[..., dict[str, Any]]) -> None:
    """Makes the runs, and of several the table of their figures; exit code 1 where one has failed.

    runs: of `configs_per_seed`. train: (config of one run, last=whether no other follows) -> its figures.
    """
    results: dict[int, dict[str, Any] | str] = {}
    several = "seed" if config.seeds else "fold" if runs[0] is not config else ""
    if config.dry_run and several:
        print(f"{len(runs)} runs would be made, one after another; this is about the first one.", flush=True)
    made = runs[:1] if config.dry_run else runs
    for run in made:
        number = getattr(run, several or "seed")
        with _continue_after_failure(results, number, bool(several)):
            results[number] = train(run, last=run is made[-1])
    from accelerate import PartialState

    from common.measure.run_table import write_seed_table

    if several and PartialState().is_main_process and not config.dry_run:
        folder = Path(config.output_dir or runs_folder(config))
        names = chain([f"{several}s.md"], (f"{several}s_{number}.md" for number in count(2)))
        write_seed_table(next(folder / name for name in names if not (folder / name).exists()), results, several)
    if any(isinstance(result, str) for result in results.values()):
        sys.exit(1)


@contextlib.contextmanager
def _continue_after_failure(results: dict[int, Any], number: int, several: bool) -> Iterator[None]:
    """Notes the failure of one of several runs in `results`, so that the others still run; Ctrl-C ends all."""
    from accelerate import PartialState
    from accelerate.utils import release_memory

    try:
        yield
    except Exception as error:
        if not several or PartialState().num_processes > 1:  # the other processes may not have failed
            raise
        if isinstance(error, InputError | FloatingPointError):
            print(printable(f"error: {error}"), file=sys.stderr)
        else:
            traceback.print_exc()
        results[number] = f"failed: {type(error).__name__}: {error}"
    release_memory()
