"""`vsod predict --show` (in a window) and `-o -` (a stream to standard output)."""

import contextlib
import io
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av", reason="the extra `models` is not installed")
pytest.importorskip("cv2", reason="the extra `models` is not installed")
pytest.importorskip("typer", reason="the extra `models` is not installed")

from clips import decode, make_video  # noqa: E402
from commands import refused, vsod  # noqa: E402
from test_live import Bright, pipe, transport_stream  # noqa: E402, F401

from vsod_models.errors import InputError  # noqa: E402
from vsod_models.media.live import Live  # noqa: E402
from vsod_models.media.reading import open_source  # noqa: E402
from vsod_models.prediction import VideoPredictor, predict_file  # noqa: E402

TINY = ("--model", "mssa-tiny", "--device", "cpu")


# ---- standard output


@contextlib.contextmanager
def standard_output(to):
    """Meanwhile standard output goes to this open file, or number of one."""
    kept = os.dup(1)
    os.dup2(to if isinstance(to, int) else to.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@pytest.mark.parametrize("sound", [None, "aac", "flac"])
def test_a_file_as_a_stream_with_its_sound(tmp_path, capsys, sound):
    ending = {"flac": ".mkv"}.get(sound, ".mp4")
    file = make_video(tmp_path / f"clip{ending}", frames=12, sound=sound)
    stream = tmp_path / "stdout"
    with open(stream, "wb") as to, standard_output(to):
        code, out, err = vsod(capsys, "predict", file, "-o", "-", "--as", "mask", *TINY)
    assert code == 0 and out == "", "nothing but the video goes there"
    assert "mssa-tiny" in err and "-: 12 frames, mask" in err
    data = np.frombuffer(stream.read_bytes(), np.uint8)
    assert len(data) % 188 == 0 and (data[::188] == 0x47).all(), "packets of a transport stream"
    frames, times = decode(stream)
    assert len(frames) == 12 and frames[0].shape == (48, 64, 3)
    assert np.diff(times) == pytest.approx(1 / 25)
    with av.open(str(stream)) as container:
        assert [s.codec_context.name for s in container.streams.audio] == ["aac"] * bool(sound)
    again = tmp_path / "again.mp4"  # it is one of our own inputs
    assert predict_file(VideoPredictor(Bright(), "cpu"), open_source(stream), again).frames


def test_each_frame_of_a_stream_leaves_at_once(tmp_path, pipe):  # noqa: F811
    pipe(transport_stream(12))
    stream, seen = tmp_path / "stdout", []

    def progress(done):
        with av.open(io.BytesIO(stream.read_bytes()), format="mpegts") as container:
            seen.append((done, sum(packet.size > 0 for packet in container.demux(video=0))))

    with open(stream, "wb") as to, standard_output(to):
        predict_file(VideoPredictor(Bright(), "cpu"), Live("-"), "-", progress=progress)
    assert seen[-1][0] == 12
    # A reader knows that a frame is whole when the next one begins, or the stream ends.
    assert all(there >= done - 1 for done, there in seen[2:]), seen


def test_a_player_at_the_other_end_of_a_pipe(tmp_path):
    source = open_source(make_video(tmp_path / "clip.mp4", frames=30, sound="aac"))
    reading, writing = os.pipe()
    times = []

    def play():
        with os.fdopen(reading, "rb") as file, av.open(file) as container:
            times.extend(frame.time for frame in container.decode(video=0))

    player = threading.Thread(target=play)
    player.start()
    with standard_output(writing):
        os.close(writing)
        predict_file(VideoPredictor(Bright(), "cpu"), source, "-")
    player.join()
    assert np.diff(times) == pytest.approx([1 / 25] * 29)


def test_a_reader_that_goes_away_is_one_line(tmp_path, capsys):
    make_video(tmp_path / "clip.mp4", frames=12)
    reading, writing = os.pipe()
    os.close(reading)
    with standard_output(writing):
        result = vsod(capsys, "predict", tmp_path / "clip.mp4", "-o", "-", *TINY)
    os.close(writing)
    assert "device cpu" in result[2].splitlines()[0]
    error = "\n".join(result[2].splitlines()[1:]) + "\n"
    refused((result[0], result[1], error), "-: was closed by its reader")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
def test_a_full_disk_behind_standard_output(tmp_path):
    source = open_source(make_video(tmp_path / "clip.mp4", frames=4))
    full = pytest.raises(InputError, match="-: cannot be written: no space left on device")
    with open("/dev/full", "wb") as to, standard_output(to), full:
        predict_file(VideoPredictor(Bright(), "cpu"), source, "-")


def test_what_cannot_go_there(tmp_path, capsys, monkeypatch):
    file = make_video(tmp_path / "clip.mp4", frames=2)
    refused(vsod(capsys, "predict", file, "-o", "-", "--as", "matte"), "-: MPEG-TS has no alpha")
    refused(vsod(capsys, "predict", file), "-o FILE", "--show")
    dataset = ("--dataset", "davis16", "--data", tmp_path)
    refused(vsod(capsys, "predict", *dataset, "-o", "-"), "-: the masks of a dataset")
    refused(vsod(capsys, "predict", *dataset, "--show"), "--show: the masks of a dataset")
    monkeypatch.setattr(os, "isatty", lambda handle: handle == 1)
    refused(vsod(capsys, "predict", file, "-o", "-"), "-: standard output is a terminal")
    monkeypatch.chdir(tmp_path)
    code, out, _ = vsod(capsys, "predict", file, "-o", "./-", *TINY)  # a folder of that name
    assert code == 0 and sorted(os.listdir("./-")) == ["00000.png", "00001.png"], out


# ---- a window


class Glass:
    """A window that nobody sees, which the user closes after so many pictures, or after the first
    one when so many updates brought no other."""

    def __init__(self, pictures=1000, updates=1000):
        self.shown, self.pictures, self.updates, self.idle = [], pictures, updates, 0

    def show(self, picture):
        self.shown.append(picture)
        self.idle = 0
        if len(self.shown) == self.pictures:
            raise KeyboardInterrupt

    def update(self):
        self.idle += len(self.shown) > 0
        if self.idle == self.updates:
            raise KeyboardInterrupt


def test_a_window_shows_what_is_written_and_closing_it_ends_the_output(tmp_path):
    source = open_source(make_video(tmp_path / "clip.mp4", frames=12))
    predictor = VideoPredictor(Bright(), "cpu")
    alone = Glass()
    written = predict_file(predictor, source, None, window=alone)
    assert written.frames == len(alone.shown) == 12 and not written.stopped
    assert alone.shown[0].shape == (48, 64, 3), "an overlay"
    both = Glass(pictures=5)
    written = predict_file(predictor, source, tmp_path / "out", window=both, view="mask")
    assert written.frames == 5 and written.stopped
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_a_window_can_be_closed_while_nothing_comes(tmp_path, pipe):  # noqa: F811
    pipe(transport_stream(40), close=False)
    written = predict_file(
        VideoPredictor(Bright(), "cpu", causal=True), Live("-"), tmp_path / "out.mp4",
        window=Glass(updates=50),
    )  # fmt: skip
    assert written.stopped and len(decode(tmp_path / "out.mp4")[0]) == written.frames > 0


def test_without_a_display_it_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    if sys.platform != "linux":
        pytest.skip("a display is always there")
    file = make_video(tmp_path / "clip.mp4", frames=2)
    refused(vsod(capsys, "predict", file, "--show", "-o", tmp_path / "a.mp4"), "--show needs")
    assert not (tmp_path / "a.mp4").exists()


@pytest.fixture
def screen(tmp_path, monkeypatch):
    """A screen of 640x480 that is a file; gives what reads its pixels, (480, 640, 3) RGB."""
    pytest.importorskip("tkinter", reason="this Python is without tkinter")
    if shutil.which("Xvfb") is None:
        pytest.skip("no Xvfb (Debian: apt install xvfb)")
    reading, writing = os.pipe()
    process = subprocess.Popen(
        ["Xvfb", "-displayfd", str(writing), "-screen", "0", "640x480x24", "-fbdir", tmp_path],
        pass_fds=[writing], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(writing)
    with os.fdopen(reading) as number:
        monkeypatch.setenv("DISPLAY", ":" + number.readline().strip())

    def pixels():
        data = (tmp_path / "Xvfb_screen0").read_bytes()
        header = struct.unpack(">25I", data[:100])
        start, (width, height), line = header[0] + 12 * header[19], header[4:6], header[12]
        rows = np.frombuffer(data, np.uint8, height * line, start).reshape(height, line)
        return rows[:, : 4 * width].reshape(height, width, 4)[:, :, 2::-1]

    yield pixels
    process.terminate()
    process.wait(30)


def test_on_a_screen(screen, tmp_path):
    command = [sys.executable, "-m", "vsod_models.cli", "predict", "-", "--show"]
    process = subprocess.Popen(
        [*command, "--as", "cutout", "--background", "#ff00ff", "--causal", *TINY],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        process.stdin.write(transport_stream(40, (320, 240)))
        process.stdin.flush()
        end = time.monotonic() + 200
        while (screen() == (255, 0, 255)).all(-1).sum() < 1000:  # what is not salient
            assert time.monotonic() < end and process.poll() is None, process.communicate()
            time.sleep(0.1)
        out, err = process.communicate(timeout=100)  # which ends the stream
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert b"window: 40 frames, cutout; " in out and b" ms" in out


WINDOW = """
import numpy as np
from vsod_models.media.window import Window

window = Window("test")
window.show(np.full((100, 200), 90, np.uint8))
window.show(np.full((100, 200, 4), 90, np.uint8))
window.show(np.full((1000, 800, 3), (1, 200, 3), np.uint8))
print(window.label.winfo_width(), window.label.winfo_height())
window.root.tk.eval(window.root.protocol("WM_DELETE_WINDOW"))
try:
    window.update()
except KeyboardInterrupt:
    print("closed")
window.close()
"""


def test_pictures_of_any_kind_fit_the_screen_and_the_window_can_be_closed(screen):
    made = subprocess.run(
        [sys.executable, "-c", WINDOW], capture_output=True, text=True, timeout=100
    )
    assert made.stdout.split() == ["384", "480", "closed"], made.stderr
