"""Takes the pictures of docs/serve.md: the pages of `vsod serve` in Debian's chromium.

    python docs/serve_pictures.py          # needs the extras models, serve and test

The Try page shows the clip of `vsod example`, the Correct page synthetic clips.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
VSOD = [sys.executable, "-m", "vsod_models.cli"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as session:
        clips, labels = f"{folder}/clips", f"{folder}/labels"
        size = ["--frames", "12", "--height", "360", "--width", "640", "--seed", "1"]
        subprocess.run(
            [*VSOD, "data", "synthetic", clips, "--clips", "4", "--val-clips", "1", *size],
            check=True,
        )
        subprocess.run([*VSOD, "label", "coarse", "folder", clips, "-o", labels], check=True)
        serve = [*VSOD, "serve", "--no-open", "--port", "0", "--labels", labels, "--data", clips]
        server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        browser = session.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)
        try:
            for name, width, height, scheme in (
                ("wide", 1280, 760, "light"),
                ("narrow", 390, 844, "dark"),
            ):
                context = browser.new_context(
                    viewport={"width": width, "height": height}, color_scheme=scheme
                )
                page = context.new_page()
                page.set_default_timeout(300_000)
                page.goto(address + "#/try")
                page.click("#example")
                page.click("#run:enabled")
                page.wait_for_selector("#downloads button")
                page.click("#play")
                page.fill("#scrub", "1")
                page.wait_for_timeout(1000)
                page.evaluate("document.activeElement.blur()")
                page.screenshot(path=HERE / f"serve-try-{name}.jpg", type="jpeg", quality=80)
                page.goto(address + "#/correct")
                page.wait_for_selector("#easel[data-shown]")
                page.focus("#easel")
                for key in ("r", "Space", "r"):
                    page.keyboard.press(key)
                    page.wait_for_timeout(1000)
                page.screenshot(path=HERE / f"serve-correct-{name}.jpg", type="jpeg", quality=80)
                page.keyboard.press("z")
                page.wait_for_timeout(1000)
                context.close()
        finally:
            browser.close()
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
