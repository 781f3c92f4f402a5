"""Checks of an HTML page: it is whole, requests nothing from a network, and opens in a browser without errors."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text; a tag that is not closed in order is an error."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def check_static(source: str) -> Page:
    """Check that a page requests nothing from a network, and that every picture decodes and is not blank."""
    page = Page(source)
    assert not page.all("script") and not re.search(r"https?://|@import|url\((?!data:)", source)
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
    for attrs in page.all("img"):
        kind, _, data = attrs["src"].partition(",")
        assert kind == "data:image/png;base64" and attrs["alt"]
        pixels = imread(io.BytesIO(base64.b64decode(data, validate=True)))
        assert pixels.shape[1] <= 1280 and pixels[..., :3].std() > 0.05
    return page


def check_in_browser(file: Path, scratch: Path) -> None:
    """Check that the browser logs no message and makes no request, and that it draws a page 1280 pixels wide."""
    net, picture = scratch / "net.json", scratch / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    options += ["--no-first-run", "--disable-component-update", "--enable-logging=stderr", f"--log-net-log={net}"]
    options += [f"--user-data-dir={scratch / 'profile'}", "--window-size=1280,2000", "--virtual-time-budget=2000"]
    done = subprocess.run(
        [BROWSER, *options, f"--screenshot={picture}", file.resolve().as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    log = json.loads(net.read_text())
    urls = {e["params"]["url"] for e in log["events"] if "url" in e.get("params", {})}
    own = r"https?://(?!fonts|ajax)[^/]*google"  # Chromium's own requests
    assert not [u for u in urls if u.startswith(("http:", "https:")) and not re.match(own, u)]
    pixels = imread(picture)
    assert pixels.shape[1] == 1280 and np.std(pixels) > 0.05
