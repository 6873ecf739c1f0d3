"""A headless browser over the WebDriver protocol: just enough of it to use a page as a person does."""

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no name resolves: a page that needs the network fails
    "--window-size=1100,1600",
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {"ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015"}


def missing() -> str | None:
    """Why there is no browser to test with, or None."""
    absent = [name for name in ("chromedriver", "chromium") if shutil.which(name) is None]
    if not absent:
        return None
    return f"{' and '.join(absent)} not installed: apt-get install chromium chromium-driver"


class Browser:
    """One window."""

    def __init__(self, server: str, session: str) -> None:
        self._server, self._session = server, session

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a command of the session; return its value."""
        return _ask(self._server, method, f"/session/{self._session}{path}", body)

    def open(self, page: Path) -> None:
        """Load a file."""
        self.ask("POST", "/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of a function in the page; return what it returns."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> str:
        """Return the element that a CSS selector finds."""
        found: dict[str, str] = self.ask("POST", "/element", {"using": "css selector", "value": selector})
        return found[ELEMENT]

    def text(self, selector: str) -> str:
        """Return what an element shows."""
        return str(self.ask("GET", f"/element/{self.find(selector)}/text"))

    def click(self, selector: str) -> None:
        """Click in the middle of an element."""
        self.ask("POST", f"/element/{self.find(selector)}/click", {})

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a select."""
        self.click(f'{selector} option[value="{value}"]')

    def drag(self, selector: str, dx: int) -> None:
        """Press the mouse on an element, move it in steps by dx pixels, and let go."""
        origin = {ELEMENT: self.find(selector)}
        moves = [
            {"type": "pointerMove", "duration": 5, "origin": "pointer", "x": part, "y": 0}
            for part in (dx // 3, dx // 3, dx - 2 * (dx // 3))
        ]
        actions = [
            {"type": "pointerMove", "duration": 0, "origin": origin, "x": 0, "y": 0},
            {"type": "pointerDown", "button": 0},
            *moves,
            {"type": "pointerUp", "button": 0},
        ]
        self.ask("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]})

    def press(self, *keys: str) -> None:
        """Press keys, by their names, where the focus is."""
        actions = [
            {"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")
        ]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def complaints(self) -> list[str]:
        """Return what the browser has written to its console since it was asked last."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", {"type": "browser"})]


def _ask(server: str, method: str, path: str, body: Any) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server + path, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{method} {path}: {error.read().decode()}") from None


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser, and end it."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert driver.stdout is not None
        port = next(found[1] for line in driver.stdout if (found := re.search(r"on port (\d+)\.", line)))
        server = f"http://127.0.0.1:{port}"
        options = {"args": FLAGS, "binary": shutil.which("chromium")}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        capabilities = {"alwaysMatch": wanted}
        session = _ask(server, "POST", "/session", {"capabilities": capabilities})["sessionId"]
        try:
            yield Browser(server, session)
        finally:
            _ask(server, "DELETE", f"/session/{session}", None)
    finally:
        driver.terminate()
        driver.wait()
