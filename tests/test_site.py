"""The site builds, and in a browser no page is wider than its window or asks for anything that is not in its folder."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mvkernels.bench import html

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ("headless", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-sync")
FLAGS += ("disable-component-update", "remote-debugging-pipe")
FLAGS += ("no-sandbox",)  # it opens only our own pages; a sandbox cannot be had as root and in many containers
# What is wider than its box: the page, or its text (which would then lie over the table of contents).
TOO_WIDE = """new Promise(done => setTimeout(() => done(
    [["page", document.documentElement, innerWidth], ["text", document.querySelector(".md-content")]]
        .filter(([name, box, width]) => box && box.scrollWidth > (width || box.clientWidth))
        .map(([name, box]) => name + " " + box.scrollWidth)
), 50))"""
# The titles that the search finds for a word.
FOUND = """new Promise(done => {
    const field = document.querySelector("input.md-search__input");
    field.focus();
    field.value = "autocast";
    field.dispatchEvent(new Event("keyup"));
    let tries = 100;
    const look = () => {
        const found = [...document.querySelectorAll(".md-search-result__item h1")].map(title => title.innerText);
        found.length || !--tries ? done(found) : setTimeout(look, 50);
    };
    look();
})"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


class Browser:
    """One Chromium with one tab, spoken to over its pipe (the DevTools protocol)."""

    def __init__(self, profile: Path) -> None:
        (read, self.write), (self.read, write) = os.pipe(), os.pipe()
        flags = [f"--{flag}" for flag in (*FLAGS, f"user-data-dir={profile}")]
        # Chromium reads from descriptor 3 and writes to 4; by way of 8 and 9, as ours may be 3 and 4 themselves.
        script = f'exec 8<&{read} 9>&{write}; exec "$@" 3<&8 4>&9'
        command = ["bash", "-c", script, "bash", str(CHROMIUM), *flags, "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self.pending, self.number, self.session = b"", 0, ""
        self.asked_for: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Network.enable")

    def message(self) -> dict[str, Any]:
        while b"\0" not in self.pending:
            assert select.select([self.read], [], [], 60)[0], "Chromium says nothing"
            part = os.read(self.read, 1 << 16)
            assert part, "Chromium has ended"
            self.pending += part
        one, self.pending = self.pending.split(b"\0", 1)
        found: dict[str, Any] = json.loads(one)
        if found.get("method") == "Network.requestWillBeSent":
            self.asked_for.append(found["params"]["request"]["url"])
        return found

    def call(self, method: str, **params: Any) -> Any:
        self.number += 1
        request = {"id": self.number, "method": method, "params": params}
        if self.session:
            request["sessionId"] = self.session
        os.write(self.write, json.dumps(request).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        while self.message().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return found["result"]["value"]

    def too_wide(self, width: int) -> list[str]:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        return list(self.run(TOO_WIDE))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        os.close(self.read)
        os.close(self.write)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "mkdocstrings", "material"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return folder


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    browser = Browser(tmp_path / "profile")
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Of the site on a server, as a search needs one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_the_site_has_the_api(site: Path) -> None:
    assert 'id="mvkernels.patch_attention"' in (site / "api.html").read_text()


@pytest.mark.slow
def test_pages_fit_their_window(site: Path, address: str, browser: Browser) -> None:
    pages = sorted(page.relative_to(site).as_posix() for page in site.rglob("*.html"))
    assert len(pages) > 30 and "performance/models.html" in pages
    wrong = []
    for page in pages:
        browser.open(address + page)
        for width in (400, 1200):
            wrong += [f"{page} at {width}: {what}" for what in browser.too_wide(width)]
    assert not wrong, "\n".join(wrong)
    assert not [url for url in browser.asked_for if not url.startswith((address, "data:", "blob:"))]


def test_links_between_pages_stay_links(site: Path) -> None:
    """Only what the site does not have, as a script, is shown by its path."""
    for page in site.rglob("*.html"):
        shown = re.findall(r"\(<code>([\w./-]+\.md)</code>\)", page.read_text())
        lost = [name for name in shown if (ROOT / "docs" / name).exists()]
        assert not lost, f"{page.relative_to(site)}: {lost}"
    assert 'href="../benchmarks.html"' in (site / "performance" / "models.html").read_text()


def test_the_page_of_results_fits_its_window(tmp_path: Path, browser: Browser) -> None:
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    assert html.command(str(tmp_path / "results"), None) == 0
    browser.open((tmp_path / "results" / "index.html").as_uri())
    assert {width: browser.too_wide(width) for width in (400, 1200)} == {400: [], 1200: []}


def test_the_search_finds_pages(address: str, browser: Browser) -> None:
    browser.open(address + "index.html")
    assert browser.run(FOUND)


def test_a_page_that_is_too_wide_is_found(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><body style='margin: 0'><p style='width: 500px'>Wide.</p>")
    browser.open(page.as_uri())
    assert browser.too_wide(400) == ["page 500"] and browser.too_wide(1200) == []
