"""The Correct page of `vsod serve` in a real browser; what it shows is what the command makes."""

import json
import signal
import time

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("skimage", reason="the extra `models` is not installed")
pytest.importorskip("torchvision", reason="the extra `models` is not installed")

import cv2
from browser import Served, assert_fits_and_has_names, browser, opened  # noqa: F401
from checks_labels import RIGHT, SIZE, SMALL, WRONG, block, labelled_clips, remade
from clips import picture

from vsod_models.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("correct")
    return made, labelled_clips(made)


def serving(folder, *arguments):
    labels, data = str(folder[0] / "labels"), str(folder[0] / "clips")
    return Served("--labels", labels, "--data", data, *arguments)


@pytest.fixture(scope="module")
def served(folder):
    with serving(folder) as server:
        yield server


@pytest.fixture
def page(browser, served, folder):  # noqa: F811
    """The page on an empty list, at its first frame."""
    written(folder).unlink(missing_ok=True)
    with opened(browser, served.address) as page:
        at(page, "one", 0)
        yield page


def written(folder):
    return folder[0] / "labels.erase.json"


def entries(folder):
    return json.loads(written(folder).read_text()) if written(folder).exists() else []


def at(page, sequence, index):
    page.wait_for_selector(f'#easel[data-shown^="{sequence}/{index}/"]')


def wait_until(page, condition):
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        page.wait_for_timeout(20)
    assert condition()


def steps(page, folder, count):
    """Waits until so many entries are written and shown."""
    wait_until(page, lambda: len(entries(folder)) == count)
    sequence, index, _ = page.get_attribute("#easel", "data-shown").rsplit("/", 2)
    address = f"{page.url.split('#')[0]}api/labels/frames?sequence={sequence}"
    key = page.request.get(address).json()[int(index)]["key"]
    page.wait_for_selector(f'#easel[data-shown="{sequence}/{index}/{key}"]')


def command(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0


def screen(page, x, y, size=SIZE):
    """Of a pixel of the frame."""
    box = page.locator("#label").bounding_box()
    scale = min(box["width"] / size[1], box["height"] / size[0])
    left = box["x"] + (box["width"] - scale * size[1]) / 2
    top = box["y"] + (box["height"] - scale * size[0]) / 2
    return left + (x + 0.5) * scale, top + (y + 0.5) * scale


def middle(of, t=0):
    return of[1] + of[3] // 2 + 3 * t, of[0] + of[2] // 2


def drag(page, *places):
    page.mouse.move(*screen(page, *places[0]))
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*screen(page, *place), steps=4)
    page.mouse.up()


def shown(page):
    """The label on the screen, (H, W) bool."""
    found = page.evaluate("""() => {
        const canvas = document.getElementById("label");
        const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return Array.from({length: data.length / 4}, (_, i) => data[4 * i] === 255 ? 1 : 0);
    }""")
    return np.array(found, bool).reshape(SIZE)


def test_click_box_lasso_brush_and_back(page, folder):
    assert shown(page)[block(WRONG)].all()
    page.mouse.move(*screen(page, *middle(WRONG)))
    lit = page.evaluate("""([x, y]) =>
        document.getElementById("marks").getContext("2d").getImageData(x, y, 1, 1).data[3]""",
        list(middle(WRONG)))  # fmt: skip
    assert lit > 0  # the region under the pointer
    page.mouse.click(*screen(page, *middle(WRONG)))
    steps(page, folder, 1)
    assert not shown(page)[block(WRONG)].any() and shown(page)[block(RIGHT)].all()
    page.mouse.click(*screen(page, *middle(WRONG)))  # brings it back
    steps(page, folder, 2)
    assert shown(page)[block(WRONG)].all()
    page.click("text=Box")
    drag(page, (5, 5), (60, 30))
    steps(page, folder, 3)
    page.click("text=Lasso")
    drag(page, (110, 10), (140, 10), (140, 26), (110, 26))
    steps(page, folder, 4)
    page.click("text=Brush")
    page.fill("#radius", "5")
    drag(page, (85, 60), (110, 95))
    steps(page, folder, 5)
    page.click("text=Add instead")
    drag(page, (20, 100), (60, 100))
    steps(page, folder, 6)
    page.click("text=Lasso")
    drag(page, (100, 40), (130, 40), (115, 55))
    steps(page, folder, 7)
    kinds = [
        next(k for k in e if k in ("point", "box", "polygon", "brush")) for e in entries(folder)
    ]
    assert kinds == ["point", "point", "box", "polygon", "brush", "brush", "polygon"]
    assert np.array_equal(shown(page), remade(*folder)["one/00000"])
    page.reload()  # undo across a reload
    at(page, "one", 0)
    before = shown(page)
    for left in (6, 5, 4):
        page.click("#undo")
        steps(page, folder, left)
    assert np.array_equal(shown(page), remade(*folder)["one/00000"])
    for count in (5, 6, 7):
        page.click("#redo")
        steps(page, folder, count)
    assert np.array_equal(shown(page), before)


def test_carry_on_and_stop(page, folder):
    page.mouse.click(*screen(page, *middle(WRONG)))
    steps(page, folder, 1)
    page.click("#carry")
    page.locator("#said", has_text="Carried on to 5 frames").wait_for()
    page.keyboard.press("ArrowRight")
    page.locator("#next").click()
    at(page, "one", 2)
    assert not shown(page)[block(WRONG, 2)].any() and shown(page)[block(RIGHT, 2)].all()
    page.click("#stop")
    steps(page, folder, 2)
    assert shown(page)[block(WRONG, 2)].all()
    labels = remade(*folder)
    assert np.array_equal(shown(page), labels["one/00002"])
    assert not labels["one/00001"][block(WRONG, 1)].any()
    page.click("#skip")
    at(page, "one", 3)
    page.click("#right")
    at(page, "one", 4)
    assert "3 of 12 frames looked over" in page.inner_text("#looked")
    assert remade(*folder)["one/00002"] is None


def test_a_frame_that_comes_late_is_not_shown(browser, served, folder):  # noqa: F811
    written(folder).unlink(missing_ok=True)
    with opened(browser, "about:blank") as page:
        held = []
        page.route("**/image?*index=1", lambda route: held.append(route))
        page.goto(served.address)
        at(page, "one", 0)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        at(page, "one", 2)
        with page.expect_response("**/image?*index=1"):
            held[0].continue_()
        page.wait_for_timeout(300)
        at(page, "one", 2)


def test_keyboard_alone(page, folder):
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "easel":
            break
    page.keyboard.press("r")  # the largest region
    page.keyboard.press("r")
    assert "2 of 3: region of 780 pixels" in page.inner_text("#spoken")
    page.keyboard.press("Space")
    steps(page, folder, 1)
    assert not shown(page)[block(WRONG)].any()
    page.keyboard.press("2")
    for _ in range(2):
        page.keyboard.press("Space")  # a corner
        for _ in range(6):
            page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("Shift+Alt+ArrowDown")
    page.keyboard.press("Escape")
    page.keyboard.press("4")
    page.keyboard.press("a")
    page.keyboard.press("Space")  # the cross
    page.keyboard.press("Space")  # a stroke begins there
    for _ in range(3):
        page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("Space")
    steps(page, folder, 2)
    x, y = SIZE[1] // 2, SIZE[0] // 2
    assert entries(folder)[1]["add"]
    assert entries(folder)[1]["brush"] == [[x, y - 2 * n] for n in range(4)]
    assert shown(page)[y - 6 : y, x].all()
    page.keyboard.press("z")
    steps(page, folder, 1)
    page.keyboard.press("Enter")
    at(page, "one", 1)
    page.keyboard.press("s")
    at(page, "one", 2)
    page.keyboard.press("ArrowLeft")
    at(page, "one", 1)
    assert page.inner_text("#stamp") == "Skipped"


def test_own_clips_corrected_and_learnt_from(browser, tmp_path):  # noqa: F811
    """Masks of a model, ten frames corrected, fine-tuned on them, predicted again."""
    clips, labels = tmp_path / "clips", tmp_path / "labels"
    (clips / "cat" / "masks").mkdir(parents=True)  # nobody drew any
    (clips / "cat" / "images").mkdir()
    for t in range(12):
        cv2.imwrite(str(clips / "cat" / "images" / f"{t:05d}.png"), picture(t, (96, 64)))
    own = ["--data", str(clips), "--split", "train", "--size", "96x64"]
    coarse = ["label", "coarse", "repack", str(clips), "--maps", str(tmp_path / "maps")]
    command("predict", "--dataset", "repack", *own, "-o", str(tmp_path / "maps"))
    command(*coarse, "-o", str(labels))
    with (
        Served("--labels", str(labels), "--data", str(clips)) as server,
        opened(browser, server.address) as page,
    ):
        for t in range(10):
            at(page, "cat", t)
            page.keyboard.press("4")
            page.keyboard.press("a" if t == 0 else "4")
            page.mouse.click(*screen(page, 10 + t, 50, (64, 96)))
            page.locator("#said", has_text="Added.").wait_for()
            page.keyboard.press("Enter")
        at(page, "cat", 10)
        assert "10 of 12 frames looked over" in page.inner_text("#looked")
    mine = tmp_path / "mine"
    listed = str(tmp_path / "labels.erase.json")
    command(*coarse, "-o", str(mine), "--erase", listed, "--only-looked-over")
    assert [path.stem for path in sorted(mine.rglob("*.png"))] == [f"{t:05d}" for t in range(10)]
    assert cv2.imread(str(mine / "cat" / "00003.png"), 0)[50, 13] == 255
    out = tmp_path / "run"
    command(
        "train", "--config", "yours", f"data.roots.repack={clips}", f"data.train.0.labels={mine}",
        f"out={out}", "iterations=2", "checkpoint_every=2", "optimizer.warm_up=0",
        "optimizer.decay=1", "data.workers=0",
        "data.shapes=[{size: [32, 64], clip_length: 3, clips: 1}]",
    )  # fmt: skip
    again = tmp_path / "again"
    command("predict", "--dataset", "repack", *own, "-o", str(again), "--model", str(out / "model"))
    assert len(list(again.rglob("*.png"))) == 12


def test_two_tabs(page, browser, served, folder):  # noqa: F811
    with opened(browser, served.address) as other:
        at(other, "one", 0)
        page.mouse.click(*screen(page, *middle(WRONG)))
        steps(page, folder, 1)
        other.mouse.click(*screen(other, *middle(SMALL)))
        other.locator("#conflict", has_text="changed elsewhere").wait_for()
        assert len(entries(folder)) == 1
        other.click("#reload")
        other.wait_for_selector("#conflict", state="hidden")
        steps(other, folder, 1)
        assert not shown(other)[block(WRONG)].any() and shown(other)[block(SMALL)].all()
        other.mouse.click(*screen(other, *middle(SMALL)))
        steps(other, folder, 2)
        assert np.array_equal(shown(other), remade(*folder)["one/00000"])


def test_killed_in_the_middle(browser, folder):  # noqa: F811
    written(folder).unlink(missing_ok=True)
    with serving(folder) as server, opened(browser, server.address) as page:
        at(page, "one", 0)
        page.mouse.click(*screen(page, *middle(WRONG)))
        steps(page, folder, 1)
        page.click("#carry")
        wait_until(page, lambda: len(entries(folder)) >= 2)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        kept = entries(folder)
        page.keyboard.press("s")  # where the carrying had come to its end nobody else would ask
        page.locator("#wrong", has_text="does not answer").wait_for()
        with serving(folder, "--port", server.address.rstrip("/").rpartition(":")[2]):
            page.reload()
            at(page, "one", 0)
            assert entries(folder) == kept
            assert np.array_equal(shown(page), remade(*folder)["one/00000"])
            page.click("#undo")  # of the carrying
            steps(page, folder, 1)
            page.click("#redo")
            steps(page, folder, len(kept))
            assert entries(folder) == kept


@pytest.mark.parametrize("width, scheme", [(390, "dark"), (1280, "light")])
def test_fits_and_has_names(browser, served, width, scheme):  # noqa: F811
    size = {"width": width, "height": 800}
    with opened(browser, served.address, viewport=size, color_scheme=scheme) as page:
        page.wait_for_selector("#easel[data-shown]")
        assert_fits_and_has_names(page, width)
