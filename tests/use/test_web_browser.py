"""The page in headless Chromium, as a person uses it."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.models import build_model
from helpers.pages import CHAT, PLAIN, QUIET, open_page
from helpers.rows import read_jsonl, toy_rows, write_csv

from common.use.personas import choose_persona

pytest.importorskip("gradio", reason="the page needs gradio")
webdriver = pytest.importorskip("selenium.webdriver", reason="driving a browser needs selenium")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with its chromedriver on the PATH"),
    *QUIET,
]
SECONDS = 60  # a wait that ends in an error


class Browser:
    """A browser window of its own at a page."""

    def __init__(self, url: str, downloads: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(word)
        options.add_argument("--window-size=1280,1000")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.url = url
        self.driver.get(url)
        self.until(lambda: self.all("#box textarea"))

    def all(self, css: str) -> list:
        return self.driver.find_elements("css selector", css)

    def text(self, css: str) -> str:
        return self.driver.execute_script(f"return document.querySelector({css!r})?.textContent ?? ''").strip()

    def value(self, css: str) -> str:
        return self.driver.execute_script(f"return document.querySelector({css!r})?.value ?? ''")

    def messages(self, who: str = "bot") -> list[str]:
        """The turns of a role, as they are read."""
        code = f"return [...document.querySelectorAll('[data-testid={who}] .md')].map(found => found.textContent)"
        return self.driver.execute_script(code)

    def click(self, css: str, number: int = 0) -> None:
        self.until(lambda: len(self.all(css)) > number and self.all(css)[number].is_enabled())
        self.driver.execute_script("arguments[0].click()", self.all(css)[number])

    def write(self, text: str) -> None:
        self.all("#box textarea")[0].send_keys(text)

    def send(self, text: str) -> None:
        self.write(text + "\n")

    def upload(self, file: Path) -> None:
        """Has a file classified."""
        self.click("#file > button")
        self.until(lambda: self.all("#file input[type=file]"))
        self.all("#file input[type=file]")[0].send_keys(str(file))
        self.until(lambda: self.all("#file .file-preview a"))
        self.click("#start")

    def until(self, true: Callable[[], object], seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.05)

    def idle(self) -> None:
        """Waits until no answer is being written."""
        self.until(lambda: self.all("#retry")[0].is_enabled())

    def asked_elsewhere(self) -> set[str]:
        """What the browser asked other addresses for."""
        events = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
        return {url for url in urls if not url.startswith((self.url, "data:", "blob:"))}


@pytest.fixture
def browse(tmp_path) -> Iterator[Callable[[str], Browser]]:
    opened: list[Browser] = []

    def make(url: str) -> Browser:
        opened.append(Browser(url, tmp_path))
        return opened[-1]

    yield make
    for browser in opened:
        browser.driver.quit()


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("writer") / "model"
    return str(build_model(folder, "llama", max_position_embeddings=20000))


def test_a_chat_in_a_browser(writer, tmp_path, browse):
    """Persona, stream, stop, retry, clear; two browsers apart, of which one waits; one that closes makes room."""
    with open_page(tmp_path, run=writer, **CHAT, max_new_tokens=15000) as (url, [(_, model)]):
        one, two = browse(url), browse(url)
        assert one.driver.title.endswith("plainlora") and not one.all("footer a")
        one.click("#turn button")
        one.click("#persona input", 2)
        one.until(lambda: one.value("#system textarea") == choose_persona("billing").system_prompt)
        one.until(lambda: one.text(".example") == choose_persona("billing").examples[0])
        one.click(".example")
        one.until(lambda: one.messages() and len(one.messages()[0]) > 20)  # it streams
        begun = len(one.messages()[0])
        one.until(lambda: len(one.messages()[0]) > begun)
        two.send("other")
        two.until(lambda: "another question is answered first" in two.text("#note"))
        one.click("#box button")
        one.idle()
        assert "Stopped" in one.text("#note") and one.messages("user") == [choose_persona("billing").examples[0]]
        two.until(lambda: two.messages())  # its turn has come
        assert two.messages("user") == ["other"]
        two.driver.quit()  # in the middle of its answer
        one.send("<img src=x onerror=alert(1)> ![a](http://127.0.0.1:9/x.png)")
        one.until(lambda: len(one.messages()) == 2 and one.messages()[1])
        assert one.messages("user")[1].startswith("<img src=x") and not one.all(".chat img")
        one.click("#box button")
        one.idle()
        before = one.messages()
        one.click("#retry")
        one.until(lambda: one.messages() != before and len(one.messages()) == 2)
        one.click("#clear")
        one.until(lambda: not one.messages() and one.all(".chat .empty"))
        one.idle()
        assert not one.asked_elsewhere()


def test_a_text_in_a_browser(writer, tmp_path, browse):
    with open_page(tmp_path, run=writer, **PLAIN, task="causal_lm", max_new_tokens=15000) as (url, _):
        one = browse(url)
        one.write("goal team")
        one.click("#go")
        one.until(lambda: len(one.value(".text textarea")) > 30)
        one.click("#stop")
        one.until(lambda: one.all("#go")[0].is_enabled())
        assert one.value(".text textarea").startswith("goal team") and "Stopped" in one.text("#note")


def test_a_classifier_in_a_browser(trained, tmp_path, browse):
    """Bars, abstention, a file and its answers, a bad file."""
    rows = [{"text": row["text"]} for row in toy_rows(3)]
    file = write_csv(tmp_path / "rows.csv", rows)
    (tmp_path / "bad.csv").write_text("body\nx\n")
    with open_page(tmp_path / "cache", run=str(trained("llama", "head", "single"))) as (url, model):
        one = browse(url)
        assert "No text yet" in one.text("#answer")
        one.write(rows[0]["text"])
        one.click("#go")
        one.until(lambda: one.all("#answer .bar"))
        answer = model.classify([rows[0]["text"]])[0]
        assert one.text("#answer .answer b") == answer.prediction and len(one.all("#answer .bar")) == 3
        assert one.text("#answer .p") == f"{max(answer.probabilities.values()):.3f}"
        widths = [float(bar.get_attribute("style").split(":")[1].strip(" %;")) for bar in one.all("#answer .bar i")]
        assert widths == sorted(widths, reverse=True)
        one.upload(file)
        one.until(lambda: "9 of 9 rows answered" in one.text("#note"))
        one.until(lambda: rows[0]["text"] in one.text("#table"))
        one.click("#download")
        one.until(lambda: (tmp_path / "rows-answers.jsonl").is_file())
        assert [line["id"] for line in read_jsonl(tmp_path / "rows-answers.jsonl")] == list("012345678")
        assert not one.asked_elsewhere()
        two = browse(url)
        two.upload(tmp_path / "bad.csv")
        two.until(lambda: "bad.csv" in two.text("#note") and "text" in two.text("#note"))
        assert str(tmp_path) not in two.text("#note") and not two.all("#table td")
