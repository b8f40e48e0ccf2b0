"""Comparisons of evaluations: rows joined by id, paired differences, and what is said of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from common.measure import figures
from common.measure.comparison import Recipe, answers_table, answers_text, check_same_rows, compare, comparison_text
from common.measure.comparison import read_evaluation as read
from common.measure.metrics import classification_metrics, perplexity_metrics
from common.options import CAUSAL_LM, CHAT, CLASSIFICATION

SOURCE = {"name": "test.csv", "sha256": "1" * 64}
LABELS = ["sun", "rain", "wind"]


def write(folder: Path, rows: list[dict], metrics: dict, file: str = "predictions.jsonl") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"source": SOURCE, **metrics}), encoding="utf-8")
    (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def labeled(folder: Path, right: np.ndarray, seed: int = 0, **facts) -> Path:
    """The evaluation of a classifier that is right where it says, on rows of drawn labels."""
    gold = np.random.default_rng(seed).integers(0, 3, len(right))
    found = np.where(right, gold, (gold + 1) % 3)
    metrics = classification_metrics([(int(g),) for g in gold], [(int(p),) for p in found], LABELS)
    pairs = zip(gold, found, strict=True)
    rows = [{"id": f"row {i}", "gold": LABELS[g], "prediction": LABELS[p]} for i, (g, p) in enumerate(pairs)]
    return write(folder, rows, {**metrics, **facts})


def texts(folder: Path, losses: np.ndarray, units: list[int], bytes: float = 4.0) -> Path:
    """The evaluation of a language model. losses: nats per token of blocks of 10."""
    pairs = zip(losses, units, strict=True)
    rows = [{"block": i, "unit": u, "nats": 10 * x, "predicted_tokens": 10} for i, (x, u) in enumerate(pairs)]
    per_token = {"bytes": bytes, "words": 0.8}
    metrics = perplexity_metrics([(10 * x, 10) for x in losses], per_token, units=units, unit="documents")
    return write(folder, rows, metrics, "blocks.jsonl")


def chat(folder: Path, answers: list[str], nats: list[float], tokens: int = 4) -> Path:
    rows = [
        {"id": str(i), "gold": "the sun is out", "prediction": answer, "stopped": i % 2 == 0, "nats": x,
         "predicted_tokens": tokens}
        for i, (answer, x) in enumerate(zip(answers, nats, strict=True))
    ]  # fmt: skip
    return write(folder, rows, {**perplexity_metrics([(x, tokens) for x in nats], unit="conversations"), "answers": 1})


def one(folder: Path) -> Recipe:
    return Recipe([folder], [42])


def test_a_better_classifier_is_said_to_be_better(tmp_path):
    """70 rows gained and 30 lost of 1,000: the figures of table and sentences are those of the JSON."""
    first = np.arange(1000) < 800
    second = first.copy()
    second[:30], second[800:870] = False, True
    folders = {name: labeled(tmp_path / name, right) for name, right in (("A", first), ("B", second))}
    lines = (folders["B"] / "predictions.jsonl").read_text().splitlines()
    (folders["B"] / "predictions.jsonl").write_text("\n".join(lines[::-1]) + "\n")  # joined by id, in whatever order
    result = compare(CLASSIFICATION, "test", {name: one(folder) for name, folder in folders.items()})
    (entry,) = result["differences"]
    assert (entry["of"], entry["from"], entry["verdict"]) == ("B", "A", "better")
    assert entry["accuracy"] == pytest.approx(0.04) and entry["mcnemar_p"] == pytest.approx(7.85e-5, rel=0.01)
    low, high = entry["intervals_95"]["accuracy"]
    reach = 1.96 * np.sqrt((0.1 - 0.04**2) / 1000)
    assert (low, high) == pytest.approx((0.04 - reach, 0.04 + reach), abs=0.003)
    assert entry["units_for_one_point"] == pytest.approx(2.8016**2 * (0.1 - 0.04**2) / 0.01**2, rel=0.15)
    wilson = json.loads((folders["A"] / "metrics.json").read_text())["intervals_95"]["accuracy"]
    assert result["runs"]["A"]["intervals_95"]["accuracy"] == wilson and result["runs"]["B"]["accuracy"] == 0.84
    text = comparison_text(result)
    assert f"| B - A      |       | +0.040 [{low:+.3f}, {high:+.3f}]" in text and "7.9e-05 |" in text
    assert text.count("[0.774, 0.824]") == 2  # of micro-F1 too
    assert "B is better than A on these 1,000 rows: accuracy 0.84 against 0.8, a difference of +0.04 [" in text
    turned = compare(CLASSIFICATION, "test", {name: one(folders[name]) for name in ("B", "A")})
    assert turned["differences"][0]["verdict"] == "worse"


def test_what_cannot_be_told_apart_is_not(tmp_path):
    """3 gained and 1 lost, by McNemar; and the same answers. All others are compared with the first."""
    first = np.arange(100) < 80
    second = first.copy()
    second[[0, 90, 91, 92]] = False, True, True, True
    recipes = {name: one(labeled(tmp_path / name, x)) for name, x in (("A", first), ("B", second), ("C", first))}
    result = compare(CLASSIFICATION, "test", recipes)
    assert [entry["verdict"] for entry in result["differences"]] == ["not distinguishable"] * 2
    assert [entry["from"] for entry in result["differences"]] == ["A", "A"]
    text = comparison_text(result)
    assert "B is not distinguishable from A" in text and "C is not distinguishable from A" in text
    assert text.count("They do not differ in any of them.") == 1 and text.count("are needed") == 1


def test_lower_is_better_for_a_perplexity_and_documents_are_drawn(tmp_path):
    """A difference of one document alone is none of the recipe, however many blocks it has."""
    rng, units = np.random.default_rng(0), np.repeat(np.arange(12), 25).tolist()
    losses = 3 + rng.normal(0, 0.5, 12)[units]
    lucky = losses - 0.2 * (np.array(units) == 3)
    folders = {"A": losses, "lucky": lucky, "B": losses - 0.02 + rng.normal(0, 0.01, 12)[units]}
    result = compare(CAUSAL_LM, "test", {name: one(texts(tmp_path / name, x, units)) for name, x in folders.items()})
    assert (result["unit"], result["units"]) == ("documents", 12)
    luck, gain = result["differences"]
    assert luck["verdict"] == "not distinguishable" and gain["verdict"] == "better"
    assert gain["perplexity"] < 0 and gain["intervals_95"]["perplexity"][1] < 0 and "mcnemar_p" not in gain
    before = result["runs"]["A"]["perplexity"]
    assert gain["one_point"] == pytest.approx(before / 100) and "of 1 % (" in gain["sentence"]
    assert {"bits_per_byte", "word_perplexity"} <= set(result["metrics"])


def test_answers_and_losses_of_conversations(tmp_path):
    """All headline metrics of a chat; where tokens differ, losses are left out, and that is said."""
    good = chat(tmp_path / "A", ["the sun is out"] * 8, [4.0] * 8)
    other = chat(tmp_path / "B", ["a sun", *["rain"] * 7], [8.0 + i % 2 for i in range(8)])
    result = compare(CHAT, "test", {"A": one(good), "B": one(other)})
    (entry,) = result["differences"]
    assert result["metrics"] == ["eval_loss", "perplexity", "rouge_l", "chrf", "bleu", "stopped"]
    assert entry["eval_loss"] == pytest.approx(8.5 / 4 - 1) and entry["verdict"] == "worse" and entry["stopped"] == 0
    assert "on these 8 conversations" in entry["sentence"]
    longer = chat(tmp_path / "C", ["a sun", *["rain"] * 7], [8.0] * 8, tokens=5)
    result = compare(CHAT, "test", {"A": one(good), "C": one(longer)})
    assert result["metrics"] == ["rouge_l", "chrf", "bleu", "stopped"]
    assert result["differences"][0]["compared"] == "rouge_l" and "Losses are left out" in comparison_text(result)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"source": {"name": "test.csv", "sha256": "2" * 64}}, "of different files"),
        ({"id": "row 99"}, "not of the same rows: 2 are in one alone, as row 2"),
        ({"gold": "hail"}, r"differ in what is right in row row 2 \(gold\)"),
        ({"per_label": {"sun": {}, "rain": {}, "hail": {}}}, "different label sets"),
    ],
)
def test_other_rows_are_refused(tmp_path, change, reason):
    """Nothing could be paired; the reason names both folders."""
    folders = [labeled(tmp_path / name, np.ones(5, dtype=bool)) for name in ("A", "B")]
    check_same_rows(*(read(folder, CLASSIFICATION) for folder in folders), CLASSIFICATION)
    metrics = json.loads((folders[1] / "metrics.json").read_text())
    rows = [json.loads(line) for line in (folders[1] / "predictions.jsonl").read_text().splitlines()]
    for name, value in change.items():
        (metrics if name in metrics else rows[2])[name] = value
    (folders[1] / "metrics.json").write_text(json.dumps(metrics))
    (folders[1] / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=reason) as error:
        compare(CLASSIFICATION, "test", {"A": one(folders[0]), "B": one(folders[1])})
    assert reason.startswith("different") or str(folders[1]) in str(error.value)


def test_the_order_of_the_labels_does_not_matter(tmp_path):
    """Several labels of a row stand in the order that its run has."""
    metrics = classification_metrics([(0, 1), (2,)], [(0, 1), (2,)], LABELS)
    rows = [{"id": str(i), "gold": gold, "prediction": gold} for i, gold in enumerate([LABELS[:2], LABELS[2:]])]
    turned = [{**row, "gold": row["gold"][::-1], "prediction": row["prediction"][::-1]} for row in rows]
    folders = write(tmp_path / "A", rows, metrics), write(tmp_path / "B", turned, metrics)
    result = compare(CLASSIFICATION, "test", {"A": one(folders[0]), "B": one(folders[1])})
    assert result["differences"][0]["accuracy"] == 0


def test_one_text_tells_no_models_apart(tmp_path):
    folders = [texts(tmp_path / name, np.full(3, loss), [0] * 3) for name, loss in (("A", 2.0), ("B", 1.0))]
    with pytest.raises(InputError, match="of a single row or text"):
        compare(CAUSAL_LM, "test", {"A": one(folders[0]), "B": one(folders[1])})


def test_blocks_of_other_tokens_are_refused(tmp_path):
    """As many blocks with as many tokens each, but of two tokenizers, so not of the same text."""
    folders = [texts(tmp_path / str(n), np.ones(5), [0, 0, 1, 1, 2], bytes=n) for n in (2.0, 4.0)]
    with pytest.raises(InputError, match="blocks of different texts. Only models with one tokenizer"):
        compare(CAUSAL_LM, "test", {"A": one(folders[0]), "B": one(folders[1])})


def test_other_windows_and_lost_files_are_refused(tmp_path):
    one_, two = (texts(tmp_path / name, np.ones(n), [0] * n) for name, n in (("A", 5), ("B", 6)))
    with pytest.raises(InputError, match="one --block_size and --stride for both"):
        compare(CAUSAL_LM, "test", {"A": one(one_), "B": one(two)})
    (two / "blocks.jsonl").unlink()
    with pytest.raises(InputError, match=r"blocks\.jsonl is missing: evaluate the run again"):
        read(two, CAUSAL_LM)


def recipe(folder: Path, rate: float, seeds: list[int], spread: float = 0.0) -> Recipe:
    """Runs that are right in about `rate` of 400 rows, and more or less by seed."""
    runs = []
    for seed in seeds:
        rng = np.random.default_rng(1000 + seed)
        right = np.random.default_rng(7).random(400) < rate + spread * rng.normal()
        runs.append(labeled(folder / f"seed_{seed}", right))
    return Recipe(runs, seeds)


def test_a_recipe_is_judged_by_seeds_and_rows(tmp_path):
    """The value is the mean; a difference that seeds alone explain is none, though McNemar finds it for one pair."""
    recipes = {"A": recipe(tmp_path / "A", 0.8, [1, 2, 3], 0.03), "B": recipe(tmp_path / "B", 0.82, [4, 5, 6], 0.03)}
    result = compare(CLASSIFICATION, "test", recipes)
    (entry,) = result["differences"]
    each = [json.loads((folder / "metrics.json").read_text())["accuracy"] for folder in recipes["A"].folders]
    assert result["runs"]["A"]["accuracy"] == pytest.approx(np.mean(each)) and result["runs"]["A"]["seeds"] == 3
    assert "mcnemar_p" not in entry and "sign_test_p" not in entry  # fewer than 6 seeds
    fixed = compare(CLASSIFICATION, "test", {name: Recipe(x.folders[:1], x.seeds[:1]) for name, x in recipes.items()})
    width, narrow = (np.diff(e["intervals_95"]["accuracy"])[0] for e in (entry, fixed["differences"][0]))
    assert width > 1.5 * narrow and "with 3 and 3 seeds: it draws seeds and rows" in entry["sentence"]
    assert "| A          |     3 |" in comparison_text(result)
    mixed = compare(CLASSIFICATION, "test", {"A": recipes["A"], "B": Recipe(recipes["B"].folders[:1], [4])})
    assert "single run, it cannot tell" in mixed["differences"][0]["sentence"]


def test_six_common_seeds_get_a_sign_test(tmp_path):
    seeds = [1, 2, 3, 4, 5, 6]
    one_, two = recipe(tmp_path / "A", 0.7, seeds, 0.01), recipe(tmp_path / "B", 0.8, seeds[::-1], 0.01)
    (entry,) = compare(CLASSIFICATION, "test", {"A": one_, "B": two})["differences"]
    assert entry["sign_test_p"] == pytest.approx(2 / 64) and "sign test p 0.031" in entry["sentence"]
    others = Recipe(two.folders, [1, 2, 3, 4, 5, 7])
    (entry,) = compare(CLASSIFICATION, "test", {"A": one_, "B": others})["differences"]
    assert "sign_test_p" not in entry


def test_answers_side_by_side():
    """Length, end and speed per category; every prompt with the answer of each."""
    rows = [
        {"category": category, "prompt": f"Why {i}?\nSay.", "answers": {
            "A": {"answer": "so", "tokens": 4 + i, "stopped": True}, "B": {"answer": "", "tokens": 9, "stopped": False},
        }}
        for i, category in enumerate(("code", "code", "plan"))
    ]  # fmt: skip
    found = answers_table(rows, {"A": 12.0, "B": 3.25})
    assert "| code     | 4 tokens, 2 of 2 end | 9 tokens, 0 of 2 end |" in found and "3.2 |" in found
    assert "| all      | 5 tokens, 3 of 3 end |" in found
    text = answers_text(rows)
    assert text.count("## code") == text.count("## plan") == 1
    assert "> Why 2?\n> Say.\n\nA (6 tokens, ends by itself):\n\n> so\n\nB (9 tokens, cut off):\n\n> " in text


def test_differences_are_drawn(tmp_path):
    drawn = {title: {"B": (1.0, 0.5, 1.5), "base": (-1.0, -1.0, -1.0)} for title in ("one", "two", "three", "four")}
    figures.draw_differences(tmp_path / "comparison.png", drawn, "A")
    assert (tmp_path / "comparison.png").stat().st_size > 3000
