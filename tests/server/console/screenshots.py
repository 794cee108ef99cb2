"""Takes the README's pictures of the console: `make screenshots`. The demo is made where it is not there yet."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from lethe.serve import Place, open_service
from tests.server.console.browsing import FLAGS, PATIENCE, chromium, running

IMAGES = Path(__file__).parents[3] / "docs" / "images"
LARGEST = 150 * 1024
"""Bytes that a picture of the README may have."""


def keep(name: str, png: bytes, *, folder: Path = IMAGES) -> None:
    """Write a picture, unless it has grown too large."""
    if len(png) > LARGEST:
        raise ValueError(f"{name} has {len(png)} bytes; the most is {LARGEST}: show less of the page")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(png)
    print(f"{folder / name}: {len(png) / 1024:.0f} KiB")


def sign_in(page: Any, base: str, key: str) -> None:
    """Sign in, as anybody does."""
    page.set_default_timeout(PATIENCE)
    page.goto(f"{base}/console")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()


def take(base: str, key: str, *, folder: Path = IMAGES) -> None:
    """Take both pictures."""
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        sign_in(page, base, key)
        link = page.locator(".names a").nth(2)
        name = link.inner_text()
        link.click()
        # A rating first, so that the list has moved.
        page.get_by_label("Title", exact=True).fill(page.locator(".items .title").nth(1).inner_text())
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Rate").click()
        page.evaluate("scrollTo(0, 0)")
        page.locator(".move").first.wait_for()
        keep("console-user.png", page.screenshot(), folder=folder)
        phone = browser.new_page(viewport={"width": 390, "height": 844}, device_scale_factor=1.5)
        sign_in(phone, base, key)
        phone.goto(f"{base}/console/forget?name={name}")
        phone.get_by_role("checkbox").check()
        phone.locator("button.danger").click()
        phone.get_by_role("heading", name="This user is gone").wait_for()
        keep("console-forgotten.png", phone.screenshot(), folder=folder)
        for more in sys.argv[1:]:
            page.goto(f"{base}/console/{more}")
            keep(f"{more}.png", page.screenshot(full_page=True), folder=folder)
        browser.close()


def main() -> None:
    """Serve the demo in a folder that goes away, and take the pictures."""
    with tempfile.TemporaryDirectory() as place:
        service = open_service(None, Place(data=Path(place)), say=print)
        key = service.keys.issue("operator")
        with running(service, runs=None) as base:
            take(base, key)


if __name__ == "__main__":
    main()
