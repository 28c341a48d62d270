"""A headless Chromium, for tests and pictures of the dashboard."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from selenium import webdriver

MISSING = "needs Chromium and its driver (Debian: chromium, chromium-driver)"
_OPTIONS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
)


def installed() -> bool:
    """True if Chromium and its driver are installed."""
    return all(map(shutil.which, ("chromium", "chromedriver")))


@contextlib.contextmanager
def chromium(*, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """A browser with a temporary profile."""
    with tempfile.TemporaryDirectory(prefix="moejax-chromium-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for argument in (*_OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(argument)
        if os.geteuid() == 0:  # Chromium refuses to sandbox itself as root
            options.add_argument("--no-sandbox")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
            resize(driver, width=width, height=height)
            yield driver
        finally:
            driver.quit()


def resize(driver: webdriver.Chrome, *, width: int, height: int) -> None:
    """Give the page a viewport of another size, in CSS pixels."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
