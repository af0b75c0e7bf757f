"""The page in a browser, without a network: an image goes in, and patches, picture, classes and latencies come out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.commands.serve.app import PAGE
from tests.commands.serve.serving import serving, settings
from tests.runtime.tiny_bundle import write_bundle

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

DROP = """
(async () => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 40, height: 30 });
  const context = canvas.getContext("2d");
  context.fillStyle = "orange"; context.fillRect(0, 0, 20, 30);
  const file = new File([await new Promise((done) => canvas.toBlob(done))], "a.png", { type: "image/png" });
  const dropped = new DataTransfer();
  dropped.items.add(file);
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true }));
})()
"""


class Page:
    """A tab, by the DevTools protocol on two pipes: no driver, and no port."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers = requests, os.fdopen(answers, "rb")
        self._calls, self._rest, self._session = 0, b"", ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def _call(self, method: str, **parameters: Any) -> Any:
        self._calls += 1
        call = {"id": self._calls, "method": method, "params": parameters}
        if self._session:
            call["sessionId"] = self._session
        os.write(self._requests, json.dumps(call).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                self._rest += self._answers.read1()
            message, _, self._rest = self._rest.partition(b"\0")
            if (found := json.loads(message)).get("id") == self._calls:
                assert "error" not in found, found
                return found["result"]

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def ask(self, expression: str) -> Any:
        return self._call("Runtime.evaluate", expression=expression, awaitPromise=True)["result"].get("value")

    def wait(self, expression: str) -> None:
        until = time.monotonic() + 60
        while not self.ask(expression):
            assert time.monotonic() < until, self.ask("document.body.innerText")
            time.sleep(0.05)


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    assert CHROMIUM is not None
    to_browser, requests = os.pipe()
    answers, from_browser = os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    shell = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
    process = subprocess.Popen(
        ["bash", "-c", shell, CHROMIUM, *options], pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL
    )
    os.close(to_browser)
    os.close(from_browser)
    page = Page(requests, answers)
    try:
        yield page
    finally:
        os.close(requests)  # it ends with its pipe
        process.wait(20)
        page._answers.close()


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:)|url\(|@import|https?://(?!www\.w3\.org)", text)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
def test_an_image_in_the_browser(tmp_path: Path) -> None:
    for name, mode, outputs in (
        ("classifier", "visible", ("logits",)),
        ("mae", "reconstruct", ("pixels",)),
        ("encoder", "full", ("cls", "pooled")),
    ):
        write_bundle(tmp_path / name, token_mode=mode, outputs=outputs)
    bundles = [tmp_path / name for name in ("classifier", "mae", "encoder")]
    with serving(settings(*bundles, batches={"max_delay": "0"})) as client, browser(tmp_path / "profile") as page:
        page.open(f"http://127.0.0.1:{client.port}/")
        page.wait("document.querySelectorAll('.card.model').length === 3")
        page.ask(DROP)
        page.wait("document.body.dataset.ready")
        assert page.ask("document.getElementById('error').hidden && document.getElementById('drop').hidden")
        assert page.ask("document.getElementById('kept').textContent") == "5 of 21 (24 %)"
        page.ask("share.value = 80, share.dispatchEvent(new Event('input'))")
        page.wait("document.getElementById('kept').textContent === '17 of 21 (81 %)'")
        assert page.ask("document.getElementById('size').textContent").startswith("14 × 6 pixels")
        page.ask("document.getElementById('measure').click()")
        page.wait("document.body.dataset.measured")
        assert page.ask("document.querySelectorAll('#chart polyline').length") == 3
        cards = page.ask("JSON.stringify([...document.querySelectorAll('.card.model')].map((card) => card.innerHTML))")
        # A quarter of the canvas is hidden: those patches are of one colour that the image has not.
        colours = "new Set(Array.from({length: 21}, (_, i) => canvas.getContext('2d').getImageData("
        colours += (
            "((i % 7) + .5) * canvas.width / 7, (Math.floor(i / 7) + .5) * canvas.height / 3, 1, 1).data.join()))"
        )
        assert page.ask(f"{colours}.size") > 2
        page.ask("state.file = new File(['a note'], 'b.txt'), open(state.file)")
        page.wait("!document.getElementById('error').hidden")
        assert "cannot identify image file" in page.ask("document.getElementById('error').textContent")
    classifier, mae, encoder = json.loads(cards)
    assert len(re.findall(r'<dt title="class-\d+">', classifier)) == 5
    assert 'src="data:image/png;base64,' in mae
    assert "cls, 13 numbers" in encoder
    assert all(re.search(r"engine <b>\d+\.\d ms</b>", card) for card in (classifier, mae, encoder))
