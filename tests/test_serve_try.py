"""The Try page of `vsod serve` in a real browser."""

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("av", reason="the extra `models` is not installed")
pytest.importorskip("torchvision", reason="the extra `models` is not installed")

from browser import Served, assert_fits, assert_fits_and_has_names, browser, opened  # noqa: F401
from clips import decode, make_video, sound_packets

PIXEL = """([x, y]) => {
    const canvas = document.getElementById("screen");
    const at = [Math.floor(x * canvas.width), Math.floor(y * canvas.height)];
    return [...canvas.getContext("2d").getImageData(...at, 1, 1).data].slice(0, 3);
}"""


DROP = """async () => {
    const canvas = Object.assign(document.createElement("canvas"), {width: 80, height: 60});
    const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
    const data = new DataTransfer();
    data.items.add(new File([blob], "dog.png"));
    document.getElementById("drop").dispatchEvent(
        new DragEvent("drop", {dataTransfer: data, bubbles: true}));
}"""


@pytest.fixture(scope="module")
def served():
    with Served() as server:
        yield server


@pytest.fixture
def page(browser, served):  # noqa: F811
    with opened(browser, served.address, accept_downloads=True) as page:
        yield page


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("film") / "my film.mp4", 20, (96, 64), sound="aac")


def test_upload_to_played_result(page, film, tmp_path):
    page.set_input_files("#file", str(film))
    page.wait_for_selector("#run:enabled")
    assert "96x64, 20 frames, 25 a second, with sound" in page.inner_text("#clip")
    page.select_option("#view", "mask")
    page.click("#run")
    page.wait_for_selector("[data-format=webm]:enabled")
    assert "20 of 20 frames" in page.inner_text("#status")
    assert "device cpu" in page.inner_text("#runs-on")
    page.wait_for_function("Number(document.getElementById('scrub').value) > 0.2")  # it plays
    page.click("#play")
    page.fill("#scrub", "0.4")
    page.wait_for_function("document.getElementById('clock').value === '0:00.4'")
    page.wait_for_timeout(300)
    page.fill("#edge", "1")
    original = page.evaluate(PIXEL, [0.45, 0.3])
    assert original[0] > 150 and original[2] < 100, original  # the red square
    page.fill("#edge", "0")
    result = page.evaluate(PIXEL, [0.45, 0.3])
    assert max(result) - min(result) < 12, result  # a mask is grey
    page.check("text=Side by side")
    assert page.evaluate(PIXEL, [0.225, 0.3])[0] > 150
    held = []
    page.route("**/files", lambda route: held.append(route))
    page.select_option("#view", "overlay")  # made of the same masks
    assert not page.locator("[data-format]:enabled").count()  # before the server answers
    while not held:
        page.wait_for_timeout(20)
    held[0].continue_()
    page.unroute("**/files")
    page.wait_for_selector("[data-format=webm]:enabled")
    with page.expect_download() as saved:
        page.click("[data-format=mp4]")
    assert saved.value.suggested_filename == "my film-overlay.mp4"
    made = tmp_path / "made.mp4"
    saved.value.save_as(made)
    assert len(decode(made)[0]) == 20 and sound_packets(made)
    page.select_option("#view", "matte")
    page.wait_for_selector("[data-format=mp4]:disabled")


def test_a_drop_before_the_server_answers(browser, served):  # noqa: F811
    with opened(browser, "about:blank") as page:
        held = []
        page.route("**/api/about", lambda route: held.append(route))
        page.goto(served.address)
        while not held:
            page.wait_for_timeout(20)
        page.evaluate(DROP)
        page.wait_for_timeout(200)
        held[0].continue_()
        page.wait_for_selector("#run:enabled")
        assert "dog.png" in page.inner_text("#clip")


# Where everything is that is not text inside of a room of its own, at every frame drawn.
WATCH = """() => {
    const all = [...document.querySelectorAll("header *, #try *")].filter(
        (one) => !one.closest("#drop > *, .told > *, #queue > *, option"));
    window.places = [];
    const look = () => {
        const now = all.map((one) => {
            const {left, top, right} = one.getBoundingClientRect();
            return `${one.tagName} ${one.id} ${left} ${top + scrollY} ${right}`;
        });
        if (String(now) !== String(places[places.length - 1])) places.push(now);
        requestAnimationFrame(look);
    };
    look();
}"""


@pytest.mark.parametrize(
    "width, scale, font",
    [
        (1280, 1, "font-size: 100%"),
        (1280, 1.25, "font: 21px/1.6 serif; letter-spacing: .12em; word-spacing: .16em"),
        (860, 1.1, "font: 13.3px/1.2 monospace"),
        (390, 2.625, "font: 17px/1.45 sans-serif; letter-spacing: .05em"),
    ],
)
def test_nothing_moves_while_it_works(browser, served, tmp_path, width, scale, font):  # noqa: F811
    film = make_video(tmp_path / "film.mp4", 8, (96, 64), sound="aac")
    broken = tmp_path / f"{'a long name ' * 8}.mp4"
    broken.write_bytes(film.read_bytes()[:2000])
    size = {"width": width, "height": 800}
    with opened(browser, served.address, viewport=size, device_scale_factor=scale) as page:
        page.add_style_tag(content=f":root {{{font} !important}}".replace(";", " !important;"))
        page.set_input_files("#file", str(film))
        page.wait_for_selector("#run:enabled")
        page.evaluate(WATCH)
        page.click("#run")
        page.wait_for_selector("[data-format=webm]:enabled")
        assert "device cpu" in page.inner_text("#runs-on")
        page.set_input_files("#file", str(broken))
        page.locator("#error", has_text="a long name").wait_for()
        page.wait_for_function("Number(document.getElementById('scrub').value) > 0.2")  # it plays
        first, *later = page.evaluate("places")
        moved = [(a, b) for now in later for a, b in zip(first, now, strict=True) if a != b]
        assert moved == []
        assert_fits(page, width)


@pytest.fixture(scope="module")
def long_film(tmp_path_factory):
    """What the server is at for a minute or more."""
    return make_video(tmp_path_factory.mktemp("film") / "long.mp4", 6000)


def test_cancel(page, long_film):
    page.set_input_files("#file", str(long_film))
    page.click("#run:enabled")
    page.wait_for_function("document.getElementById('status').textContent.includes('frames/s')")
    page.wait_for_selector("[aria-label='long.mp4: the original left, the result right']")
    picture = page.evaluate("document.getElementById('screen').toDataURL()")
    page.wait_for_function(
        "(seen) => document.getElementById('screen').toDataURL() !== seen", arg=picture
    )  # what is processed is shown while it works
    assert "frames/s" in page.inner_text("#status") and page.locator("#play:disabled").count()
    page.click("#run")
    waiting = page.locator("#queue li", has_text="long.mp4: waiting")
    waiting.wait_for()
    waiting.get_by_role("button", name="Cancel").click()
    running = page.locator("#queue li", has_text="long.mp4: running")
    running.get_by_role("button", name="Cancel").click()
    page.wait_for_function("!/running|waiting/.test(document.getElementById('queue').textContent)")
    assert page.inner_text("#status") == "Cancelled."
    assert not page.locator("#downloads button:enabled").count()


def test_a_corrupt_file(page, film, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(film.read_bytes()[:2000])
    page.set_input_files("#file", str(broken))
    error = page.locator("#error")
    error.filter(has_text="broken.mp4:").wait_for()
    assert str(tmp_path) not in error.inner_text() and "/" not in error.inner_text()
    page.set_input_files("#file", str(film))  # and on it goes
    page.wait_for_selector("#run:enabled")
    assert error.inner_text() == ""


def test_a_dropped_picture(page):
    page.evaluate(DROP)
    page.click("#run:enabled")
    page.wait_for_selector("[data-format=webm]:enabled")
    with page.expect_download() as saved:
        page.click("[data-format=png]")
    assert saved.value.suggested_filename == "dog-overlay.png"


def test_keyboard_alone(page, long_film):
    address = f"{page.url}api/clips?name=example.mp4"
    clip = page.request.post(address, data=long_film.read_bytes()).json()
    page.route("**/api/example", lambda route: route.fulfill(json=clip))  # a longer one

    def tab_to(name):
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == name:
                return
        raise AssertionError(f"no Tab leads to {name}")

    tab_to("example")
    page.keyboard.press("Enter")
    page.wait_for_selector("#run:enabled:focus")  # the next thing to do
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('status').textContent.includes('frames/s')")
    tab_to("cancel")
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('status').textContent === 'Cancelled.'")


@pytest.mark.parametrize("width, scheme", [(390, "light"), (1280, "dark")])
def test_fits_and_has_names(browser, served, width, scheme):  # noqa: F811
    size = {"width": width, "height": 800}
    with opened(browser, served.address, viewport=size, color_scheme=scheme) as page:
        page.wait_for_selector("#model option", state="attached")
        assert_fits_and_has_names(page, width)


def test_nothing_is_loaded_from_elsewhere(browser, served):  # noqa: F811
    with opened(browser, "about:blank", bypass_csp=False) as page:
        asked, told = [], []
        page.on("console", lambda message: told.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served.address)
        page.wait_for_selector("#model option", state="attached")
        page.click("#example")
        page.wait_for_selector("#run:enabled")
        assert asked and all(url.startswith(served.address) for url in asked)
        assert told == []  # such as a breach of the policy
