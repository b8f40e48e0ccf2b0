"""The Modelfile that Ollama makes a model of, beside a GGUF file."""

from typing import Any

from common.options import CAUSAL_LM, CHAT, CLASSIFICATION
from common.text.chat import ChatTemplate

S, U, A, V = "<0sys0>", "<0ask0>", "<0reply0>", "<0again0>"  # stand for texts while a template is taken apart


def modelfile(task: dict[str, Any], loaded: Any, file: str) -> str:
    """How Ollama prompts the model in `file` and where an answer ends.

    task: of task.json. loaded: the LabelModel or TextModel that the file was made from.
    """
    lines = [f"FROM ./{file}"]
    if task["task"] == CHAT:
        lines += [_template(go_template(loaded.template)), *_stops(loaded.tokenizer, loaded.template.stop_ids)]
        if system := task.get("system_prompt"):
            lines.append(f'SYSTEM """{system}"""')
    elif task["task"] == CLASSIFICATION:
        prompt = loaded.classifier.prompt
        lines += [_template(prompt.text_of("{{ .Prompt }}")), *_stops(loaded.classifier.tokenizer, prompt.end_ids)]
        lines += ["PARAMETER temperature 0", f"PARAMETER num_predict {prompt.answer_tokens}"]
    elif task["task"] == CAUSAL_LM:
        lines.append(_template("{{ .Prompt }}"))
    return "\n".join(lines) + "\n"


def _template(text: str) -> str:
    return f'TEMPLATE """{text}"""'


def _stops(tokenizer: Any, ids: list[int]) -> list[str]:
    return [f'PARAMETER stop "{tokenizer.decode([i])}"' for i in dict.fromkeys(ids)]


def go_template(template: ChatTemplate) -> str:
    """The chat template in Ollama's language, from what the Jinja template writes around the turns.

    A conversation is an opening, with or without a system turn, and then in turns: a question, what stands between it
    and its answer, the answer, and what stands between that and the next question.
    """
    roles = {U: "user", A: "assistant", V: "user"}
    turns: list[Any] = [{"role": role, "content": content} for content, role in roles.items()]
    plain = template.text_of(turns)
    opening, rest = plain.split(U)
    asked, rest = rest.split(A)
    between, last = rest.split(V)  # what asks for the next answer may lack the space before an answer
    space = asked.removeprefix(last) if asked.startswith(last) else ""
    asked = asked.removesuffix(space)
    with_system = template.text_of([{"role": "system", "content": S}, *turns]).split(U)[0]
    before, _, after = with_system.partition(S)
    start = _common_end(opening, _common_end(between, after))  # of every question
    opening, between, after = (part.removesuffix(start) for part in (opening, between, after))
    bos = template.tokenizer.bos_token or ""
    if template.tokenizer("")["input_ids"]:  # llama.cpp puts it in front by itself
        opening, before = opening.removeprefix(bos), before.removeprefix(bos)
    return (
        f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{opening}{{{{ end }}}}"
        f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{start}{{{{ .Content }}}}{asked}'
        f'{{{{ else if eq .Role "assistant" }}}}{space}{{{{ .Content }}}}{between}{{{{ end }}}}{{{{ end }}}}'
    )


def _common_end(first: str, second: str) -> str:
    size = 0
    while size < min(len(first), len(second)) and first[-1 - size] == second[-1 - size]:
        size += 1
    return first[len(first) - size :]
