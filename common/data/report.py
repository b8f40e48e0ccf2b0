"""The data report as Markdown: what was read, kept, shortened and dropped, and one row as the model sees it."""

from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    header, *rows = [[str(cell).replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def data_report(report: dict[str, Any], example: str) -> str:
    """The data report as Markdown: what was kept, shortened, dropped and why, and one row as the model sees it."""
    lines = ["# Data report", ""]
    for split, source in report["files"].items():
        lines.append(f"- {split}: {source['name']} (sha256 {source['sha256'][:12]})")
    drawn = ", stratified" if "labels" in report else ""
    for split, count in report.get("cut_from_train", {}).items():
        lines.append(f"- {split}: {count} rows cut from the training file{drawn}; row ids in splits.json")
    for split, shapes in report.get("shapes", {}).items():
        lines.append(f"- {split}: shape {', '.join(f'{name} ({count} rows)' for name, count in shapes.items())}")
    if template := report.get("chat_template"):
        lines.append(f"- {template['source']} (sha256 {template['sha256'][:12]}); answers end with {template['end']}")
        lines += [f"- {note}" for note in template["notes"]]
    columns = {
        "read": "read", "dropped_empty_text": "dropped: no text", "few_shot": "in the prompt",
        "dropped_unanswered": "turns dropped: no answer", "with_tools": "with tools, in the system turn",
        "used": "used", "answers": "answers", "in_several_rows": "too long for one row",
        "without_early_turns": "rows without early turns", "shortened": "shortened", "cut_answers": "answers cut",
        "duplicates": "duplicate texts", "also_in_train": "also in train",
    }  # fmt: skip
    columns = {key: name for key, name in columns.items() if any(key in entry for entry in report["rows"].values())}
    rows = [[split, *(str(entry.get(key, "-")) for key in columns)] for split, entry in report["rows"].items()]
    lines += ["", table(["rows", *columns.values()], rows), ""]
    if "labels" in report:
        splits, entries = list(report["rows"]), report["rows"].values()
        counts = [[label, *(str(entry["label_counts"][label]) for entry in entries)] for label in report["labels"]]
        lines += [table(["label", *splits], counts), ""]
    lines += ["One training row; what is trained on stands in [[ ]]:", ""]
    return "\n".join([*lines, *(f"    {line}" for line in example.splitlines()), ""])


def corpus_report(report: dict[str, Any], start: str, wrapped: bool, block: str) -> str:
    """The data report of a corpus as Markdown: text and blocks of each split, what the blocks are, and one of them.

    start: the text of the ids in front of every block. wrapped: whether tokens see earlier documents of their block.
    """
    lines = ["# Data report", ""]
    for split, source in report["files"].items():
        lines.append(f"- {split}: {source['name']} (sha256 {source['sha256'][:12]})")
    for split in report["splits"].keys() - report["files"].keys():
        lines.append(f"- {split}: cut from the training text; the numbers of its pieces are in splits.json")
    columns = ("documents", "bytes", "words", "tokens", "blocks", "used")
    rows = [[split, *(f"{entry[name]:,}" for name in columns)] for split, entry in report["splits"].items()]
    lines += ["", table(["split", *columns], rows), ""]
    lines.append(f"Every block begins with {start}." if start else "Blocks begin without a BOS token.")
    lines.append(
        "Blocks are windows of the text: a token sees the end of the document before its own (wrapped packing)."
        if wrapped
        else "No token sees another document of its block (document masking)."
    )
    return "\n".join([*lines, "", "One training block:", "", *(f"    {line}" for line in block.splitlines()), ""])
