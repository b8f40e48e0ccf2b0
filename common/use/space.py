"""A folder for Hugging Face Spaces: the merged model, the page of `inference.py --web`, and what both are made of."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNUSED = ("bitsandbytes", "datasets", "pip", "gguf")  # by a merged model that answers
APP = '''\
"""The page of a fine-tuned model, as `python inference.py --run model --web` shows it on one's own computer."""

import os
import threading

import inference
from common.options import CLASSIFICATION
from common.use import web
from common.use.runs import best_device

address, port = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1", int(os.environ.get("PORT", "7860"))
config, run, _ = inference.read_options({"run": "model", "web": True, "web_port": port})
run.resolve(config)
if run.task == CLASSIFICATION:
    models = run.load_classifier(config, best_device())
else:
    models = [("model", run.load_text_model(config, best_device()))]
print(web.launch(web.build(config, run, models), address, port), flush=True)
threading.Event().wait()
'''


def write_space(folder: Path, name: str) -> None:
    """Adds to a folder that holds the merged model in `model` what a Space needs. name: its title."""
    (folder / "app.py").write_text(APP, encoding="utf-8")
    ignored = shutil.ignore_patterns("__pycache__")
    for path in ("common", "data/chat_templates", "data/instructions_demo"):  # whose questions are the examples
        shutil.copytree(ROOT / path, folder / path, ignore=ignored)
    for file in ("inference.py", "LICENSE", "data/personas.yaml"):
        shutil.copy(ROOT / file, folder / file)
    pinned = [*_lines("requirements.txt"), *(line for line in _lines("requirements-extra.txt") if "gradio" in line)]
    kept = [line for line in pinned if line.partition("==")[0] not in UNUSED]
    (folder / "requirements.txt").write_text("\n".join(kept) + "\n", encoding="utf-8")
    (version,) = (line.partition("==")[2] for line in pinned if line.startswith("gradio"))
    head = f"title: {name}\nsdk: gradio\nsdk_version: {version}\napp_file: app.py\n"
    card = folder / "model" / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else "---\n---\n"
    text = text.replace("---\n", f"---\n{head}", 1).replace("THIS_FOLDER", "THIS_FOLDER/model")
    (folder / "README.md").write_text(text, encoding="utf-8")


def _lines(name: str) -> list[str]:
    return (ROOT / name).read_text(encoding="utf-8").splitlines()
