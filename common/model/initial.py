"""A run that starts from the trained weights of another one (--init_adapter), with new data, options or labels."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.disk import ADAPTER_FILES, check_complete, damage_named, load_task, weights_folder
from common.errors import InputError
from common.hub import weights_fingerprint
from common.options import BASE_CHANGING_INITS, read_saved

OUTPUT_LAYERS = ("score", "classifier", "out_proj")  # of a head, one row per label
WAYS = {  # what task.json has -> what to do where it differs
    "approach": "give --approach {}",
    "multi_label": "both runs need one label per row, or both any number of them",
    "template": "give the --prompt_template that the other run had",
    "chat_template_hash": "give the --chat_template that the other run had",
    "start": "use the same tokenizer",
}


def initial_adapter(
    config: Any, path: str, task: str, *, labels: Sequence[str] | None = None, **facts: Any
) -> Callable[[Any], Any]:
    """A function that puts the weights of --init_adapter into a model with a new adapter, and returns the model.

    Without --init_adapter it changes nothing. path: of the base. task: as task.json names it. labels: of a
    classification head, whose rows are found again by the labels' names; a new label's row stays as it is, random.
    facts: name in task.json -> what must be the same there.
    Raises InputError where that run has another base, task, adapter shape or template. A script calls it before torch
    is imported, too, with the facts that it knows then.
    """
    if not config.init_adapter:
        return lambda model: model
    folder = weights_folder(Path(config.init_adapter), "--init_adapter")
    saved = load_task(folder)
    check_complete(folder, saved)
    with damage_named(folder):
        shape = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    was = read_saved(folder.parent)
    for difference in _differences(saved, {**shape, "named": was.get("target_modules")}, config, path, task, facts):
        raise InputError(f"--init_adapter {config.init_adapter}: {difference}.")

    def load(model: Any) -> Any:
        import peft  # imports torch

        if other := _other_base(saved, config, path):
            raise InputError(f"--init_adapter {config.init_adapter}: {other}.")
        current = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        with damage_named(folder):
            weights = peft.load_peft_weights(str(folder), device="cpu")
        if odd := sorted(current.keys() ^ weights.keys()):
            raise InputError(f"--init_adapter {config.init_adapter}: the adapter changes other layers ({odd[0]}).")
        if labels:
            weights = {name: _rows_by_label(name, weights[name], current[name], saved["labels"], labels)
                       for name in weights}  # fmt: skip
        try:
            peft.set_peft_model_state_dict(model, weights)
        except RuntimeError as error:  # of another shape
            raise InputError(f"--init_adapter {config.init_adapter} does not fit the base: {error}") from error
        return model

    return load


def _differences(
    saved: dict[str, Any], shape: dict[str, Any], config: Any, path: str, task: str, facts: Mapping[str, Any]
) -> Iterator[str]:
    """Why this run cannot begin with those weights, the gravest first; each with the remedy.

    shape: of the adapter, as PEFT writes it; `named` in it is the --target_modules that the run had.
    """
    if saved["task"] != task:
        yield f"trained for {saved['task']}, not for {task}: name a run of this script"
    # A model of the same name on the hub may not be fetched yet; it is looked at when it is.
    is_there = Path(path).is_dir() or config.model != saved["model_options"]["model"]
    if is_there and (other := _other_base(saved, config, path)):
        yield other
    for name, value in facts.items():
        if saved.get(name) != value:
            yield f"{name} is another one there ({str(saved.get(name))[:60]!r}): {WAYS[name].format(saved.get(name))}"
    if shape.get("init_lora_weights") in BASE_CHANGING_INITS:
        yield f"begun with --init_lora_weights {shape['init_lora_weights']}, which changed its base: name another run"
    layers = shape.get("layers_to_transform")
    given = {"lora_r": shape["r"], "lora_alpha": shape["lora_alpha"], "use_rslora": bool(shape.get("use_rslora")),
             "use_dora": bool(shape.get("use_dora")), "train_layers": len(layers) if layers else None}  # fmt: skip
    for name, value in given.items():
        if getattr(config, name) != value:
            remedy = f"give --{name} {str(value).lower()}" if value is not None else f"drop --{name}"
            yield f"the adapter has another {name} than {getattr(config, name)}: {remedy}"
    targets, all_linear = shape.get("target_modules") or [], (None, ["all-linear"])
    if config.target_modules in all_linear:
        same = shape["named"] in all_linear
    else:
        same = set(config.target_modules) == set(targets)
    if not same:
        yield f"the adapter changes other layers: give --target_modules {' '.join(sorted(targets))}"


def _other_base(saved: dict[str, Any], config: Any, path: str) -> str:
    """Says that the weights of the base are others than those that the adapter was trained on, if they are."""
    name = saved["model_options"]["model"]
    if (saved.get("base_fingerprint") or name) in (weights_fingerprint(path, config.revision), config.model):
        return ""
    return f"trained on another base ({name}) than --model {config.model}: give that one"


def _rows_by_label(name: str, saved: Any, current: Any, old: Sequence[str], new: Sequence[str]) -> Any:
    """A saved tensor; of the output layer, the model's own with the rows of the labels that it had before."""
    if name.split(".")[-2] not in OUTPUT_LAYERS:
        return saved
    rows = current.clone()
    for row, label in enumerate(new):
        if label in old:
            rows[row] = saved[old.index(label)]
    return rows

