"""What the pages share: theme, style, the lines at top and bottom, and how texts of others are shown."""

import math
import re
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from common.data.splits import SPLITS
from common.disk import read_json
from common.errors import InputError, printable
from common.measure.metrics import headlines
from common.measure.report import value_text
from common.options import Sampling
from common.use.runs import Run

FAILURES = (InputError, RuntimeError, OSError)  # of an answer; the page goes on after one
FONTS = ("ui-sans-serif", "system-ui", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif")
FIXED = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
HEAD = '<meta name="color-scheme" content="light dark"><meta name="robots" content="noindex">'
SWITCH = "() => { document.body.classList.toggle('dark'); }"  # between light and dark; the system's is the start
CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
footer { display: none !important; }
.top { display: flex; align-items: baseline; gap: .75rem; flex-wrap: wrap; }
.top b { font-size: 1.35rem; font-weight: 650; letter-spacing: -.01em; }
.top span, .note { color: var(--body-text-color-subdued); }
.note { font-size: .875rem; min-height: 1.3rem; }
#switch { max-width: 44px; min-width: 44px; align-self: center; }
.facts { display: flex; flex-wrap: wrap; gap: .35rem 1.5rem; padding-top: .75rem; font-size: .8125rem;
         border-top: 1px solid var(--border-color-primary); color: var(--body-text-color-subdued); }
.facts b { font-weight: 600; color: var(--body-text-color); }
.examples button { justify-content: flex-start; text-align: left; font-weight: 400; white-space: normal; }
.side { gap: .75rem; }
.side .block, .examples { gap: .5rem; }
.heading { font-size: .875rem; color: var(--body-text-color-subdued); padding-left: .25rem; }
.chat .message { font-size: .9375rem; line-height: 1.5; overflow-wrap: anywhere; }
.chat .message-content .md { white-space: pre-wrap; }
#answer { padding: 1rem 1.25rem; min-height: 21rem; border: 1px solid var(--block-border-color);
         border-radius: var(--block-radius); background: var(--block-background-fill); }
#table td, #table td *, #table th { font-family: var(--font) !important; font-size: .875rem; }
button.secondary:not(#switch) { border: 1px solid var(--button-secondary-border-color); }
.error { color: var(--error-text-color, #b91c1c); }
.empty { padding: 3rem 1rem; text-align: center; color: var(--body-text-color-subdued); }
.empty b { display: block; padding-bottom: .35rem; font-size: 1.125rem; font-weight: 600;
           color: var(--body-text-color); }
.answer { padding: .25rem 0 .75rem; }
.answer b { display: block; font-size: 1.25rem; font-weight: 650; overflow-wrap: anywhere; }
.answer.none b { color: var(--body-text-color-subdued); }
.bars { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr 3.5rem; gap: .5rem .75rem;
        align-items: center; font-size: .9375rem; }
.bars .name { max-width: 16rem; overflow-wrap: anywhere; }
.bars .bar { position: relative; height: .625rem; border-radius: 999px; background: var(--border-color-primary); }
.bars .bar i { position: absolute; inset: 0 auto 0 0; border-radius: 999px; background: var(--neutral-400); }
.bars .bar.chosen i { background: var(--primary-500); }
.bars .bar u { position: absolute; top: -.2rem; bottom: -.2rem; width: 2px; background: var(--body-text-color); }
.bars .p { text-align: right; font-variant-numeric: tabular-nums; }
"""


def theme() -> gr.Theme:
    """Calm, in the system's own fonts, so that no font is fetched."""
    return gr.themes.Base(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", radius_size="lg", font=FONTS, font_mono=FIXED
    ).set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        block_background_fill="white", block_background_fill_dark="*neutral_900",
        block_border_color="*neutral_200", block_border_color_dark="*neutral_800",
        block_shadow="none", block_label_background_fill="transparent", block_label_background_fill_dark="transparent",
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white", button_primary_background_fill_dark="*primary_600",
        button_secondary_background_fill="white", button_secondary_background_fill_dark="*neutral_900",
        button_secondary_border_color="*neutral_200", button_secondary_border_color_dark="*neutral_700",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_hover_dark="*neutral_800",
        button_secondary_text_color="*neutral_800", button_large_text_weight="500", button_large_text_size="*text_md",
        input_background_fill="white", input_background_fill_dark="*neutral_900",
    )  # fmt: skip


def blocks(run: Run) -> gr.Blocks:
    """An empty page with its title."""
    return gr.Blocks(title=f"{short_name(run)} - plainlora", analytics_enabled=False, delete_cache=(600, 3600))


def top(run: Run, what: str) -> None:
    """The line at the top: what the page is, of which run, and a switch between light and dark."""
    with gr.Row():
        gr.HTML(f'<div class="top"><b>{escape(what)}</b><span>{plain(short_name(run))}</span></div>')
        switch = gr.Button("◐", elem_id="switch", size="sm", min_width=44, scale=0)
        switch.click(None, None, None, js=SWITCH)


def bottom(run: Run) -> None:
    """The line at the bottom: `facts`."""
    cells = "".join(f"<span>{escape(name)} <b>{plain(value)}</b></span>" for name, value in facts(run))
    gr.HTML(f'<div class="facts">{cells}</div>')


def facts(run: Run) -> list[tuple[str, str]]:
    """(name, value) of what a reader wants to know of a run: base model, training data, measured figures."""
    base = run.trained["model_options"]["model"] if run.trained else run.name
    found = [("Base model", Path(base).name)]
    if run.folder is None:
        return [*found, ("Training", "none")]
    saved = read_json(run.run_folder / "splits.json")
    if source := saved.get("sources", {}).get("train"):
        rows = saved.get("ids", {}).get("train")
        name = "/".join(Path(source["name"]).parts[-2:])
        found.append(("Trained on", name + (f" ({len(rows):,} rows)" if rows else "")))
    for split in reversed(SPLITS):
        metrics = read_json(run.run_folder / "eval" / split / "metrics.json")
        measured = {value_text(metrics, metric.name): f"{metric.title}, {split}"
                    for metric in reversed(headlines(run.task)) if metric.name in metrics}  # fmt: skip
        if measured:  # of equal figures, such as accuracy and micro-F1, the first
            return found + [(title, value) for value, title in reversed(measured.items())]
    return [*found, ("Figures", "not measured yet")]


def short_name(run: Run) -> str:
    """The run's name without the folders above it, but for the last one."""
    return "/".join(Path(run.name).parts[-2:])


def plain(text: str) -> str:
    """A text of others as HTML that shows it as it is: no tag, no picture, nothing that a browser obeys."""
    return escape(printable(text))


def text_part(text: str) -> dict[str, str]:
    """A text of others as the content of a turn; as a mere string, Gradio would take indentation out of it."""
    return {"type": "text", "text": plain(text)}


def empty(title: str, text: str) -> str:
    """What stands where nothing is yet, as HTML."""
    return f'<div class="empty"><b>{plain(title)}</b>{plain(text)}</div>'


def note(text: str = "") -> str:
    """A line in small print, as HTML. text: of this program's own, or escaped."""
    return f'<div class="note">{text}</div>'


def error_text(error: Exception) -> str:
    """An error for the page, where an option is a field and no word of a command line.

    Escaped: Gradio shows it as HTML, and a chat template, which may be anybody's, can put anything into it.
    """
    return escape(re.sub(r"--(\w)", r"\1", printable(str(error))))


def sampling_of(config: Any) -> Sampling:
    """The settings that the page begins with. config: of inference.py."""
    return Sampling(**{item.name: getattr(config, item.name) for item in fields(Sampling)})


def sampling_fields(sampling: Sampling) -> list[gr.components.Component]:
    """A field per setting of `Sampling`, in its order and with its bounds; empty: unset."""
    found: list[gr.components.Component] = []
    for item in fields(Sampling):
        value, label = getattr(sampling, item.name), item.name.replace("_", " ")
        facts, kind = item.metadata, str(item.type)
        if "bool" in kind:
            choices = [("unset", ""), ("yes", "true"), ("no", "false")]
            chosen = "" if value is None else str(value).lower()
            found.append(gr.Dropdown(choices, value=chosen, label=label, info=facts["help"], min_width=220))
        else:
            low, high = (facts[name] if math.isfinite(facts[name]) else None for name in ("at_least", "at_most"))
            whole = "int" in kind
            found.append(gr.Number(
                value, label=label, info=facts["help"], placeholder="unset", minimum=low, maximum=high,
                precision=0 if whole else None, step=1 if whole else 0.05, min_width=220,
            ))  # fmt: skip
    return found


def sampling_texts(values: Any) -> dict[str, str]:
    """The fields' values as `ChatState.change_sampling` takes them."""
    return {
        item.name: "" if value in (None, "") else str(value)
        for item, value in zip(fields(Sampling), values, strict=True)
    }
