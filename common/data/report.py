"""The data report as Markdown: what was read, kept, shortened and dropped, and one row as the model sees it."""

import re
from collections.abc import Sequence
from typing import Any

from common.data.labels import SHOWN
from common.errors import printable

ROW_COLUMNS = {  # key in the report -> title; those that no split has are left out
    "read": "read", "dropped_empty_text": "dropped: no text", "few_shot": "in the prompt",
    "also_few_shot": "copies of these",
    "dropped_unanswered": "turns dropped: no answer", "with_tools": "with tools, in the system turn",
    "used": "used", "answers": "answers", "in_several_rows": "too long for one row",
    "without_early_turns": "rows without early turns", "shortened": "shortened", "cut_answers": "answers cut",
    "duplicates": "duplicate texts", "also_in_train": "also in train",
}  # fmt: skip
# A cell's end, HTML, the target of a link or picture, and a backslash that would escape what follows.
OBEYED = r"""[|<]|\](?=\()|\\(?=[!-/:-@\[-`{-~])"""
CORPUS_COLUMNS = ("documents", "bytes", "words", "tokens", "blocks", "used")


def markdown(text: str) -> str:
    """A text within a line of Markdown: shown as it is, whatever it contains."""
    return re.sub(OBEYED, r"\\\g<0>", printable(text)).replace("\n", r"\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    header, *rows = [[markdown(str(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w if i == 0 else "-" * max(1, w - 1) + ":") for i, w in enumerate(widths)]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def data_report(report: dict[str, Any], example: str) -> str:
    """The data report of examples or conversations. example: a training row as the model sees it."""
    facts = []
    drawn = ", stratified" if "labels" in report else ""
    for split, count in report.get("cut_from_train", {}).items():
        facts.append(f"{split}: {count} rows cut from the training file{drawn}; row ids in splits.json")
    for split, shapes in report.get("shapes", {}).items():
        facts.append(f"{split}: shape {', '.join(f'{name} ({count} rows)' for name, count in shapes.items())}")
    if template := report.get("chat_template"):
        facts.append(f"{template['source']} (sha256 {template['sha256'][:12]}); answers end with {template['end']}")
        facts += template["notes"]
    facts += map(markdown, report.get("notes", ()))
    entries = report["rows"]
    columns = {key: title for key, title in ROW_COLUMNS.items() if any(key in entry for entry in entries.values())}
    rows = [[split, *(str(entry.get(key, "-")) for key in columns)] for split, entry in entries.items()]
    parts = [table(["rows", *columns.values()], rows)]
    if "labels" in report:
        facts += _labels_without_a_row(entries)
        counts = [
            [label, *(str(entry["label_counts"][label]) for entry in entries.values())] for label in report["labels"]
        ]
        parts.append(table(["label", *entries], counts))
    if lengths := [f"{split} {_quantiles(entry['lengths'])}" for split, entry in entries.items() if "lengths" in entry]:
        facts.append(f"tokens of a row, of at most {report['max_length']}: {'; '.join(lengths)}")
    return _markdown(report, facts, parts, "One training row; what is trained on is in [[ ]]:", example)


def _quantiles(lengths: dict[str, int]) -> str:
    return ", ".join(f"{name} {length}" for name, length in lengths.items())


def _labels_without_a_row(entries: dict[str, dict[str, Any]]) -> list[str]:
    """A line about the labels that some split lacks, if any does."""
    lacking = []
    for split, entry in entries.items():
        names = [markdown(label) for label, count in entry["label_counts"].items() if not count]
        more = ", ..." if len(names) > SHOWN else ""
        lacking += [f"{split} {len(names)} ({', '.join(names[:SHOWN])}{more})"] if names else []
    return [f"labels without a row: {'; '.join(lacking)}"] if lacking else []


def corpus_report(report: dict[str, Any], start: str, wrapped: bool, block: str) -> str:
    """The data report of a corpus: text and blocks of each split, what the blocks are, and one of them.

    start: the text of the ids in front of every block. wrapped: whether tokens see earlier documents of their block.
    """
    facts = [
        f"{split}: cut from the training text; the numbers of its pieces are in splits.json"
        for split in report["splits"]
        if split not in report["files"]
    ]
    rows = [[split, *(f"{entry[name]:,}" for name in CORPUS_COLUMNS)] for split, entry in report["splits"].items()]
    begin = f"Every block begins with {start}." if start else "Blocks begin without a BOS token."
    seen = (
        "Blocks are windows of the text: a token sees the end of the document before its own (wrapped packing)."
        if wrapped
        else "No token sees another document of its block (document masking)."
    )
    parts = [table(["split", *CORPUS_COLUMNS], rows), f"{begin}\n{seen}"]
    return _markdown(report, facts, parts, "One training block:", block)


def _markdown(report: dict[str, Any], facts: Sequence[str], parts: Sequence[str], shown: str, example: str) -> str:
    """The files of the splits and other facts as a list, parts and findings, then what is shown as an example."""
    files = [f"{split}: {file['name']} (sha256 {file['sha256'][:12]})" for split, file in report["files"].items()]
    listed = "\n".join(f"- {fact}" for fact in (*files, *facts))
    if findings := report.get("findings"):
        lines = (f"- {markdown(line)}" for line in findings)
        parts = [*parts, "\n".join(["What to look at before training:\n", *lines])]
    indented = "\n".join(f"    {line}" for line in example.splitlines())
    return printable("\n\n".join(["# Data report", listed, *parts, shown, indented]) + "\n")
