"""Runs side by side: `python -m common.report table outputs/...`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.errors import cli_errors
from common.measure.run_table import write_table


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m common.report table RUN...`: runs, or folders of runs, side by side."""
    parser = argparse.ArgumentParser(prog="python -m common.report", allow_abbrev=False)
    parser.add_argument("what", choices=["table"], help="table: runs of one task side by side, as Markdown, CSV, PNG")
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="run folder, or a folder of runs")
    parser.add_argument("--output_dir", type=Path, help="unset: the first folder given")
    options = parser.parse_args(argv)
    target = options.output_dir or options.folders[0]
    print(f"{write_table(options.folders, target)}\n\nWritten to {target}")


if __name__ == "__main__":
    with cli_errors():
        main()
