"""A browser, and `vsod serve` as a process, for the tests of its pages."""

import contextlib
import os
import subprocess
import sys

import pytest

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"no browser: {CHROMIUM} is not there")
    with playwright.sync_playwright() as session:
        launched = session.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@contextlib.contextmanager
def opened(browser, address, **options):
    """A page at an address; what it logs as an error fails the test."""
    options = {"viewport": {"width": 1280, "height": 800}, "bypass_csp": True, **options}
    context = browser.new_context(**options)  # the policy forbids what tests evaluate
    context.set_default_timeout(60_000)
    page = context.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    yield page
    context.close()
    assert problems == []


class Served:
    """`vsod serve` with some arguments, as a process of its own."""

    def __init__(self, *arguments, stderr=None):
        command = [sys.executable, "-m", "vsod_models.cli", "serve", "--no-open", *arguments]
        if "--port" not in arguments:
            command += ["--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        line = self.process.stdout.readline()
        assert line, "vsod serve did not start"
        self.address = line.split()[-1]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(60)
        self.process.stdout.close()


def assert_fits(page, width):
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def assert_fits_and_has_names(page, width):
    """Nothing is wider than the window, and whatever takes input has a name."""
    assert_fits(page, width)
    nameless = page.evaluate("""[...document.querySelectorAll("button, select, input")]
        .filter((one) => !one.labels?.length && !one.ariaLabel && !one.textContent.trim())
        .map((one) => one.id)""")
    assert nameless == []
