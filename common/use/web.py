"""`inference.py --web`: a page in the browser, over the same models, chats and files of answers as the terminal.

The page is on this computer alone, unless an address is given; then it asks for a password. It needs Gradio, which is
imported when the model is there, and it calls nothing on the internet.
"""

import hmac
import importlib.metadata
import ipaddress
import os
import socket
import tempfile
import threading
from typing import TYPE_CHECKING, Any

from common.errors import InputError
from common.memory import end_waiting_threads
from common.options import CAUSAL_LM, CHAT, CLASSIFICATION, PASSWORD, WebConfig
from common.use.runs import Run

if TYPE_CHECKING:
    import gradio

    from common.use.label_models import LabelModel
    from common.use.text_models import TextModel

MAJOR = 6  # of Gradio
PEOPLE = 64  # that may wait at once


def check_ready(config: WebConfig) -> None:
    """Raises InputError where a page cannot be shown: no Gradio, no password for others, or a port that is taken."""
    try:
        known = int(importlib.metadata.version("gradio").partition(".")[0]) >= MAJOR
    except importlib.metadata.PackageNotFoundError:
        known = False
    if not known:
        raise InputError(f"--web needs Gradio {MAJOR}: pip install 'gradio>={MAJOR}'")
    if not is_loopback(config.web_address) and not os.environ.get(PASSWORD):
        raise InputError(
            f"--web_address {config.web_address} shows the page to others: set a password in the environment variable "
            f"{PASSWORD}, or leave --web_address out."
        )
    if ":" in config.web_address:
        raise InputError(f"--web_address {config.web_address}: give a name, or an address of the form 127.0.0.1.")
    try:
        family, kind, _, _, place = socket.getaddrinfo(config.web_address, config.web_port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a name of a computer"
        raise InputError(
            f"--web_address {config.web_address} --web_port {config.web_port}: no page can be opened there "
            f"({reason}). Choose another port, for example {config.web_port % 65535 + 1}."
        ) from None


def is_loopback(address: str) -> bool:
    """Whether only this computer reaches the address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def build(config: Any, run: Run, models: "LabelModel | list[tuple[str, TextModel]]") -> "gradio.Blocks":
    """The page of a run. config: of inference.py. models: a classifier, or models that write, each with its name."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    from common.use import web_chat, web_labels, web_text

    pages: dict[str, Any] = {
        CLASSIFICATION: web_labels.LabelPage, CHAT: web_chat.ChatPage, CAUSAL_LM: web_text.TextPage
    }  # fmt: skip
    built: gradio.Blocks = pages[run.task](config, run, models).build()
    return built


def launch(page: "gradio.Blocks", address: str, port: int, password: str | None = None) -> str:
    """Shows the page, and returns its address; it ends with `page.close()`. password: asked for, if there is one."""
    from common.use import web_look

    end_waiting_threads()  # that loaded the models; those that answer have their own

    def may_enter(_: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (password or "").encode())

    page.queue(max_size=PEOPLE, default_concurrency_limit=None)  # the model has a queue of its own
    _, url, _ = page.launch(
        server_name=address, server_port=port, auth=may_enter if password else None,
        auth_message="Any name, and the password of this page.", share=False, quiet=True, prevent_thread_lock=True,
        footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
        num_workers=0, max_file_size="64mb", theme=web_look.theme(), css=web_look.CSS, head=web_look.HEAD,
    )  # fmt: skip
    return str(url)


def serve(config: Any, run: Run, models: "LabelModel | list[tuple[str, TextModel]]") -> None:
    """Shows the page until Ctrl-C. config: of inference.py. What people upload is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="plainlora-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(config, run, models)
        try:
            url = launch(page, config.web_address, config.web_port, os.environ.get(PASSWORD))
            print(f"The page is at {url}  (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            print("\nThe page is closed.", flush=True)
        finally:
            page.close(verbose=False)
