"""A headless Chromium, driven over the WebDriver protocol: what the tests of the page need of it, and no more."""

import base64
import contextlib
import re
import shutil
import subprocess
import time

import httpx

from lockstep.new_files import scratch_folder

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name that the protocol gives to an element's id
KEYS = {
    "Enter": "\ue007",
    "Tab": "\ue004",
    "Escape": "\ue00c",
    "ArrowRight": "\ue014",
    "ArrowLeft": "\ue012",
    "End": "\ue010",
}
STARTED = re.compile(r"started successfully on port (\d+)")


def missing():
    """What has to be installed before the page can be tested, or None."""
    names = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(names)} not installed" if names else None


@contextlib.contextmanager
def chromium():
    """A Browser."""
    driver = subprocess.Popen([shutil.which("chromedriver"), "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        with scratch_folder() as profile:
            browser = Browser(_port(driver), profile)
            try:
                yield browser
            finally:
                browser.close()
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()


def _port(driver):
    for line in driver.stdout:
        found = STARTED.search(line)
        if found:
            return int(found[1])
    raise RuntimeError("chromedriver ended before it listened")


class Browser:
    """One tab. Selectors are CSS; what is not there yet is waited for."""

    def __init__(self, port, profile):
        options = {"binary": shutil.which("chromium"), "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False)
        self._session = ""
        made = self._ask("/session", capabilities={"alwaysMatch": wanted})
        self._session = f"/session/{made['sessionId']}"

    def _ask(self, path, **body):
        value = self._http.post(self._session + path, json=body).json()["value"]
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(f"{path}: {value['message']}")
        return value

    def open(self, url):
        self._ask("/url", url=url)

    def reload(self):
        """Loads the page once more; returns when it is there."""
        self._ask("/refresh")

    def run(self, script, *args):
        """Runs the body of a JavaScript function; returns what it returns."""
        return self._ask("/execute/sync", script=script, args=list(args))

    def texts(self, selector):
        """The text of every element."""
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def text(self, selector):
        """The text of the only element; AssertionError if there is another number of them."""
        found = self.texts(selector)
        assert len(found) == 1, (selector, found)
        return found[0]

    def shown(self, selector):
        """How many elements can be seen."""
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).length", selector
        )

    def until(self, condition, seconds=120):
        """Waits until condition() is true; AssertionError if it never is."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.run("return document.body.innerText")
            time.sleep(0.03)

    def _element(self, selector):
        return self._ask("/element", using="css selector", value=selector)[ELEMENT]

    def click(self, selector):
        self._ask(f"/element/{self._element(selector)}/click")

    def type(self, selector, text):
        """Replaces what a field has."""
        self._ask(f"/element/{self._element(selector)}/clear")
        self._ask(f"/element/{self._element(selector)}/value", text=text)

    def press(self, *keys):
        """Presses and releases keys of KEYS, or single characters, one after the other."""
        actions = [dict(type=kind, value=KEYS.get(key, key)) for key in keys for kind in ("keyDown", "keyUp")]
        self._ask("/actions", actions=[dict(type="key", id="keys", actions=actions)])

    def hover(self, selector):
        """Moves the mouse to an element's middle."""
        move = dict(type="pointerMove", duration=0, x=0, y=0, origin={ELEMENT: self._element(selector)})
        self._ask(
            "/actions", actions=[dict(type="pointer", id="mouse", parameters={"pointerType": "mouse"}, actions=[move])]
        )

    def protocol(self, command, **params):
        """A command of the DevTools protocol."""
        return self._ask("/goog/cdp/execute", cmd=command, params=params)

    def look(self, width, height, scheme="light"):
        """Sets size and colour scheme."""
        self.protocol(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        self.protocol("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])

    def screenshot(self, path):
        """A PNG of what is seen."""
        raw = self.protocol("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(raw))

    def complaints(self):
        """What the console said since the last time: errors, and what the security policy kept out."""
        return [entry["message"] for entry in self._ask("/se/log", type="browser") if entry["level"] == "SEVERE"]

    def close(self):
        self._http.delete(self._session)
        self._http.close()
