"""Chromium without a window. Nothing is downloaded for it, and it reaches no other machine."""

from __future__ import annotations

import os
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # it starts neither as root nor in most containers with it
    "--disable-dev-shm-usage",  # containers have little of that memory
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--window-size=2400,1500",
    "--lang=en-US",
    "--no-proxy-server",
    # Whoever asks another machine finds none, which is an error in the console.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


def start_browser() -> webdriver.Chrome:
    """A browser, or a skipped test that says what is missing."""
    driver = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
    binary = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if not driver or not binary:
        pytest.skip(
            "there is no chromium or no chromedriver; on Debian: apt-get install chromium "
            "chromium-driver; elsewhere set CHROMIUM and CHROMEDRIVER"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in _OPTIONS:
        options.add_argument(option)
    logs = {"browser": "ALL", "performance": "ALL"}
    options.set_capability("goog:loggingPrefs", logs)
    options.add_experimental_option("perfLoggingPrefs", {"enablePage": False})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "localhost,127.0.0.1")  # between selenium and chromedriver
        return webdriver.Chrome(options=options, service=Service(driver))
