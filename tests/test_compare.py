"""evaluate.py --compare: evaluates what is missing, and compares runs, their base and recipes of several seeds."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.rows import task_options, toy_rows, write_csv
from helpers.runs import run_evaluate, train, train_chat, train_text
from helpers.scripts import run_script
from helpers.texts import prose

from common.errors import InputError
from common.model import storage
from common.use import compared


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAINLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return task_options("single", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def recipes(models, data, tmp_path_factory) -> Path:
    """A folder with two recipes of two seeds each: little, and much."""
    base = tmp_path_factory.mktemp("recipes")
    for name, steps in (("little", 1), ("much", 70)):
        for seed in (1, 2):
            options = ["--max_steps", steps, "--learning_rate", "1e-2", "--seed", seed]
            train("--model", models["llama"], *data, *options, "--output_dir", base / name / f"seed_{seed}")
    return base


def copied(folder: Path, target: Path) -> Path:
    """The shared runs are never changed."""
    return Path(shutil.copytree(folder, target))


def result_of(folder: Path) -> dict:
    """comparison.json; its page and the terminal have the same figures, and name it."""
    result = json.loads((folder / "comparison.json").read_text())
    page = (folder / "comparison.md").read_text()
    assert all(entry["sentence"] in page for entry in result["differences"])
    return result


def test_two_classifiers_and_their_base(recipes, tmp_path, monkeypatch, capsys):
    """What is evaluated already is not again, until weights, labels' decision, rows or options are others."""
    for name in ("little", "much"):
        copied(recipes / name / "seed_1", tmp_path / name)
    shutil.rmtree(tmp_path / "much" / "eval")
    runs = ["--compare", tmp_path / "little", tmp_path / "much", "base"]
    run_evaluate(*runs, draw=True)
    folder = tmp_path / "little" / "eval" / "test-comparison"
    result = result_of(folder)
    assert [entry["of"] for entry in result["differences"]] == ["much", "base"] and result["unit"] == "rows"
    assert result["differences"][0]["verdict"] == "better" and result["differences"][0]["mcnemar_p"] < 0.05
    assert (tmp_path / "much" / "eval" / "test" / "metrics.json").is_file()
    assert "| much - little |" in capsys.readouterr().out and (folder / "comparison.png").stat().st_size > 3000
    base = json.loads((tmp_path / "little" / "eval" / "test-base" / "metrics.json").read_text())
    assert base["weights"] == {} and base["source"] == result["source"]
    monkeypatch.setattr(storage, "load_classifier", None)  # a further evaluation would need it
    run_evaluate(*runs, "--output_dir", tmp_path / "again", "--per_device_eval_batch_size", 3)
    again = result_of(tmp_path / "again")
    assert again == result and not (tmp_path / "again" / "comparison.png").exists()
    run_evaluate("--compare", "base", tmp_path / "little", "--output_dir", tmp_path / "turned", "--decode", "score")
    for more in (["--mixed_precision", "bf16"], ["--decode", "generate"], ["--split", "validation"]):
        with pytest.raises(TypeError):
            run_evaluate(*runs, *more)
    task = json.loads((tmp_path / "much" / "adapter" / "task.json").read_text())
    task["decision"] = {"temperature": 2.0}
    (tmp_path / "much" / "adapter" / "task.json").write_text(json.dumps(task))
    with pytest.raises(TypeError):
        run_evaluate(*runs)


def test_the_base_is_the_runs_without_its_adapter(recipes, models, tmp_path):
    """As evaluate.py measures the bare base model with the run's labels; also of a model that was trained whole."""
    run = copied(recipes / "much" / "seed_1", tmp_path / "run")
    other = write_csv(tmp_path / "other.csv", toy_rows(4, start=60))
    run_evaluate("--compare", run, "base", "--test_file", other)
    found = [json.loads(line) for line in (run / "eval/test-other-base/predictions.jsonl").read_text().splitlines()]
    assert len(found) == 12 and (run / "eval" / "test-other-comparison" / "comparison.md").is_file()
    plain = ["--load_in_4bit", "false", "--mixed_precision", "no", "--labels", "music", "science", "sport"]
    run_evaluate("--run", models["llama"], "--test_file", other, *plain, "--output_dir", tmp_path / "bare")
    bare = [json.loads(line) for line in (tmp_path / "bare" / "predictions.jsonl").read_text().splitlines()]
    for one, two in zip(found, bare, strict=True):
        assert one["probabilities"] == pytest.approx(two["probabilities"], abs=1e-5)


def test_two_processes_compare_as_one(recipes, tmp_path):
    """By the script itself, with evaluations to be made, some in another precision than others."""
    copied(recipes / "little" / "seed_1", tmp_path / "little")
    copied(recipes / "much" / "seed_1", tmp_path / "much")
    shutil.rmtree(tmp_path / "much" / "eval")
    task = tmp_path / "much" / "adapter" / "task.json"
    task.write_text(task.read_text().replace('"mixed_precision": "no"', '"mixed_precision": "bf16"'))
    names = [str(tmp_path / name) for name in ("little", "much")] + ["base"]
    script = tmp_path / "two.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport evaluate\n"
        f"sys.argv[1:] = ['--compare', *{names!r}]\nevaluate.main()\n"
    )
    out = run_script(str(script), processes=2, timeout=120)
    found = result_of(tmp_path / "little" / "eval" / "test-comparison")
    assert [entry["of"] for entry in found["differences"]] == ["much", "base"]
    assert found["differences"][0]["verdict"] == "better" and out.stdout.count("much is better than little") == 1


def test_recipes_of_two_seeds(recipes, tmp_path):
    """A folder of several seeds is one recipe, beside a single run too; its folder has the comparison."""
    copied(recipes, tmp_path / "x")
    run_evaluate("--compare", tmp_path / "x" / "little", tmp_path / "x" / "much")
    result = result_of(tmp_path / "x" / "little" / "eval" / "test-comparison")
    assert {name: run["seeds"] for name, run in result["runs"].items()} == {"little": 2, "much": 2}
    (entry,) = result["differences"]
    assert "mcnemar_p" not in entry and "2 and 2 seeds" in entry["sentence"]
    each = [json.loads((Path(folder) / "metrics.json").read_text()) for folder in result["runs"]["much"]["folders"]]
    assert result["runs"]["much"]["accuracy"] == pytest.approx(sum(run["accuracy"] for run in each) / 2)
    run_evaluate("--compare", tmp_path / "x" / "much" / "seed_1", tmp_path / "x" / "much")


def test_seeds_that_have_not_finished_are_left_out(recipes, tmp_path, capsys):
    """Weights of a run that was killed, or failed later, are none of the recipe's results."""
    copied(recipes, tmp_path / "x")
    for seed in (2, 1):
        file = tmp_path / "x" / "much" / f"seed_{seed}" / "environment.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "finished"}))
        if seed == 2:
            run_evaluate("--compare", tmp_path / "x" / "little", tmp_path / "x" / "much")
            assert "much/seed_2 has not finished, so it is left out" in capsys.readouterr().err
            result = result_of(tmp_path / "x" / "little" / "eval" / "test-comparison")
            assert {name: run["seeds"] for name, run in result["runs"].items()} == {"little": 2, "much": 1}
    with pytest.raises(InputError, match="no run in .*much has finished"):
        run_evaluate("--compare", tmp_path / "x" / "little", tmp_path / "x" / "much")


def test_perplexities_and_their_base(models, tmp_path):
    """By stretches of one text; a base of an initialization that changed it is loaded again."""
    for seed, name in enumerate(("train", "validation", "test")):
        (tmp_path / f"{name}.txt").write_text(prose(30, seed), encoding="utf-8")
    files = [part for name in ("train", "validation", "test") for part in (f"--{name}_file", tmp_path / f"{name}.txt")]
    options = ["--model", models["llama"], *files, "--learning_rate", "1e-2", "--baselines", "true"]
    more = {"A": ["--init_lora_weights", "olora"], "B": ["--full_finetuning", "true"]}
    for name in more:
        train_text(*options, "--max_steps", 10, *more[name], "--output_dir", tmp_path / name)
    for first, other in (("A", "B"), ("B", "A")):
        run_evaluate("--compare", tmp_path / first, tmp_path / other, "base")
        result = result_of(tmp_path / first / "eval" / "test-comparison")
        assert result["metrics"] == ["perplexity", "eval_loss", "bits_per_byte", "word_perplexity"]
        assert result["units"] >= 10 and "blocks" in result["unit"]
        assert result["differences"][1]["of"] == "base" and result["differences"][1]["verdict"] == "worse"
        (known,) = json.loads((tmp_path / first / "eval" / "test" / "baselines.json").read_text()).values()
        assert result["runs"]["base"]["perplexity"] == pytest.approx(known["perplexity"], rel=1e-5)
        assert result["runs"]["base"]["intervals_95"]["perplexity"] == pytest.approx(
            known["intervals_95"]["perplexity"], rel=1e-4
        )
    with pytest.raises(InputError, match="longer than the 512 positions"):
        run_evaluate("--compare", tmp_path / "A", tmp_path / "B", "--block_size", 600)


def test_chats_side_by_side(models, chat_files, tmp_path, monkeypatch, capsys):
    """Losses and answers of the test rows, and answers to the prompts of data/prompts.jsonl."""
    prompts = compared.read_prompts()
    assert len({row["category"] for row in prompts}) == 8 and len({row["prompt"] for row in prompts}) == len(prompts)
    options = ["--model", models["qwen"], *chat_files, "--learning_rate", "1e-2"]
    for name, steps in (("A", 1), ("B", 30)):
        train_chat(*options, "--max_steps", steps, "--eval_strategy", "no", "--output_dir", tmp_path / name)
    run_evaluate("--compare", tmp_path / "A", tmp_path / "B", "base", "--max_new_tokens", 6)
    result = result_of(tmp_path / "A" / "eval" / "test-comparison")
    assert (result["unit"], result["units"]) == ("conversations", 7)
    assert result["differences"][0]["verdict"] == "better" and result["metrics"][:2] == ["eval_loss", "perplexity"]
    rows = [json.loads(line) for line in (tmp_path / "B/eval/test/predictions.jsonl").read_text().splitlines()]
    metrics = json.loads((tmp_path / "B/eval/test/metrics.json").read_text())
    total = sum(row["predicted_tokens"] for row in rows)
    assert sum(row["nats"] for row in rows) / total == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert total == metrics["predicted_tokens"] and metrics["options"] == {"max_new_tokens": 6}
    assert [row["prompt"] for row in result["answers"]] == [row["prompt"] for row in prompts]
    assert all(1 <= row["answers"][name]["tokens"] <= 6 for row in result["answers"] for name in ("A", "B", "base"))
    assert result["tokens_per_second"].keys() == {"A", "B", "base"}
    with pytest.raises(InputError, match="Drop --shard_model"):
        run_evaluate("--compare", tmp_path / "A", "base", "--shard_model", "true")
    page = (tmp_path / "A" / "eval" / "test-comparison" / "comparison.md").read_text()
    assert page.count("## ") == 8 and "| tokens/s " in page and "| tokens/s " in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(recipes, models, trained, chat_files, tmp_path, monkeypatch):
    """Before a model is loaded, with the remedy."""
    monkeypatch.setattr(storage, "load_classifier", None)
    run, head = recipes / "little" / "seed_1", trained("llama", "head", "single")
    for options, reason in (
        (["--compare", run], "needs two: two runs, or a run and `base`"),
        (["--compare", "base"], "needs two"),
        (["--compare", run, run], "names one twice"),
        (["--compare", run, models["llama"]], "is no folder of a run"),
        (["--compare", run, "base", "--run", run], "drop --run"),
        (["--compare", run, "base", "--fit_decisions"], "drop one"),
        (["--compare", head, "base"], "classification head, which its base lacks"),
        (["--compare", run, trained("llama", "generative", "multi")], "of different files"),
        (["--compare", run, "base", "--block_size", "9"], "does not belong to classification"),
        (["--compare", run, "base", "--max_length", "9"], "--max_length was settled"),
        (["--compare", run, "base", "--output_dir", run / "config.yaml"], "this is a file"),
    ):
        with pytest.raises(InputError, match=reason):
            run_evaluate(*options)
