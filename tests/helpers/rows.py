"""Small data: rows of the toy tasks, conversations, and the files they are written to."""

import csv
import json
from pathlib import Path

WORDS = {
    "sport": "match goal team coach league striker penalty stadium",
    "science": "atom laser quark enzyme genome telescope isotope theorem",
    "music": "violin chorus melody rhythm concert guitar sonata tempo",
}
TOPICS = {"goal": "striker", "atom": "laser", "violin": "chorus", "team": "coach", "quark": "enzyme"}


def toy_rows(per_label: int, labels: tuple[str, ...] = tuple(WORDS), start: int = 0) -> list[dict[str, str]]:
    """Rows whose words give their label away; lengths differ from row to row."""
    rows = []
    for i in range(start, start + per_label):
        for label in labels:
            words = WORDS[label].split()
            text = " ".join(words[(i + k) % len(words)] for k in range(2 + (i * 7) % 9))
            rows.append({"text": f"{text} number {i}", "label": label})
    return rows


def multi_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Rows with any number of the three labels, none and all among them."""
    rows = []
    for i in range(start, start + count):
        chosen = [name for bit, name in enumerate(WORDS) if (i * 5 + 3) % 8 >> bit & 1]
        text = " ".join(word for name in chosen for word in WORDS[name].split()[i % 4 : i % 4 + 2])
        rows.append({"text": f"{text} number {i}", **{name: str(int(name in chosen)) for name in WORDS}})
    return rows


def chats(count: int, start: int = 0) -> list[dict]:
    """Conversations of one to three exchanges of unequal length."""
    rows = []
    for i in range(start, start + count):
        words = list(TOPICS.items())
        messages = []
        for k in range(1 + i % 3):
            question, answer = words[(i + k) % len(words)]
            messages.append({"role": "user", "content": f"{question} number {i}"})
            messages.append({"role": "assistant", "content": " ".join([answer] * (1 + (i * 3 + k) % 5))})
        rows.append({"messages": messages})
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> str:
    """The path as an option takes it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def toy_options(files: dict[str, str]) -> list[str]:
    """The data options of the toy task."""
    return [part for split, path in files.items() for part in (f"--{split}_file", path)]


def task_options(kind: str, base: Path) -> list[str]:
    """Data options of the toy task with one label a row, or several."""
    rows = {"train": toy_rows(8), "validation": toy_rows(2, start=20), "test": toy_rows(5, start=30)}
    if kind == "multi":
        rows = {"train": multi_rows(24), "validation": multi_rows(8, 40), "test": multi_rows(13, 60)}
    base.mkdir(parents=True, exist_ok=True)
    files = {split: str(write_csv(base / f"{split}.csv", content)) for split, content in rows.items()}
    return toy_options(files) + (["--label_columns", *WORDS] if kind == "multi" else [])
