"""Serve the folder of a web export, and open it in a headless Chromium that can reach no other host."""

import http.server
import json
import os
import re
import subprocess
import threading
import time
from pathlib import Path

from webpage import BROWSER

DRIVER = Path(__file__).with_name("driver.html")


class Pages(http.server.ThreadingHTTPServer):
    """A static server on this machine for ``folder``, the driver and its audio; it keeps the driver's results."""

    def __init__(self, folder, audio):
        self.folder, self.audio, self.results, self.asked = Path(folder), audio, {}, []
        self.ended = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def __init__(self, *args):
        super().__init__(*args, directory=args[2].folder)

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/driver.html"):
            return self.give(DRIVER.read_bytes(), "text/html")
        if self.path == "/files":
            return self.give(json.dumps(list(self.server.audio)).encode(), "application/json")
        if self.path.startswith("/audio/"):
            return self.give(self.server.audio[self.path.rpartition("/")[2]], "application/octet-stream")
        return super().do_GET()

    def do_POST(self):
        name = self.path.rpartition("/")[2].replace("%20", " ")
        self.server.results[name] = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        self.give(b"", "text/plain")
        if name == "end":
            self.server.ended.set()

    def give(self, content, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def open_page(folder, audio, scratch, *, microphone=None, seconds=180):
    """Give the page each file of ``audio`` {name: bytes}; ``microphone``: a WAV file, as the microphone's sound.

    Returns:
        {name: "text\\nstate"}, the paths requested from the server, and the URLs that the browser requested elsewhere
    """
    scratch, net = Path(scratch), Path(scratch) / "net.json"
    with Pages(folder, audio) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
        options += ["--no-first-run", "--disable-component-update", f"--user-data-dir={scratch / 'profile'}"]
        options += [f"--log-net-log={net}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        options += ["--remote-debugging-port=0", "--disable-dev-shm-usage"]
        if microphone:
            options += ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
            options += [f"--use-file-for-fake-audio-capture={microphone}"]
        url = f"{server.address}/driver.html" + ("?microphone" if microphone else "")
        browser = subprocess.Popen(
            [BROWSER, *options, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            server.ended.wait(seconds)
            time.sleep(0.5)
        finally:
            os.killpg(browser.pid, 15)
            browser.wait(30)
            server.shutdown()
        text = net.read_text().rstrip()
        events = json.loads(text if text.endswith("]}") else text.rstrip(",") + "]}")["events"]
        urls = {e["params"]["url"] for e in events if "url" in e.get("params", {})}
        own = r"https?://(?!fonts|ajax)[^/]*google"  # Chromium's own requests
        elsewhere = {
            u for u in urls
            if u.startswith(("http:", "https:")) and not u.startswith(server.address) and not re.match(own, u)
        }  # fmt: skip
        return server.results, server.asked, elsewhere
