"""README and docs/ are true: commands parse, files exist, examples load, snippets run."""

import json
import math
import re
import shlex
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT
from helpers.models import FAMILIES, build_model
from helpers.rows import toy_options
from helpers.runs import train as train_labels
from helpers.runs import train_chat, train_text, weights
from helpers.templates import KINDS, build

import evaluate
import inference
import train_clm
import train_cls
import train_sft
from benchmarks import cost_growth, export_formats, gpu, score_speed, step_profile, train_speed
from common import export
from common.data import builders
from common.data.classification import load_classification
from common.data.conversations import read_row
from common.measure.label_trie import TrieSearch, build_trie
from common.model.classifier import classification_prompt
from common.model.prompt_cache import Node
from common.model.storage import load_classifier
from common.options import CHAT, CLASSIFICATION, check, check_task, parse_config, parse_given
from common.text.batches import pack, pad_left, pays
from common.text.chat import TEMPLATES
from common.text.prompts import GENERATIVE_TEMPLATE, ClassificationPrompt
from common.use.personas import read_personas

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in FILES}
README, RESULTS = PAGES["README.md"], (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
ALL = "\n".join(PAGES.values())
BLOCK = r"^```(\w*)\n(.*?)^```$"  # (language, content)
BLOCKS = [block for page in PAGES.values() for block in re.findall(BLOCK, page, re.M | re.S)]
PROSE = [re.sub(BLOCK, "", page, flags=re.M | re.S) for page in PAGES.values()]
INLINE = [code for page in PROSE for _, code in re.findall(r"(`+)(.+?)\1", page, re.S)]
DEMO = "pip install -r requirements.txt && accelerate launch train_cls.py"
TEST = "pip install -r requirements-dev.txt && pytest -n 2 --dist loadfile"
LAUNCHERS = {"num_processes", "config_file", "nproc_per_node"}  # options of accelerate launch and torchrun
OTHERS = {"seed", "dist"}  # of uv, and of pytest
SCRIPTS = {"train_cls.py": train_cls, "train_clm.py": train_clm, "train_sft.py": train_sft,
           "evaluate.py": evaluate, "inference.py": inference}  # fmt: skip
BENCHMARKS = (cost_growth, export_formats, gpu, score_speed, step_profile, train_speed)
YAML_LIST = re.search(r"lists as `(.*?)`", ALL)[1]


def commands() -> list[list[str]]:
    """Every command line in README and docs/ as words, split at `&&`."""
    bash = "".join(content for language, content in BLOCKS if language == "bash").replace("\\\n", " ")
    starts = ("accelerate ", "python ", "pip ", "torchrun ", "uv ")
    lines = [*bash.splitlines(), *(code for code in INLINE if code.startswith(starts))]
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [line for line in words if line]


def script_options(script: str) -> list[list[str]]:
    """The options that the commands give to `script`, each once."""
    lines = [line[line.index(script) + 1 :] for line in commands() if script in line]
    return [line for number, line in enumerate(lines) if line not in lines[:number]]


def write_examples(folder: Path) -> None:
    """The example files of docs/, each in the block, or the inline code, after its name."""
    for name, content in re.findall(r"`(\w+\.csv)`[^`]*:\n\n```\n(.*?)^```$", ALL, re.M | re.S):
        (folder / name).write_text(content, encoding="utf-8")
    for name, content in re.findall(r"`(\w+\.jsonl)`[^`]*: `(.*?)`", ALL):
        (folder / name).write_text(content + "\n", encoding="utf-8")


def name_of(line: list[str]) -> str:
    return " ".join(line) or "none"


# --- the first screen, and what the README counts


def test_first_screen_has_commands_results_and_a_picture():
    """The two commands are in the first 30 lines, alone, and CI runs the same; between them a table and a picture."""
    screen = "\n".join(README.splitlines()[:30])
    assert re.findall(r"```bash\n(.*?)```", screen, re.S) == [f"{DEMO}\n", f"{TEST}\n"]
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert DEMO in workflow and TEST in workflow
    assert "requirements-dev.txt && pytest -n 2 --dist loadfile\n" in (ROOT / ".ci" / "run").read_text()
    torch_version = re.search(r"^torch==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert f"torch {torch_version}" in " ".join(screen.split())
    (picture,) = re.findall(r"!\[.+\]\((.+?\.png)\)", screen)
    assert (ROOT / picture).stat().st_size < 50_000
    assert len(README.splitlines()) < 160


def test_result_table_is_the_measured_one():
    """The README's demo table has rows of the same figures as RESULTS.md, at the same commit."""

    def rows(text: str) -> dict[str, list[str]]:
        table = re.search(r"^\| test split \(50 rows\).*\n((?:\|.*\n)+)", text, re.M)[0]
        titles, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        return {line[0]: dict(zip(titles, line, strict=True)) for line in lines}

    measured, shown = rows(RESULTS), rows(README)
    assert len(shown) == 4 and list(shown) == list(measured)
    for method, cells in shown.items():
        assert cells.items() <= measured[method].items() and len(cells) == 3
    commit = re.search(r"commit ([0-9a-f]{7,40})", README)[1]
    assert commit in RESULTS[RESULTS.index("demo") : RESULTS.index("| test split (50 rows)")]


def test_loop_has_as_many_lines_as_the_readme_says():
    counted = int(re.search(r"The loop is (\d+) lines", README)[1])
    for script in ("train_cls.py", "train_clm.py", "train_sft.py"):
        lines = (ROOT / script).read_text(encoding="utf-8").splitlines()
        assert lines.index("    # --- end loop") - lines.index("    # --- loop") - 1 == counted
    assert "`# --- loop`" in README and "`# --- end loop`" in " ".join(README.split())


# --- commands and options


@pytest.mark.parametrize("line", script_options("train_cls.py"), ids=name_of)
def test_training_commands_are_accepted(line, tmp_path, monkeypatch):
    """Each `train_cls.py` command: its options exist and do not contradict each other; its local data load."""
    if "--help" in line:
        with pytest.raises(SystemExit):
            parse_config(train_cls.Config, line)
        return
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path)
    (tmp_path / "run.yaml").write_text(f"train_file: tickets.csv\ntext_fields: {YAML_LIST}\nlabel_column: queue\n")
    config = parse_config(train_cls.Config, line)
    if config.train_file:  # the examples are too short to be split
        config.validation_fraction = config.test_fraction = 0
    if not config.dataset_name:
        data = load_classification(config)
        assert data.splits["train"] and len(data.labels) > 1
        assert data.multi_label == bool(config.label_columns or config.label_delimiter or config.label_column == "tags")


def test_both_forms_of_several_labels_are_the_same(tmp_path, monkeypatch):
    """A delimited column and a JSON list give the same labels to the same text; a row of zeros has none."""
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path)
    uncut = ["--validation_fraction", "0", "--test_fraction", "0", "--train_file"]

    def load(*options):
        data = load_classification(parse_config(train_cls.Config, [*uncut, *options]))
        return [(row.text, [data.labels[k] for k in row.labels]) for row in data.splits["train"]]

    delimited = load("tags.csv", "--label_column", "tags", "--label_delimiter", ";")
    assert delimited[1] == load("tags.jsonl", "--label_column", "tags")[0]
    assert load("posts.csv", "--label_columns", "sports", "politics", "art")[0] == ("A quiet morning.", [])
    assert load("tickets.csv", "--text_fields", "subject", "body", "--label_column", "queue")[0] == (
        "Cannot log in.", ["access"],
    )  # fmt: skip


@pytest.mark.parametrize("line", script_options("train_sft.py"), ids=name_of)
def test_commands_on_conversations_are_accepted(line):
    """Each `train_sft.py` command names options that exist and fit each other."""
    parse_config(train_sft.Config, line)


@pytest.mark.parametrize("line", script_options("train_clm.py"), ids=name_of)
def test_commands_on_running_text_are_accepted(line):
    """Each `train_clm.py` command names options that exist and fit each other."""
    parse_config(train_clm.Config, line)


@pytest.mark.parametrize("line", script_options("evaluate.py"), ids=name_of)
def test_commands_that_evaluate_are_accepted(line):
    """Each `evaluate.py` command names options that exist, fit each other, and belong to the task."""
    given = parse_given(evaluate.Config, line)
    if given.get("fit_decisions"):
        given.setdefault("split", "validation")  # as read_options does
    config = evaluate.Config(**given)
    config.task = config.task or CLASSIFICATION
    check(config)
    check_task(evaluate.Config, given, config.task, "the run")


@pytest.mark.parametrize("line", script_options("inference.py"), ids=name_of)
def test_commands_that_answer_are_accepted(line):
    """Each `inference.py` command names options that exist, fit each other and belong to a task; its persona exists."""
    given = parse_given(inference.Config, line)
    if "..." in given.values():  # stands for the options of the text around it
        return
    if "instruction" in given:
        given["prompt"] = given.pop("instruction")
    config = inference.Config(**given)
    config.task = config.task or (CLASSIFICATION if {"labels", "min_probability"} & set(given) else CHAT)
    check(config)
    check_task(inference.Config, given, config.task, "the run")
    assert config.persona in (None, *read_personas())


def test_other_commands_are_accepted():
    """Each `common.prepare` command names a builder and its options, and the table of scripts names all builders."""
    assert all(script_options(script) for script in SCRIPTS)  # the tests above see commands
    for name, *options in (line for line in script_options("common.prepare") if line):
        known = {*signature(builders.BUILDERS[name]).parameters, "output_dir"}
        assert {option[2:] for option in options if option.startswith("--")} <= known
    named = re.search(r"`python -m common.prepare` \|.*", README)[0]
    assert re.findall(r"`(\w+)`", named) == list(builders.BUILDERS)
    assert {line[0] for line in script_options("common.report")} == {"table"}
    for line in (line for line in script_options("common.export") if line):
        check(parse_config(export.Config, line))


def test_every_option_exists():
    """An option that a page mentions anywhere is one of a script, a builder or a launcher; in RESULTS.md, also one of
    a benchmark.
    """
    known = {field.name for script in SCRIPTS.values() for field in fields(script.Config)}
    known |= {field.name for field in fields(export.Config)}
    known |= set(builders.OPTIONS) | LAUNCHERS | OTHERS | {"config", "help"}

    def mentioned(text: str) -> set[str]:
        return set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))

    of_benchmarks = {field.name for script in BENCHMARKS for field in fields(script.Config)}
    of_benchmarks |= {"grid", "kills"}  # of sweep.py, of kill_resume.py
    assert mentioned(ALL) - known - of_benchmarks == set()
    assert mentioned(ALL) >= LAUNCHERS | OTHERS  # no stale exceptions
    assert mentioned(RESULTS) - known - of_benchmarks == set()


def test_rows_of_conversations_are_read():
    """The example rows of docs/chat.md have shapes that train_sft.py knows."""
    (rows,) = [content for language, content in BLOCKS if language == "json"]
    shapes = [read_row(json.loads(row), "example")[0] for row in rows.splitlines()]
    assert shapes == ["instruction + response", "messages"]


# --- files, links, layout


def test_every_file_exists():
    """Requirement and configuration files in commands, files in inline code; README links every page."""
    words = [word for line in commands() for word in line] + INLINE
    ours = r"(configs|common|tests|data|benchmarks|docs)/[\w./]+|requirements[\w-]*\.txt|[A-Z]+\.(md|cff)"
    named = {word for word in words if re.fullmatch(ours, word)}
    named |= set(re.findall(r"\b(?:benchmarks|common|configs)/[\w/]+\.\w+", RESULTS))
    made = "benchmarks/results/"  # by a benchmark
    assert [path for path in named if not path.startswith(made) and not (ROOT / path).exists()] == []
    assert len(named) > 20
    assert {f"docs/{file.name}" for file in FILES[1:]} <= set(re.findall(r"\]\(([^)]+)\)", README))


@pytest.mark.parametrize("page", [*PAGES, "benchmarks/RESULTS.md"])
def test_every_link_leads_somewhere(page):
    """Relative links name files, and their anchors are headings of the page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in anchors, link


def test_layout_is_true():
    """The diagram of the README names every room, in the order of a row; every module beside the rooms is named."""
    diagram = next(content for _, content in BLOCKS if content.startswith("file  "))
    rooms = re.findall(r"common/\w+/", diagram)
    assert list(dict.fromkeys(rooms)) == [f"common/{name}/" for name in
                                          ("data", "text", "model", "train", "measure", "use")]  # fmt: skip
    folders = {path.name for path in (ROOT / "common").iterdir() if path.is_dir() and path.name.strip("_") == path.name}
    assert {f"common/{name}/" for name in folders} == set(rooms)
    modules = {f"common/{path.name}" for path in (ROOT / "common").glob("[a-z]*.py")}
    assert modules <= set(INLINE) | {f"common/{name}.py" for name in re.findall(r"python -m common\.(\w+)", README)}
    steps = re.findall(r"^(\w+(?: \w+)?)(?:  .*)?$", diagram, re.M)
    assert steps == ["file", "row", "example", "token ids", "batch", "loss", "scores", "metrics", "report"]

    layout = next(content for _, content in BLOCKS if content.startswith("configs/"))
    paths = [line.split()[0] for line in layout.splitlines()]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    scripts = re.findall(r"^\| `(\w+\.py)` \|", README, re.M)
    assert sorted(scripts) == sorted(path.name for path in ROOT.glob("*.py"))


def test_citation_and_license():
    """CITATION.cff has what the format requires, the package's version, and the license that LICENSE is."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
    text = (ROOT / "LICENSE").read_text()
    assert citation["license"] == "Apache-2.0" and "Apache License\n" in text and "Version 2.0, January" in text
    assert "Copyright 2026 The plainlora authors" in text


# --- prompts, and the worked examples of docs/speed.md


def test_prompts_are_as_shown():
    """The default template is the code's; the example of another one is accepted."""
    plain = [content.removesuffix("\n") for language, content in BLOCKS if not language]
    assert GENERATIVE_TEMPLATE in plain
    (template,) = [content for content in plain if "{label}" in content and content != GENERATIVE_TEMPLATE]
    prompt = ClassificationPrompt(
        lambda texts, plain: [list(text.encode()) for text in texts], labels=["a", "b"], multi_label=False,
        template=template, start=[], end=[0], max_length=200,
    )  # fmt: skip
    assert (
        prompt.text_of("It broke.") == "You sort support tickets. Answer with one of: a, b.\nTicket: It broke.\nQueue:"
    )


def test_pack_is_as_drawn():
    """The two prompts of docs/speed.md as a pack: its tokens, its places, who sees whom, and what it saves."""
    page = PAGES["docs/speed.md"]
    rows = ["ABCDE", "ABCF"]
    packed = pack([[ord(token) for token in row] for row in rows], 3, pad_id=ord("_"))
    drawn = {
        name: re.search(rf"^  {name}  (.*?)(?:   each.*)?$", page, re.M)[1].split() for name in ("tokens", "places")
    }
    tokens = "".join(map(chr, packed["input_ids"][0].tolist()))
    assert tokens == "".join(drawn["tokens"]) and len(tokens) == 7 and "7 tokens, one sequence" in page
    assert packed["position_ids"][0].tolist() == list(map(int, drawn["places"]))
    padded = pad_left([list(row.encode()) for row in rows], ord("_"))["input_ids"]
    assert padded.numel() == 10 and "10 tokens" in page
    assert ["".join(map(chr, row)) for row in padded.tolist()] == [
        "".join(re.search(rf"^  row {number}   (.*)$", page, re.M)[1].split()) for number in (1, 2)
    ]

    sees = {"A": "A", "B": "AB", "C": "ABC"}  # the prefix
    for row, mask in enumerate(packed["attention_mask"][:, 0].tolist()):
        own = tokens[3 + 2 * row : 5 + 2 * row]
        sees |= {own[i]: "".join(t for t, x in zip("ABC" + own, mask[i], strict=True) if x) for i in (0, 1)}
    header, *lines = re.search(r"^(       A B C.*\n(?:  \w    .*\n)+)", page, re.M)[0].splitlines()
    for line in lines:
        marked = {header[i] for i, mark in enumerate(line[: len(header)]) if mark == "x" and i > 3}
        assert marked == set(sees[line[2]]), line

    assert pays(3, [5, 5]) and pays(560, [590] * 32)
    assert f"| {32 * 590:,} |" in page and f"| {560 + 32 * 30:,} |" in page and "12 times fewer" in page
    assert 12 <= 32 * 590 / (560 + 32 * 30) < 13


@pytest.mark.parametrize(
    ("tolerance", "passes"), [(1e-6, [["card"], ["lost", "late"]]), (math.inf, [["card"], ["lost"]])]
)
def test_label_search_is_as_told(tolerance, passes):
    """The labels of docs/speed.md: what each pass computes, and the probabilities."""
    names = ["card", "lost", "late", "top", "up", "fails"]
    follow = {
        "": {"card": 0.8, "top": 2e-7}, "card": {"lost": 0.6, "late": 0.3}, "lost": {"": 0.9}, "late": {"": 0.9},
        "top": {"up": 0.5}, "up": {"fails": 0.5}, "fails": {"": 0.5},
    }  # fmt: skip
    end = len(names)
    labels = [["card", "lost"], ["card", "late"], ["top", "up", "fails"]]
    trie = build_trie([([names.index(token) for token in label], [end]) for label in labels])

    def compute(node: Node) -> None:
        found = follow[names[node.token] if node.token >= 0 else ""]
        node.log_probs = {names.index(token) if token else end: math.log(p) for token, p in found.items()}

    root = Node()
    compute(root)
    search, seen = TrieSearch(root, trie, tolerance), []
    while nodes := search.next_nodes():
        for node in nodes:
            compute(node)
        seen.append([names[node.token] for node in nodes])
    assert seen == passes and search.best() == 0
    if tolerance < 1:
        page = " ".join(PAGES["docs/speed.md"].split())
        scores = [math.exp(score) for score in search.scores()]
        assert scores == pytest.approx([0.432, 0.216, 2e-7]) and "0.8 x 0.6 x 0.9 = 0.432" in page
        shares = [score / sum(scores) for score in scores]
        assert [f"{share:.4f}" for share in shares[:2]] == ["0.6667", "0.3333"] and f"{shares[2]:.1e}" == "3.1e-07"
        assert "0.6667" in page and "0.3333" in page and "3.1e-7" in page
        assert f"{sum(map(len, seen))} of {len(names)} nodes in {len(seen)} passes" in page
        drawn = {token: float(p) for token, p in re.findall(r"-- (\w+) ([\d.e-]+)", page)}
        assert drawn == {**follow[""], **follow["card"]}


# --- Python snippets


@pytest.fixture(scope="module")
def runs(trained, models, chat_files, tmp_path_factory) -> dict[str, Path]:
    """The page of a snippet -> the run folder that stands for RUN in it."""
    base = tmp_path_factory.mktemp("snippets")
    few = ["--model", models["llama"], "--max_steps", "2"]
    train_chat(*few, *chat_files, "--output_dir", base / "chat")
    (base / "text.txt").write_text("The striker scored a goal in the stadium. " * 400)
    train_text(*few, "--train_file", base / "text.txt", "--output_dir", base / "text")
    labels = trained("llama", "generative", "single")
    return {
        "README.md": labels,
        "docs/classify.md": labels,
        "docs/chat.md": base / "chat",
        "docs/text.md": base / "text",
    }


def snippets(page: str) -> list[str]:
    return [content for language, content in re.findall(BLOCK, PAGES[page], re.M | re.S) if language == "python"]


def run_snippet(code: str, run: Path) -> dict:
    """Runs the code with a run folder in the place of RUN; its names, `last` the value of its last line."""
    *lines, last = code.rstrip("\n").split("\n")
    lines.append(last if re.match(r"\w+ = ", last) else f"last = ({last})")
    names: dict = {}
    exec("\n".join(lines).replace('"RUN', f'"{run}'), names)
    return names


def test_snippets_of_classifiers_run(runs):
    (short,) = snippets("README.md")
    assert run_snippet(short, runs["README.md"])["last"] in ("sport", "science", "music")
    (longer,) = snippets("docs/classify.md")
    prediction, probabilities, abstained, truncated = run_snippet(longer, runs["docs/classify.md"])["last"]
    assert set(probabilities) == {"sport", "science", "music"} and sum(probabilities.values()) == pytest.approx(1)
    assert (prediction is None) == abstained == (max(probabilities.values()) < 0.8) and not truncated


def test_snippets_of_text_models_run(runs, capsys):
    (chat,) = snippets("docs/chat.md")
    assert isinstance(run_snippet(chat, runs["docs/chat.md"])["last"], str)
    assert capsys.readouterr().out.strip()
    (text,) = snippets("docs/text.md")
    names = run_snippet(text, runs["docs/text.md"])
    assert isinstance(names["last"], str) and names["model"].perplexity("A text of more than one token.") > 1


def test_base_models_open_as_shown(tmp_path):
    """The one-line forms for a base model, with a tiny one, that has a chat template, in the place of the hub's."""
    from transformers import AutoTokenizer

    from common import open_run

    path = build_model(tmp_path / "model", "llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATES["plain"]
    tokenizer.save_pretrained(path)
    lines = [code for code in INLINE if re.match(r'open_run\("(?!RUN")', code)]
    opened = {re.search(r"\.(\w+)\(", line.split(")", 1)[1])[1]: line for line in lines}
    assert opened.keys() == {"classifier", "chat", "language_model"}
    local = {
        kind: re.sub(r'"[\w-]+/[\w.-]+"', repr(str(path)), " ".join(line.split())) for kind, line in opened.items()
    }
    models = {kind: eval(line, {"open_run": open_run}) for kind, line in local.items()}
    assert set(models["classifier"].classify(["Cannot log in"])[0].probabilities) == {"access", "billing"}
    assert isinstance(models["chat"].answer("Hello", max_new_tokens=3), str)
    assert models["language_model"].perplexity("A text of more than one token.") > 1


def test_readme_names_what_the_api_has(runs):
    """`.answer`, `.stream` and `.perplexity`, as the README calls them."""
    from common import open_run

    prose = " ".join(README.split())
    assert '`open_run("RUN").chat()` has `.answer("a question")` and `.stream("a question")`' in prose
    assert '`open_run("RUN").language_model()` has `.perplexity("a text")` and `.answer("a beginning")`' in prose
    chat, text = open_run(str(runs["docs/chat.md"])).chat(), open_run(str(runs["docs/text.md"])).language_model()
    assert "".join(chat.stream("a question", do_sample=False)) == chat.answer("a question", do_sample=False)
    assert text.perplexity("a text") > 1 and isinstance(text.answer("a beginning", max_new_tokens=3), str)
    copied = open_run(str(runs["README.md"] / "adapter")).classifier()
    assert copied.classify(["a text"])[0].prediction in ("sport", "science", "music")


def test_adapters_load_without_plainlora(runs):
    """The snippets of docs/runs.md: transformers and peft alone give the prompt, the logits and the answer of ours."""
    from common import open_run

    of_chat, of_labels = snippets("docs/runs.md")
    assert "common" not in of_chat + of_labels
    names = run_snippet(of_chat, runs["docs/chat.md"])
    ours = open_run(str(runs["docs/chat.md"])).chat()
    question = "What is a mortgage?"
    assert names["inputs"]["input_ids"][0].tolist() == ours.template.prompt(ours.turns(question), None).ids
    assert names["answer"].strip() == ours.answer(question, max_new_tokens=50, do_sample=False).strip()

    names = run_snippet(of_labels, runs["README.md"])
    classifier = load_classifier(runs["README.md"] / "adapter", "cpu")
    assert names["ids"] == classifier.prompt.prompt("Cannot log in.").ids
    with torch.no_grad():
        logits, expected = (model(names["inputs"]).logits for model in (names["model"], classifier.model))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    weights = [tensor for name, tensor in names["model"].named_parameters() if "lora_B" in name]
    assert weights and all(tensor.any() for tensor in weights)  # the trained adapter, not a new one


@pytest.mark.parametrize("template", [GENERATIVE_TEMPLATE, "{text}\nOne of {labels}: {label}"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_without_plainlora_are_ours(kind, template):
    """The snippet of docs/runs.md tokenizes as we do, whether or not a tokenizer puts a space in front of a text."""
    _, code = snippets("docs/runs.md")
    code = code[code.index("template = ") : code.index("inputs = ")]
    tokenizer, task = build(kind, "mistral"), {"labels": ["music", "sport"], "template": template}
    names = {"tokenizer": tokenizer, "task": task}
    exec(code, names)
    prompt = classification_prompt(tokenizer, False, **task, multi_label=False, max_length=500)
    assert names["ids"] == prompt.prompt("Cannot log in.").ids


@pytest.mark.parametrize("kind", ["generative", "head", "full", "chat"])
def test_model_cards_load_without_plainlora(kind, runs, trained, models, toy_files, tmp_path):
    """The snippet of a model card: the trained weights, by transformers and peft alone."""
    run = runs["docs/chat.md"] if kind == "chat" else trained("llama", "generative", "single")
    if kind == "head":
        run = trained("mistral", "head", "multi")
    if kind == "full":
        run = tmp_path / "run"
        full = ["--full_finetuning", "true", "--max_steps", "1", "--output_dir", run]
        train_labels("--model", models["llama"], *toy_options(toy_files), *full)
    folder = run / ("model" if kind == "full" else "adapter")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert "common" not in code and "plainlora" not in code
    names: dict = {}
    exec(code.replace("THIS_FOLDER", str(folder)), names)
    assert len(names["tokenizer"]) > 100
    loaded = names["model"].state_dict()
    renamed = {"lora_A": "lora_A.default", "lora_B": "lora_B.default", "score.": "score.modules_to_save.default."}
    for name, tensor in weights(folder).items():
        for stored, in_memory in renamed.items():
            name = name.replace(stored, in_memory)
        assert torch.equal(loaded[name], tensor)


# --- what a run leaves, and a base model


def test_run_leaves_what_is_listed(models, toy_files, tmp_path):
    """docs/runs.md lists the files of a run folder."""
    run = tmp_path / "run"
    options = ["--max_steps", "2", "--report_to", "tensorboard", "--baselines", "true", "--output_dir", run]
    train_labels("--model", models["llama"], *toy_options(toy_files), *options, draw=True)
    listing = next(content for _, content in BLOCKS if content.startswith("config.yaml"))
    named = [line.split()[0].replace("<n>", "*") for line in listing.splitlines()]
    assert len(named) == 11 and [path for path in named if not list(run.glob(path.rstrip("/")))] == []
    (evaluation,) = [line for line in listing.splitlines() if line.startswith("eval/test/")]
    assert "baselines/" in evaluation
    for name in (*re.findall(r"\w+\.\w+", evaluation), "baselines"):
        assert (run / "eval" / "test" / name).exists()
    assert (run / "eval" / "test" / "predictions.csv").is_file() and "predictions.jsonl and .csv" in evaluation


@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_is_evaluated_as_shown(family, models, tmp_path, monkeypatch, capsys):
    """The command for an untrained base model runs, with a tiny model in the place of the hub's."""
    (line,) = [line for line in script_options("evaluate.py") if "--labels" in line]
    line[line.index("--run") + 1] = str(models[family])
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *line, "--load_in_4bit", "false", "--mixed_precision", "no"])
    evaluate.main()
    assert "0 of 2 answers outside the label set" in capsys.readouterr().out
