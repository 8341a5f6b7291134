"""Live input: a camera, a stream through a pipe, RTSP; what stops, stutters and changes size."""

import functools
import io
import os
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

av = pytest.importorskip("av", reason="the extra `models` is not installed")
pytest.importorskip("cv2", reason="the extra `models` is not installed")
pytest.importorskip("typer", reason="the extra `models` is not installed")
rich_console = pytest.importorskip("rich.console", reason="the extra `models` is not installed")

from clips import decode, make_video, picture  # noqa: E402
from commands import refused, vsod  # noqa: E402
from test_prediction import Windowed, as_input, clip  # noqa: E402

from vsod_models.cli.progress import frames_progress  # noqa: E402
from vsod_models.errors import InputError  # noqa: E402
from vsod_models.media import live  # noqa: E402
from vsod_models.media.live import Live, is_live  # noqa: E402
from vsod_models.media.reading import open_source  # noqa: E402
from vsod_models.prediction import VideoPredictor, predict_file  # noqa: E402


def transport_stream(frames, size=(64, 48), start=0):
    """MPEG-TS of `picture`s at 25 frames/s, each decodable as soon as it comes."""
    made = io.BytesIO()
    with av.open(made, "w", format="mpegts") as container:
        video = container.add_stream("mpeg2video", rate=25)
        video.width, video.height, video.pix_fmt = (*size, "yuv420p")
        video.gop_size = 1
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(index, size), format="rgb24")
            frame.pts, frame.time_base = start + index, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return made.getvalue()


@pytest.fixture
def pipe(monkeypatch):
    """Standard input that a thread feeds, piece by piece with a pause after each; gives `feed`."""
    reading, writing = os.pipe()
    kept = os.dup(0)
    os.dup2(reading, 0)
    os.close(reading)
    threads = []

    def feed(data, pieces=1, pause=0.0, close=True):
        def work():
            step = -(-len(data) // pieces)
            for at in range(0, len(data), step):
                os.write(writing, data[at : at + step])
                time.sleep(pause)
            if close:
                os.close(writing)

        threads.append(threading.Thread(target=work, daemon=True))
        threads[-1].start()

    yield feed
    os.dup2(kept, 0)
    os.close(kept)
    for thread in threads:
        thread.join(10)


class Bright(Windowed):
    clip_length = 3


def test_the_names_that_are_no_files(tmp_path, monkeypatch):
    for name in ("-", "camera:0", "rtsp://host/path", "rtsps://host"):
        assert is_live(name)
    for name in ("./camera:0", "./-", "rtsp.mp4", "http://host/a.mp4", "camera"):
        assert not is_live(name)
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "a.mp4", frames=3)
    os.rename("a.mp4", "camera:0")
    assert open_source("./camera:0").frames == 3


def test_a_stream_through_a_pipe_is_masked_as_the_file_is(tmp_path, pipe):
    data = transport_stream(12)
    (tmp_path / "clip.ts").write_bytes(data)
    pipe(data, pieces=6, pause=0.02)
    source = Live("-")
    written = predict_file(VideoPredictor(Bright(), "cpu"), source, tmp_path / "out", view="mask")
    assert written.frames == 12 and not written.stopped
    assert re.fullmatch(r"\d+\.\d frames/s, latency \d+ ms, at most \d+ ms", written.pace)
    predict_file(
        VideoPredictor(Bright(), "cpu"), open_source(tmp_path / "clip.ts"), tmp_path / "file",
        view="mask",
    )  # fmt: skip
    for file in sorted((tmp_path / "file").iterdir()):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_the_newest_frame_wins_when_the_model_is_slower(tmp_path, pipe, monkeypatch):
    """A model that is at the first frame until all 50 have come goes on with the last of them."""
    decoded, begun, masked = Live._decoded, threading.Event(), []

    def first_alone(source):
        for number, frame in enumerate(decoded(source)):
            if number:
                begun.wait(60)
            yield frame

    class Slow(Bright):
        def encode(self, frames):
            begun.set()
            end = time.monotonic() + 60
            while source.dropped < 48 and time.monotonic() < end:
                time.sleep(0.01)
            return super().encode(frames)

    monkeypatch.setattr(Live, "_decoded", first_alone)
    pipe(transport_stream(50), pieces=50)
    source = Live("-", drop=True)
    source.written = lambda frame: masked.append(frame.time)
    predictor = VideoPredictor(Slow(), "cpu", causal=True)
    written = predict_file(predictor, source, tmp_path / "out.mp4", view="mask")
    assert source.dropped == 48 and written.frames == 2
    assert "-: 48 frames left out for newer ones" in written.notes
    assert masked == pytest.approx([0, 49 / 25])
    assert decode(tmp_path / "out.mp4")[1] == pytest.approx(masked)


class Ticking:
    """A clock that the model moves, 5 frames of the source each time that it is called.

    Whoever is done waits for the others, so that the times are the same however fast threads run.
    """

    def __init__(self, monkeypatch):
        self.now, self.going = 0.0, True
        self.comes, self.asked, self.written = queue.Queue(), queue.Queue(), queue.Queue()
        monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: self.now))
        decoded = Live._decoded

        def paced(source):
            for frame in decoded(source):
                self.asked.put(True)  # those before are where they wait for the model
                self.comes.get(timeout=60)
                yield frame
            self.asked.put(False)

        monkeypatch.setattr(Live, "_decoded", paced)
        self.comes.put(0)
        self.written.put(0)

    def work(self):
        self.written.get(timeout=60)
        if self.now == 0:
            self.asked.get(timeout=60)
            self.going = self.asked.get(timeout=60)
        for _ in range(5):
            self.now += 0.04
            if self.going:
                self.comes.put(0)
                self.going = self.asked.get(timeout=60)


def test_latency_stays_the_same_when_the_model_is_slower(tmp_path, pipe, monkeypatch):
    """A frame each 40 ms, a model that takes 200: to the end, every mask is 200 ms old."""
    clock = Ticking(monkeypatch)

    class Slow(Bright):
        def encode(self, frames):
            clock.work()
            return super().encode(frames)

    pipe(transport_stream(51))
    source = Live("-", drop=True)
    written = predict_file(
        VideoPredictor(Slow(), "cpu", causal=True), source, tmp_path / "out.mp4", view="mask",
        progress=clock.written.put,
    )  # fmt: skip
    assert source.latencies == {200: 11} and source.dropped == 40
    assert written.pace == "5.0 frames/s, latency 200 ms, at most 200 ms"
    times = decode(tmp_path / "out.mp4")[1]
    assert times == pytest.approx([index / 5 for index in range(11)])


def test_the_bar_says_how_fast_and_how_late(monkeypatch):
    screen = io.StringIO()
    terminal = functools.partial(rich_console.Console, file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(rich_console, "Console", terminal)
    with frames_progress(None, lambda: ", latency 80 ms") as done:
        done(3)
    assert re.search(r"3/\?.* [\d.]+ frames/s, latency 80 ms", screen.getvalue())


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_causal_window_sees_no_frame_that_is_to_come(count):
    frames, model = clip(count), Windowed()
    predictor = VideoPredictor(model, "cpu", causal=True)
    taken = []

    def one_by_one():
        for frame in frames:
            taken.append(frame)
            yield frame

    results = predictor.stream(Handed(one_by_one()))
    for index, result in enumerate(results):
        assert len(taken) == index + 1, "the mask comes before the next frame does"
        window = as_input([frames[max(0, index - back)] for back in (4, 3, 2, 1, 0)])
        logits = model.decode(model.encode(window), window.shape[-2:])[0, -1, 0]
        np.testing.assert_allclose(result.saliency, logits.sigmoid().numpy(), rtol=0, atol=1e-6)
    assert index + 1 == count and predictor.model.encoded == count
    assert predictor.record()["causal"] is True


class Handed(Live):
    """Arrays in a live source's place."""

    def __init__(self, frames):
        self.frames_given = frames

    def __iter__(self):
        return iter(self.frames_given)


def test_a_camera_is_a_device_of_ffmpeg(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        live, "CAMERAS", {"linux": ("lavfi", "testsrc=size=64x48:rate=25,trim=end_frame={}0")}
    )
    monkeypatch.setattr(live.sys, "platform", "linux")
    code, out, err = vsod(capsys, "predict", "camera:1", "-o", tmp_path / "out.mp4", "--model",
                          "mssa-tiny", "--device", "cpu", "--causal")  # fmt: skip
    assert code == 0, err
    assert re.search(r"out.mp4: 10 frames, overlay; \d+\.\d frames/s, latency \d+ ms", out)
    assert len(decode(tmp_path / "out.mp4")[0]) == 10


def test_a_source_that_changes_size_is_brought_to_the_first_one(tmp_path, pipe):
    pipe(transport_stream(5) + transport_stream(5, (96, 64), start=5))
    source = Live("-")
    written = predict_file(VideoPredictor(Bright(), "cpu"), source, tmp_path / "out.mp4")
    assert written.frames >= 9 and source.scaled >= 4
    assert {frame.shape for frame in decode(tmp_path / "out.mp4")[0]} == {(48, 64, 3)}
    assert any("of another size" in note for note in written.notes)


def test_a_source_that_stutters_and_breaks_off_goes_on_and_ends(tmp_path, pipe):
    data = bytearray(transport_stream(20))
    middle = len(data) // 2
    data[middle : middle + 400] = np.random.default_rng(0).bytes(400)
    pipe(bytes(data[: len(data) * 3 // 4 + 50]), pieces=4, pause=0.3)
    written = predict_file(VideoPredictor(Bright(), "cpu"), Live("-"), tmp_path / "out.mp4")
    assert 8 <= written.frames <= 15
    assert len(decode(tmp_path / "out.mp4")[0]) == written.frames


def test_ctrl_c_keeps_what_is_done_though_nothing_comes_any_more(tmp_path):
    command = [
        sys.executable, "-m", "vsod_models.cli", "predict", "-", "-o", str(tmp_path / "out.mp4"),
        "--model", "mssa-tiny", "--device", "cpu", "--causal",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        process.stdin.write(transport_stream(40))
        process.stdin.flush()
        end = time.monotonic() + 120
        while not any(p.stat().st_size for p in tmp_path.glob(".out-*")):
            assert time.monotonic() < end and process.poll() is None, process.communicate()
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        err = process.stderr.read().decode()
    finally:
        process.kill()
    assert "stopped: " in err and "Traceback" not in err
    assert len(decode(tmp_path / "out.mp4")[0]) > 0


# ---- RTSP


def rtsp_server(data, end=None):
    """Serves MPEG-TS over RTP, interleaved, once, and is silent until `end`; its address."""
    listening = socket.create_server(("127.0.0.1", 0))

    def work():
        connection, _ = listening.accept()
        with connection, connection.makefile("rb") as lines:
            while True:
                request = lines.readline().decode()
                if not request:
                    return
                header = {}
                while (line := lines.readline().decode().strip()) != "":
                    key, _, value = line.partition(":")
                    header[key.lower()] = value.strip()
                answer = ["RTSP/1.0 200 OK", f"CSeq: {header['cseq']}", "Session: 1;timeout=60"]
                body = ""
                if request.startswith("DESCRIBE"):
                    about = ["v=0", "o=- 0 0 IN IP4 127.0.0.1", "s=test", "t=0 0"]
                    body = "\r\n".join([*about, "m=video 0 RTP/AVP 33", ""])
                    answer += ["Content-Type: application/sdp", f"Content-Length: {len(body)}"]
                if request.startswith("SETUP"):
                    answer.append("Transport: RTP/AVP/TCP;unicast;interleaved=0-1")
                connection.sendall(("\r\n".join(answer) + "\r\n\r\n" + body).encode())
                if request.startswith("PLAY"):
                    break
            for number, at in enumerate(range(0, len(data), 7 * 188)):
                part = data[at : at + 7 * 188]
                packet = struct.pack(">BBHII", 0x80, 33, number, number * 3600, 1) + part
                connection.sendall(b"$\0" + struct.pack(">H", len(packet)) + packet)
                time.sleep(0.002)
            if end is not None:
                end.wait(60)

    threading.Thread(target=work, daemon=True).start()
    return f"rtsp://user:secret@127.0.0.1:{listening.getsockname()[1]}/stream"


def test_rtsp(tmp_path):
    source = Live(rtsp_server(transport_stream(30)))
    written = predict_file(VideoPredictor(Bright(), "cpu"), source, tmp_path / "out.mp4")
    assert 28 <= written.frames <= 30
    assert len(decode(tmp_path / "out.mp4")[0]) == written.frames
    assert all("secret" not in note for note in written.notes)


def test_a_source_that_falls_silent_ends(tmp_path, monkeypatch):
    opened = av.open
    monkeypatch.setattr(  # as long to open as it takes, 2 s for a frame
        live.av, "open", lambda *a, timeout=None, **k: opened(*a, timeout=timeout and (60, 2), **k)
    )
    monkeypatch.setattr(live, "SECONDS", 2.0)
    end = threading.Event()
    source = Live(rtsp_server(transport_stream(30), end))
    written = predict_file(VideoPredictor(Bright(), "cpu"), source, tmp_path / "out.mp4")
    end.set()
    assert not written.stopped
    assert len(decode(tmp_path / "out.mp4")[0]) == written.frames > 0
    assert f"{source.name}: stopped: nothing for 2 s" in written.notes, written.notes


def test_what_cannot_be_opened_is_one_line(tmp_path, capsys, pipe, monkeypatch):
    out = ("-o", tmp_path / "out.mp4")
    with socket.socket() as deaf:  # nobody else gets its port meanwhile
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        refused(vsod(capsys, "predict", f"rtsp://me:secret@127.0.0.1:{port}/x", *out),
                f"rtsp://127.0.0.1:{port}/x: cannot be opened")  # fmt: skip
    refused(vsod(capsys, "predict", "camera:99", *out), "camera:99: cannot be opened")
    refused(vsod(capsys, "predict", "camera:../x", *out), "camera: and a number")
    refused(vsod(capsys, "predict", "camera:0", "camera:1", *out), "the only input")
    make_video(tmp_path / "a.mp4", frames=2)
    refused(vsod(capsys, "predict", tmp_path / "a.mp4", *out, "--drop"), "--drop goes with")
    monkeypatch.setattr(os, "isatty", lambda handle: handle == 0)
    refused(vsod(capsys, "predict", "-", *out), "-: standard input is a terminal")
    monkeypatch.undo()
    pipe(b"nothing that is a video" * 100)
    refused(vsod(capsys, "predict", "-", *out), "-: cannot be opened")
    assert not (tmp_path / "out.mp4").exists()


def test_a_stream_without_frames(pipe):
    data = transport_stream(1)
    pipe(data[: 3 * 188])
    with pytest.raises(InputError, match="-: "):
        list(Live("-"))
