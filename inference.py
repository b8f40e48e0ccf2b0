"""Chats with a trained run or a base model, answers one instruction, or answers the rows of a file.

    python inference.py --run RUN                                        # a chat; /help lists its commands
    python inference.py "What is a mortgage?" --run RUN                  # one answer
    echo "What is a mortgage?" | python inference.py - --run RUN         # the same from a pipe
    python inference.py --run RUN --demo                                 # examples, base and tuned side by side
    python inference.py --compare RUN_A RUN_B base --prompt "Hello!"     # adapters of one base, loaded once
    python inference.py --run RUN --web                                  # a page in the browser
    python inference.py --run RUN --input_file in.csv --output_file out.jsonl      # one answer per row; resumable
    accelerate launch inference.py --run RUN --input_file in.csv --output_file out.jsonl   # on several GPUs

A chat run answers, a run on running text continues a text, a classification run gives a label and probabilities.
Without --run: the newest run under outputs/, else the embedded model.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from common.errors import InputError, cli_errors
from common.log import is_first_process
from common.options import (
    CAUSAL_LM,
    CHAT,
    CLASSIFICATION,
    DeviceConfig,
    ModelConfig,
    Sampling,
    WebConfig,
    check,
    option,
    parse_given,
)
from common.use import terminal, web
from common.use.answer_file import AnswerFile
from common.use.personas import choose_persona
from common.use.questions import demo_questions, made_from, read_input
from common.use.runs import Run, check_comparable, load_compared, open_run

# torch and what needs it is imported inside the functions: options and files are checked before, in a moment.

TEXT = (CHAT, CAUSAL_LM)


@dataclass
class Config(ModelConfig, Sampling, WebConfig, DeviceConfig):
    """inference"""

    positional: ClassVar[tuple[str, str]] = ("instruction", "answered once; - reads it from a pipe. Put it first")

    run: str | None = option(None, "run folder, adapter folder, merged model folder, or base model", binds=False)
    task: Literal["chat", "causal_lm", "classification"] | None = option(
        None, "for a base model; unset: classification with --labels, else chat"
    )
    prompt: str | None = option(None, "the instruction, as an option")
    demo: bool = option(False, "examples, base and tuned side by side", flag=True, tasks=TEXT)
    compare: list[str] | None = option(None, "runs of one base, and `base`: answers to --prompt or --web", tasks=TEXT)
    input_file: str | None = option(None, "CSV, TSV, JSON, JSONL or Parquet: each row is answered", binds=False)
    output_file: str | None = option(None, "the answers, as JSONL; resumes with the rows that are missing", binds=False)
    id_column: str | None = option(None, "column that names the rows; unset: their number, from 0")
    columns: list[str] | None = option(
        None, "unusual column names, as instruction=question; unset: the usual names", tasks=[CHAT]
    )
    text_fields: list[str] | None = option(
        None, "columns of the text; unset: as trained, else text, or title, abstract", tasks=[CAUSAL_LM, CLASSIFICATION]
    )
    chat_template: str | None = option(
        None, "chatml, alpaca, plain, or a Jinja file; unset: the model's own", tasks=[CHAT]
    )
    system_prompt: str | None = option(None, "system turn; unset: as trained", tasks=[CHAT])
    persona: str | None = option(None, "system turn from data/personas.yaml, by name", tasks=[CHAT])
    min_probability: float | None = option(
        None, "no prediction where the label (of several: the least certain decision) has less; promises nothing",
        at_least=0, at_most=1, tasks=[CLASSIFICATION],
    )  # fmt: skip
    labels: list[str] | None = option(
        None, "for a base model: the label set in order", tasks=[CLASSIFICATION], settled=True
    )
    prompt_template: str | None = option(
        None, "for a base model: file with {text}, {labels} and {label}", tasks=[CLASSIFICATION], settled=True
    )
    max_length: int = option(
        256, "for a base model: tokens of a text with its instruction and label",
        at_least=1, tasks=[CLASSIFICATION], settled=True,
    )  # fmt: skip
    per_device_eval_batch_size: int = option(8, "rows answered together", at_least=1, binds=False)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "unset: as trained; for a base model, bf16 where the device has it"
    )

    def broken_rules(self) -> Iterator[str]:
        ways = [name for name in ("prompt", "input_file", "demo", "web") if getattr(self, name)]
        if len(ways) > 1:
            yield f"--{' and --'.join(ways)} exclude each other (an instruction is --prompt)"
        if (self.input_file is None) != (self.output_file is None):
            yield "--input_file and --output_file need each other"
        if self.compare and ways not in (["prompt"], ["web"]):
            yield "--compare needs a --prompt or --web, and goes with nothing else"
        if self.persona and self.system_prompt:
            yield "--persona and --system_prompt exclude each other"
        if self.system_prompt is not None and not self.system_prompt.strip():
            yield "--system_prompt is blank: leave it out"
        if self.shard_model and not self.input_file:
            yield "--shard_model is for several processes, which share the rows of an --input_file"
        if (self.id_column or self.columns) and not self.input_file:
            yield "--id_column and --columns are about the rows of an --input_file"


def read_options(given: dict[str, Any]) -> tuple[Config, Run, list[Run | None]]:
    """The options, the run (or base model), and the runs to compare (None: their base).

    given: the options of the command line.
    """
    if "instruction" in given:
        if "prompt" in given:
            raise InputError("The instruction is given twice: drop --prompt.")
        given["prompt"] = given.pop("instruction")
    if "compare" in given and "run" in given:
        raise InputError("--compare names its runs itself: drop --run.")
    task = given.get("task", CLASSIFICATION if "labels" in given else CHAT)
    compared = [None if name == "base" else open_run(name, task) for name in given.get("compare", ())]
    run = next(filter(None, compared), None) or open_run(given.get("run"), task)
    if compared:
        check_comparable(run, compared)
    defaults = {"text_fields": run.options["text_fields"]} if "text_fields" in run.options else {}
    defaults |= {"mixed_precision": run.trained["mixed_precision"]} if run.folder else {}
    config = run.configure(Config, given, defaults)
    check(config)
    if run.task == CLASSIFICATION and run.folder is None and not config.labels:
        raise InputError(f"--task classification: {config.model} is a base model, so name the labels with --labels.")
    if config.input_file is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("Several processes share the rows of an --input_file; for a chat, start one.")
    if config.persona:
        persona = choose_persona(config.persona)
        if not config.web:  # the page begins with it, and goes back to the model's own
            config.system_prompt = persona.system_prompt
    if config.demo:
        run.check_base_is_intact()
    if config.web:
        web.check_ready(config)
    return config, run, compared


def given_instruction(config: Config) -> str | None:
    """The instruction of the command line or, for `-`, all that comes through the pipe."""
    text = config.prompt
    if text == "-":
        text = terminal.read_all().strip()
    if text is not None:
        terminal.require_utf8(text, "The instruction")
    if text is not None and not text.strip():
        raise InputError("The instruction is empty: give one, or leave it out for a chat.")
    return text


def main() -> None:
    config, run, compared = read_options(parse_given(Config))
    instruction, batch = given_instruction(config), None
    if config.input_file:
        ids, questions = read_input(config, run)
        batch = AnswerFile(config.output_file, ids, partial(made_from, config, run)), questions
        if batch[0].done == len(ids):
            if is_first_process():
                print(f"{config.output_file} has the answers to all {len(ids)} rows already.")
            return
    if is_first_process():
        print(f"Loading {run.folder or config.model} ...", file=sys.stderr, flush=True)

    from common.model.lora import is_adapted
    from common.train import loop
    from common.use import sessions

    run.resolve(config)
    accelerator = loop.start_accelerator(config)
    if run.task == CLASSIFICATION:
        labeler = run.load_classifier(config, accelerator.device)
        if batch:
            batch[0].note("base", run.base_fingerprint())  # which may have been fetched just now
        if config.web:
            web.serve(config, run, labeler)
        else:
            sessions.answer_labels(config, labeler, instruction, batch, accelerator)
    else:
        model = run.load_text_model(config, accelerator.device)
        if batch:
            batch[0].note("base", run.base_fingerprint())  # which may have been fetched just now
        if compared:
            named = list(zip(config.compare, load_compared(model, run, compared, config), strict=True))
            web.serve(config, run, named) if config.web else sessions.side_by_side(named, [instruction], config)
        elif config.web:
            web.serve(config, run, [(run.name, model)])
        elif config.demo:
            named = [("this run" if run.folder else "base", model)]
            if is_adapted(model.model):
                named.insert(0, ("base", replace(model, adapter=None)))
            sessions.side_by_side(named, demo_questions(run.task), config)
        else:
            sessions.answer_texts(config, model, instruction, batch, accelerator)
    loop.finish(accelerator)


if __name__ == "__main__":
    with cli_errors("With an --output_file, the same command continues with the rows that are left."):
        main()
