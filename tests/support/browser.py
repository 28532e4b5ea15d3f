"""A real browser for tests: the Chromium or Chrome that this machine has, without a window and without a connection of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
MISSING = ("NO BROWSER: the checks of the docs site and of JupyterLab in a browser are SKIPPED; install Chromium (Debian: apt-get install "
           "chromium) or name one in ARCHREPAIR_BROWSER")


def find_browser() -> str | None:
    "Path of a browser, or None. `ARCHREPAIR_BROWSER` comes first."
    return next((path for name in (os.environ.get("ARCHREPAIR_BROWSER", ""), *NAMES) if name and (path := shutil.which(name))), None)


def get_browser() -> str | None:
    "A browser, installed from the distribution's packages where there is none and we may; says loudly when that fails."
    if not find_browser() and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL,
                 "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(command, check=False, **quiet)
    if not find_browser():
        print(f"\n{MISSING}\n", file=sys.stderr, flush=True)
    return find_browser()


@contextmanager
def browser() -> Iterator:
    "A browser under Playwright's hand, ended on leaving."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=find_browser(), headless=True, args=FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()
