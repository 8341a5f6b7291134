"""How soon the pages of `vsod serve` answer, in a browser that is open already."""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from . import measure
from .correct import browsing, served

METHOD = (
    "starts and first frames by the wall clock of the script; lights and turns by the clock of the "
    "page, from the event to the end of the frame in which the browser painted what came of it"
)
STARTS, MOVES, TURNS = 5, 60, 40
SEQUENCE = 5000  # frames
WATCHED = 10  # seconds of a prediction

LIT = """() => {
    window.seconds = [];
    const easel = document.getElementById("easel");
    easel.addEventListener("pointermove", (event) => {
        const painted = () => seconds.push((performance.now() - event.timeStamp) / 1000);
        requestAnimationFrame(() => setTimeout(painted));
    });
}"""
TURN = """(index) => new Promise((done) => {
    const easel = document.getElementById("easel");
    const began = performance.now();
    new MutationObserver((_, observer) => {
        observer.disconnect();
        requestAnimationFrame(() => setTimeout(() => done((performance.now() - began) / 1000)));
    }).observe(easel, {attributeFilter: ["data-shown"]});
    if (index === null) {
        easel.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
        return;
    }
    const seek = document.getElementById("seek");
    seek.value = index;
    seek.dispatchEvent(new Event("input"));
})"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--out", default="benchmarks/results/serve", help="folder of the result")


def noise(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(H, W, 3) uint8, about as rich as a photograph."""
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def write_labels(folder: Path, width: int, height: int, frames: int, blobs: int) -> list[str]:
    """Frames and labels of so many regions each; gives the arguments of `vsod serve` for them.

    Eight are drawn, and the others are the same files by another name.
    """
    rng = np.random.default_rng(0)
    images, labels = folder / "clips" / "JPEGImages" / "480p" / "one", folder / "labels" / "one"
    for path in (images, labels, folder / "clips" / "ImageSets" / "480p"):
        path.mkdir(parents=True)
    across = 8
    step = width // across
    for t in range(frames):
        image, label = images / f"{t:05d}.jpg", labels / f"{t:05d}.png"
        if t >= 8:
            os.link(images / f"{t % 8:05d}.jpg", image)
            os.link(labels / f"{t % 8:05d}.png", label)
            continue
        mask = np.zeros((height, width), np.uint8)
        for n in range(blobs):
            centre = (n % across * step + step // 2 + t, n // across * step + step // 2)
            cv2.circle(mask, centre, step * 2 // 5, 255, -1)
        cv2.imwrite(str(image), noise(rng, width, height), [cv2.IMWRITE_JPEG_QUALITY, 90])
        cv2.imwrite(str(label), mask)
    names = [f"one/{t:05d}" for t in range(frames)]
    truth = folder / "clips" / "Annotations" / "480p" / "one"  # has to be there
    truth.parent.mkdir(parents=True)
    truth.symlink_to(labels)
    lines = [f"/JPEGImages/480p/{n}.jpg /Annotations/480p/{n}.png\n" for n in names]
    (folder / "clips" / "ImageSets" / "480p" / "train.txt").write_text("".join(lines))
    manifest = {
        "dataset": "davis16", "split": "train", "skipped": {},
        "frames": {name: {"erased": []} for name in names},
    }  # fmt: skip
    (folder / "labels" / "manifest.json").write_text(json.dumps(manifest))
    return ["--labels", str(folder / "labels"), "--data", str(folder / "clips")]


def write_film(path: Path, width: int = 1280, height: int = 720, frames: int = 250) -> None:
    rng = np.random.default_rng(0)
    ground = noise(rng, width, height) // 2
    film = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25, (width, height))
    for t in range(frames):
        frame = ground.copy()
        cv2.circle(frame, (200 + 3 * t, height // 2), height // 5, (40, 60, 230), -1)
        film.write(frame)
    film.release()


def summed(seconds: list[float]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(seconds), 4),
        "largest": round(max(seconds), 4),
        "count": len(seconds),
    }


def starts(browser: Any) -> dict[str, Any]:
    """Seconds from the command to the page with its models in it."""
    seconds = []
    for _ in range(STARTS):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        page = browser.new_page()
        command = [sys.executable, "-m", "vsod_models.cli", "serve", "--no-open"]
        began = time.monotonic()
        process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        while True:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.005)
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#model option", state="attached")
        seconds.append(time.monotonic() - began)
        page.close()
        process.terminate()
        process.wait()
    return summed(seconds)


def lights(browser: Any, folder: Path) -> dict[str, Any]:
    """Seconds from the pointer to the region lit, on 1920x1080 frames with 32 regions."""
    with served(*write_labels(folder, 1920, 1080, 2, 32)) as address:
        page = browser.new_page(viewport={"width": 1600, "height": 1000}, bypass_csp=True)
        page.goto(address)
        page.wait_for_selector("#easel[data-shown]")
        page.wait_for_timeout(500)
        page.evaluate(LIT)
        box = page.locator("#easel").bounding_box()
        for n in range(MOVES):
            x, y = n * 3 % 8, n % 4
            page.mouse.move(
                box["x"] + box["width"] * (x + 0.5) / 8,
                box["y"] + box["width"] * (y + 0.5) / 8,
            )
            page.wait_for_timeout(40)
        seconds = page.evaluate("seconds")
        page.close()
    return summed(seconds)


def turns(browser: Any, folder: Path) -> dict[str, Any]:
    """Seconds to the next frame of a long sequence, and to one far away."""
    with served(*write_labels(folder, 854, 480, SEQUENCE, 12)) as address:
        page = browser.new_page(viewport={"width": 1600, "height": 1000}, bypass_csp=True)
        began = time.monotonic()
        page.goto(address)
        page.wait_for_selector("#easel[data-shown]")
        opened = time.monotonic() - began
        page.wait_for_timeout(1000)
        following, far = [], []
        for _ in range(TURNS):
            following.append(page.evaluate(TURN, None))
            page.wait_for_timeout(200)
        for n in range(5):
            far.append(page.evaluate(TURN, 1000 * n + 500))
        page.close()
    return {"opened": round(opened, 3), "next": summed(following), "far": summed(far)}


def works(browser: Any, film: Path) -> dict[str, Any]:
    """Seconds from the button to the first processed frame shown, and how many of them are."""
    with served() as address:
        page = browser.new_page(viewport={"width": 1280, "height": 800}, bypass_csp=True)
        page.goto(address)
        page.set_input_files("#file", str(film))
        page.wait_for_selector("#run:enabled", timeout=60_000)
        page.wait_for_timeout(4000)  # the model's libraries load while the page is looked at
        began = time.monotonic()
        page.click("#run")
        page.wait_for_selector("[aria-label$='the result right']", timeout=60_000)
        first = time.monotonic() - began
        page.wait_for_timeout(1000 * WATCHED)
        shown = page.evaluate("""new Set(performance.getEntriesByType("resource")
            .map((one) => one.name).filter((name) => name.includes("latest.jpg"))).size""")
        processed = int(page.inner_text("#status").split()[0])
        page.click("#cancel")
        page.close()
    return {"first": round(first, 2), "processed": processed, "shown": shown, "seconds": WATCHED}


def run(args: argparse.Namespace) -> int:
    options = {"starts": STARTS, "moves": MOVES, "turns": TURNS, "sequence": SEQUENCE}
    document = measure.record("serve", torch.device("cpu"), options) | {"method": METHOD}
    with tempfile.TemporaryDirectory() as folder, browsing(args.browser) as browser:
        film = Path(folder) / "film.mp4"
        write_film(film)
        document["seconds from the command to the page"] = starts(browser)
        document["seconds to a region lit at 1920x1080"] = lights(browser, Path(folder) / "lit")
        document["seconds to a frame of 5,000"] = turns(browser, Path(folder) / "long")
        document["a prediction at 1280x720"] = works(browser, film)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "serve.json").write_text(json.dumps(document, indent=1) + "\n")
    for name in list(document)[-4:]:
        print(name, document[name])
    return 0
