"""Coarse labels of a sequence cleaned through the page of `vsod serve`, by a script in a browser.

The script plays the person: the ground truth decides what is wrong, the mouse and the keyboard of a
real browser do what is done about it.  Counted are clicks, boxes, and the keys that carry something
on; Enter, which turns the page, is not.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import BadInput, measure

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
LEAST = 0.005  # of the frame: nobody does anything about less, nor carries it on
MOST = 12  # actions a frame
DAMAGE = 3  # a right pixel lost weighs as much as so many wrong ones erased
GRID = 5  # pixels: corners of boxes
LABEL = """() => {
    const canvas = document.getElementById("label");
    const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let text = "";
    for (let i = 0; i < data.length; i += 4) text += data[i] === 255 ? "1" : "0";
    return [canvas.width, canvas.height, text];
}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="folder of DAVIS-2016")
    parser.add_argument("--sequence", default="bear", help="of its train split")
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--out", default="benchmarks/results/correct", help="folder of the result")


class Person:
    """Looks at a frame of the page, knows what is right, and acts by mouse and keyboard.

    tools: whether boxes are drawn and regions carried on; else there are clicks only.
    """

    def __init__(self, page: Any, tools: bool):
        self.page, self.tools = page, tools
        self.actions = {"click": 0, "box": 0, "carry": 0}

    def sees(self) -> np.ndarray:
        """The label on the screen, (H, W) bool."""
        width, height, text = self.page.evaluate(LABEL)
        return np.frombuffer(text.encode(), np.uint8).reshape(height, width) == ord("1")

    def sees_erased(self) -> np.ndarray:
        """What is dotted on the screen, (H, W) bool: read from what the page was sent."""
        import cv2

        sequence, index, _ = self.shown().rsplit("/", 2)
        at = f"sequence={sequence}&index={index}"
        data = self.page.request.get(f"/api/labels/regions.png?{at}").body()
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., 0] == 128

    def screen(self, x: float, y: float, size: tuple[int, int]) -> tuple[float, float]:
        box = self.page.locator("#label").bounding_box()
        scale = min(box["width"] / size[1], box["height"] / size[0])
        left = box["x"] + (box["width"] - scale * size[1]) / 2
        top = box["y"] + (box["height"] - scale * size[0]) / 2
        return left + (x + 0.5) * scale, top + (y + 0.5) * scale

    def done(self, before: str, kind: str) -> None:
        self.actions[kind] += 1
        shown = "document.getElementById('easel').dataset.shown"
        self.page.wait_for_function(f"{shown} !== {json.dumps(before)}")

    def shown(self) -> str:
        return self.page.evaluate("document.getElementById('easel').dataset.shown")

    def click(self, region: np.ndarray) -> None:
        """In the middle of a region (H, W) bool, where it is widest."""
        import cv2

        depth = cv2.distanceTransform(np.pad(region, 1).astype(np.uint8), cv2.DIST_L2, 3)
        y, x = np.unravel_index(int(depth[1:-1, 1:-1].argmax()), region.shape)
        before = self.shown()
        self.page.keyboard.press("1")
        self.page.mouse.click(*self.screen(x, y, region.shape))
        self.done(before, "click")

    def box(self, corners: tuple[int, int, int, int], size: tuple[int, int]) -> None:
        left, top, right, bottom = corners
        before = self.shown()
        self.page.keyboard.press("2")
        self.page.mouse.move(*self.screen(left, top, size))
        self.page.mouse.down()
        self.page.mouse.move(*self.screen(right - 1, bottom - 1, size), steps=3)
        self.page.mouse.up()
        self.done(before, "box")

    def carry(self) -> None:
        self.page.keyboard.press("c")
        self.actions["carry"] += 1
        self.page.wait_for_function("document.getElementById('carry').textContent !== 'Carry on'")
        self.page.wait_for_function(
            "document.getElementById('carry').textContent === 'Carry on'", timeout=300_000
        )

    def frame(self, truth: np.ndarray, last: bool) -> np.ndarray:
        """Cleans the frame that is shown, what gains most first; gives the label that is left."""
        for _ in range(MOST):
            label = self.sees()
            worth = np.where(truth, -DAMAGE, 1)  # of erasing a pixel
            best, does = LEAST * truth.size, None
            for region in regions(label):
                if (gain := worth[region].sum()) > best:
                    best, does = gain, functools.partial(self.click, region)
            back = None
            for region in regions(self.sees_erased()):  # carried on too far
                if (gain := -worth[region].sum()) > best:
                    best, does = gain, functools.partial(self.click, region)
                    back = does
            if self.tools:
                gain, corners = best_box(np.where(label, worth, 0))
                if gain > best:
                    best, does = gain, functools.partial(self.box, corners, truth.shape)
            if does is None:
                break
            does()
            if self.tools and does is not back and not last:
                self.carry()
        return self.sees()


def regions(label: np.ndarray) -> Iterator[np.ndarray]:
    """The connected regions of a mask, largest first."""
    import cv2

    count, numbers, boxes, _ = cv2.connectedComponentsWithStats(label.astype(np.uint8))
    for region in sorted(range(1, count), key=lambda n: -boxes[n][4]):
        yield numbers == region


def best_box(worth: np.ndarray) -> tuple[int, tuple[int, int, int, int]]:
    """The box (left, top, right, bottom), corners on a grid, with the largest sum, and the sum."""
    height, width = worth.shape
    rows, columns = np.arange(0, height, GRID), np.arange(0, width, GRID)
    cells = np.add.reduceat(np.add.reduceat(worth, rows, 0), columns, 1)
    sums = np.pad(cells, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    best, found = 0, (0, 0, 0, 0)
    for top in range(len(rows)):
        strips = sums[top + 1 :] - sums[top]  # of all bottoms, by right edge
        lowest = np.minimum.accumulate(strips, 1)
        gains = strips - lowest
        bottom, right = np.unravel_index(int(gains.argmax()), gains.shape)
        if gains[bottom, right] > best:
            best = int(gains[bottom, right])
            left = int(strips[bottom, : right + 1].argmin())
            edges = (left, top, int(right), top + 1 + int(bottom))
            found = tuple(
                min(edge * GRID, most)
                for edge, most in zip(edges, (width, height) * 2, strict=True)
            )
    return best, found


@contextlib.contextmanager
def browsing(path: str) -> Iterator[Any]:
    """A browser of Playwright's; BadInput where there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        raise BadInput("playwright is missing: pip install -e '.[test,models,serve]'") from None
    if not Path(path).exists():
        raise BadInput(f"--browser {path}: no such file")
    with sync_playwright() as session:
        browser = session.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[str]:
    """`vsod serve` with these arguments; gives its address."""
    command = [sys.executable, "-m", "vsod_models.cli", "serve", "--no-open", "--port", "0"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait()


def measures(labels: list[np.ndarray], truths: list[np.ndarray]) -> dict[str, float]:
    """Mean absolute error and intersection over union, mean over the frames."""
    pairs = list(zip(labels, truths, strict=True))
    errors = [float((a != b).mean()) for a, b in pairs]
    unions = [float((a & b).sum() / max(1, (a | b).sum())) for a, b in pairs]
    return {"mae": round(float(np.mean(errors)), 5), "iou": round(float(np.mean(unions)), 4)}


def clean(
    browser: Any, labels: Path, args: argparse.Namespace, truths: list[np.ndarray], tools: bool
) -> dict[str, Any]:
    """One pass over the frames; gives what it cost and what it left."""
    erase = labels.with_name(f"erase-{tools}.json")
    given = ["--labels", str(labels), "--data", args.data, "--erase", str(erase)]
    with served(*given) as address:
        context = browser.new_context(
            viewport={"width": 1280, "height": 800}, bypass_csp=True, base_url=address
        )
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.goto(address)
        person, actions, left = Person(page, tools), [], []
        began = time.monotonic()
        for index, truth in enumerate(truths):
            page.wait_for_selector(f'#easel[data-shown^="{args.sequence}/{index}/"]')
            page.focus("#easel")
            before = sum(person.actions.values())
            left.append(person.frame(truth, index + 1 == len(truths)))
            actions.append(sum(person.actions.values()) - before)
            page.keyboard.press("Enter")
        seconds = time.monotonic() - began
        context.close()
    return {
        "labels": left,
        "result": {
            **measures(left, truths),
            "actions": person.actions,
            "actions a frame": actions,
            "median": statistics.median(actions),
            "mean": round(statistics.mean(actions), 2),
            "entries of the list": len(json.loads(erase.read_text())),
            "seconds of the script": round(seconds),
        },
    }


def run(args: argparse.Namespace) -> int:
    import cv2

    from vsod_models.data import open_dataset
    from vsod_models.data.records import Records
    from vsod_models.labels.coarse import make_labels

    records = open_dataset("davis16", args.data, "train").of_sequences([args.sequence])
    records = Records(records.dataset, records.split, list(records)[: args.frames])
    truths = []
    for record in records:
        mask = record.read_mask()
        assert mask is not None
        truths.append(mask.astype(bool))
    document = measure.record("correct", torch.device("cpu"), vars(args) | {"data": "DAVIS-2016"})
    with tempfile.TemporaryDirectory() as folder, browsing(args.browser) as browser:
        labels = Path(folder) / "labels"
        make_labels(records, labels)
        coarse = [
            cv2.imread(str(labels / args.sequence / f"{r.name}.png"), cv2.IMREAD_GRAYSCALE) > 127
            for r in records
        ]
        document["before"] = measures(coarse, truths)
        for name, tools in (("clicks alone", False), ("clicks, boxes, carried on", True)):
            cleaned = clean(browser, labels, args, truths, tools)
            document[name] = cleaned["result"]
            print(name, {k: v for k, v in document[name].items() if k != "actions a frame"})
            erase = labels.with_name(f"erase-{tools}.json")
            again = Path(folder) / f"again-{tools}"
            make_labels(records, again, erase_list=erase)  # what the page showed, bit for bit
            for record, shown in zip(records, cleaned["labels"], strict=True):
                file = again / args.sequence / f"{record.name}.png"
                made = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
                if made is None and not shown.any():
                    continue  # all of it was erased
                if made is None or not np.array_equal(made > 127, shown):
                    raise BadInput(f"{record.name}: the command makes another label than the page")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"correct-{args.sequence}.json").write_text(json.dumps(document, indent=1) + "\n")
    print("before", document["before"])
    return 0
