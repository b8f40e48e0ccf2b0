"""Builds public data sets as local files for the training scripts, with a SOURCE.json that says where they are from.

    python -m common.prepare arxiver                       # the 5 most frequent arXiv categories, 80/10/10
    python -m common.prepare amazoncat13k --max_rows 20000
    python -m common.prepare finetome --max_rows 1000 --min_score 4.5
    python -m common.prepare ag_news --source some/folder  # a copy of the data set instead of the hub's

A builder's parameters are the options it takes. To add a data set, write a builder and enter it in BUILDERS.
"""

import argparse
import inspect
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.data.builders import BUILDERS, OPTIONS, write
from common.data.splits import SPLITS
from common.errors import InputError, cli_errors


def main(argv: Sequence[str] | None = None) -> None:
    """Builds one data set and prints the command that trains on it."""
    style: dict[str, Any] = {"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m common.prepare", description=__doc__.split("\n")[0], **style)
    commands = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, builder in BUILDERS.items():
        command = commands.add_parser(name, help=builder.__doc__, description=builder.__doc__, **style)
        command.add_argument("--output_dir", type=Path, default=Path("data") / name, help="folder to write")
        for option, parameter in inspect.signature(builder).parameters.items():
            convert, text = OPTIONS[option]
            command.add_argument(f"--{option}", type=convert, default=parameter.default, help=text)
    options = vars(parser.parse_args(argv))
    name, folder = options.pop("name"), options.pop("output_dir")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output_dir {folder} exists and is not empty. Give another one, or delete it first.")
    if negative := [option for option, value in options.items() if isinstance(value, int | float) and value < 0]:
        raise InputError(f"--{negative[0]} {options[negative[0]]}: must be at least 0.")
    print(f"reading {options['source']}")
    prepared = BUILDERS[name](**options)
    write(prepared, folder, {"name": name, "source": options["source"], "options": options})
    names = [split for split in SPLITS if split in prepared.tables]
    files = [word for split in names for word in (f"--{split}_file", str(folder / f"{split}{prepared.suffix}"))]
    for split, table in prepared.tables.items():
        print(f"wrote {folder / split}{prepared.suffix}: {len(table)} rows")
    print(f"wrote {folder / 'SOURCE.json'}\n\nTrain on it:")
    print(shlex.join(["accelerate", "launch", prepared.launch[0], *files, *prepared.launch[1:]]))


if __name__ == "__main__":
    with cli_errors():
        main()
