"""Takes the pictures of docs/playground.md, in headless Chromium, into docs/.

    python docs/screenshots.py [outputs/latest]

They show a run of `experiment=shakespeare_char_cpu seed=1`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
WIDE, PHONE = {"width": 1280, "height": 780}, {"width": 390, "height": 844}


def main(ckpt: str) -> None:
    command = [sys.executable, str(ROOT / "serve.py"), f"ckpt={ckpt}", "port=0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        address = server.stderr.readline().split()[-1]
        if not address.startswith("http://"):
            sys.exit(server.stderr.readline())
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = written(browser, address, WIDE, "light", outputs=1)
            page.locator("#view .token").nth(85).hover()
            save(page, "playground")
            page = written(browser, address, WIDE, "dark", outputs=4)
            save(page, "playground-dark")
            page = written(browser, address, PHONE, "light", outputs=1)
            page.locator("#view .token").nth(85).tap()
            save(page, "playground-phone")
            browser.close()
    finally:
        server.terminate()
        server.wait()


def written(browser: Browser, address: str, size: dict[str, int], scheme: str, outputs: int) -> Page:
    """The page with finished texts, scrolled down to them where the screen is small."""
    page = browser.new_context(viewport=size, color_scheme=scheme, has_touch=size is PHONE).new_page()
    page.goto(address)
    page.get_by_label("Seed").fill("1")
    page.get_by_label("number input for Number of outputs").fill(str(outputs))
    page.click("#write")
    page.wait_for_selector("#view .status.done")
    if size is PHONE:
        page.locator("#buttons").evaluate("buttons => buttons.scrollIntoView()")
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # for what fades in and out
    return page


def save(page: Page, name: str) -> None:
    page.screenshot(path=ROOT / "docs" / f"{name}.png")
    print(f"written: docs/{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["latest"])
