"""The page of `puna serve` in headless Chromium: messages sent, answers awaited, a screenshot.

    apt-get install chromium
    puna serve --checkpoint=MODEL --port=8000
    python benchmarks/page.py --message='Name a llama.' [--url=http://127.0.0.1:8000 --out=page.png]

Types each --message into the page and sends it with Enter, the first with --picture if there is
one, and prints each answer and in how many pieces it appeared. Ends with status 1 if the browser
reports an error (an exception, console.error, what the page's policy forbids, a request that
failed), if the page shows one, or if an answer has no text. Speaks the DevTools protocol through
a pipe, so it needs no package.
"""

import argparse
import base64
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# Counts how often what has been said changes.
WATCH = """
window.pieces = 0;
new MutationObserver(() => ++window.pieces).observe(
  document.getElementById("log"), {subtree: true, childList: true, characterData: true});
"""
SEEN = """({
  done: !document.getElementById("send").disabled,
  asked: document.querySelectorAll(".user").length,
  answers: [...document.querySelectorAll(".assistant")].map(box => box.textContent),
  errors: [...document.querySelectorAll(".error")].map(box => box.textContent),
  pieces: window.pieces,
})"""


class Browser:
    """One page of a browser of its own profile."""

    def __init__(self, program: str, profile: str):
        command = [
            program, "--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}",
            "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=640,640",
        ]  # fmt: skip
        if os.geteuid() == 0:  # whom Chromium gives no sandbox
            command.append("--no-sandbox")
        theirs, self._to = os.pipe()
        self._from, to_us = os.pipe()

        def at_3_and_4():  # where Chromium looks for them
            os.dup2(theirs, 3)
            os.dup2(to_us, 4)

        self.process = subprocess.Popen(
            command, pass_fds=(3, 4), preexec_fn=at_3_and_4, stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(to_us)
        self._left, self._count, self._session, self.errors = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        """Ask the browser and wait for what it answers."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            self._notice(answer)
        if "error" in answer:
            sys.exit(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self._left:
            if not select.select([self._from], [], [], 60)[0]:
                sys.exit("the browser has said nothing for a minute")
            data = os.read(self._from, 1 << 16)
            if not data:
                sys.exit(f"the browser has ended with status {self.process.wait()}")
            self._left += data
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def _notice(self, event: dict) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(params["exceptionDetails"])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                self.errors.append(params["args"])
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(params["entry"])

    def run(self, script: str, **options):
        """The value of JavaScript in the page."""
        answer = self.call("Runtime.evaluate", expression=script, **options)
        if "exceptionDetails" in answer:
            sys.exit(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value") if options.get("returnByValue") else answer["result"]

    def until(self, script: str, seconds: float = 120):
        """The value of JavaScript once it is true; its last value if that takes too long."""
        deadline = time.monotonic() + seconds
        while True:
            value = self.run(script, returnByValue=True)
            if value or time.monotonic() > deadline:
                return value
            time.sleep(0.05)

    def end(self) -> None:
        """Close it."""
        self.process.terminate()
        self.process.wait()
        os.close(self._to)
        os.close(self._from)


def send(browser: Browser, message: str, picture: str) -> dict:
    """Type and send a message; what the page shows once the answer has ended."""
    if picture:
        field = browser.run('document.getElementById("pictures")')["objectId"]
        if browser.run('document.getElementById("pictures").checkVisibility()')["value"] is False:
            sys.exit("the page takes no pictures: its model reads none")
        path = str(pathlib.Path(picture).resolve())
        browser.call("DOM.setFileInputFiles", files=[path], objectId=field)
    before = browser.run(SEEN, returnByValue=True)
    browser.run('window.pieces = 0; document.getElementById("text").focus()')
    browser.call("Input.insertText", text=message)
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
    browser.call("Input.dispatchKeyEvent", type="keyDown", **enter)
    browser.call("Input.dispatchKeyEvent", type="keyUp", **enter)
    if not browser.until(f"{SEEN}.done && {SEEN}.asked > {before['asked']}"):
        sys.exit("the answer has not ended")
    after = browser.run(SEEN, returnByValue=True)
    if after["errors"] or len(after["answers"]) == len(before["answers"]):
        sys.exit(f"no answer; the page shows the errors {after['errors']}")
    return after


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--message", action="append", required=True, help="may be repeated")
    parser.add_argument("--picture", default="", help="a file, sent with the first message")
    parser.add_argument("--system", default="", help="message of the settings")
    parser.add_argument("--key", default="", help="API key of the server")
    parser.add_argument("--out", default="page.png", help="the screenshot")
    args = parser.parse_args()
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        sys.exit(f"needs one of {', '.join(PROGRAMS)} on the PATH")
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(program, profile)
        try:
            browser.call("Page.navigate", url=args.url)
            if not browser.until('!!document.getElementById("reset")', 30):
                sys.exit(f"{args.url} has no page of puna")
            for name in ("system", "key"):
                value = json.dumps(getattr(args, name))
                browser.run(f'document.getElementById("{name}").value = {value}')
            browser.run(WATCH)
            for number, message in enumerate(args.message):
                seen = send(browser, message, "" if number else args.picture)
                print(json.dumps({"answer": seen["answers"][-1], "pieces": seen["pieces"]}))
            shot = browser.call("Page.captureScreenshot", format="png")
            pathlib.Path(args.out).write_bytes(base64.b64decode(shot["data"]))
            if browser.errors:
                sys.exit(f"the browser reports {json.dumps(browser.errors, indent=1)}")
        finally:
            browser.end()


if __name__ == "__main__":
    main()
