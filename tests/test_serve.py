"""`vsod serve` without a browser: who is answered, what is taken, the queue, the downloads."""

import contextlib
import io
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import zipfile
import zlib

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("httpx", reason="the extra `test` is not installed")
pytest.importorskip("av", reason="the extra `models` is not installed")
pytest.importorskip("torchvision", reason="the extra `models` is not installed")

import av
import cv2
import httpx
from browser import Served
from clips import decode, make_video, picture, sound_packets
from fastapi.testclient import TestClient

from vsod_models.cli import main
from vsod_models.errors import InputError
from vsod_models.serve.clips import shown_name
from vsod_models.serve.jobs import Jobs
from vsod_models.serve.server import STATIC, Settings, create_app

HOME = "http://127.0.0.1:8760"


@contextlib.contextmanager
def running(address=HOME, **settings):
    with TestClient(create_app(Settings(["mssa-tiny"], **settings)), address) as client:
        yield client


@pytest.fixture
def client():
    with running() as client:
        yield client


def send(client, data, name="clip.mp4"):
    return client.post("/api/clips", params={"name": name}, content=data)


def ended(client, job):
    for _ in range(600):
        (said,) = [j for j in client.get("/api/jobs").json()["jobs"] if j["id"] == job["id"]]
        if said["state"] not in ("waiting", "running"):
            return said
        time.sleep(0.1)
    raise AssertionError(f"{said} does not end")


def predicted(client, data, name="clip.mp4", **options):
    clip = send(client, data, name).json()
    asked = {"clip": clip["id"], "model": 0, "view": "overlay", **options}
    return ended(client, client.post("/api/jobs", json=asked).json())


def png_header(width, height):
    """A PNG that says how large it is and holds next to nothing."""
    made = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        made += struct.pack(">I", len(data)) + kind + data
        made += struct.pack(">I", zlib.crc32(kind + data))
    return made


@pytest.mark.parametrize("host", ["evil.com", "evil.com:8760", "192.168.1.2:8760", "", "[", "::"])
def test_wrong_host(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1:8760", "localhost:8760", "[::1]:8760"])
def test_right_host(client, host):
    answer = client.get("/", headers={"Host": host})
    assert answer.status_code == 200 and "Drop a video" in answer.text
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.com"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "https://127.0.0.1:8760"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},  # another port of this machine
    ],
)
def test_other_sites_are_turned_away(client, headers):
    for method, path in (("POST", "/api/example"), ("GET", "/api/jobs"), ("POST", "/api/clips")):
        assert client.request(method, path, headers=headers).status_code == 403
    assert not client.app.state.clips.of


def test_own_page_and_links_to_it(client):
    own = {"Origin": HOME, "Sec-Fetch-Site": "same-origin"}
    assert client.get("/api/jobs", headers=own).status_code == 200
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


def test_token():
    address = "http://10.0.0.5:8760"
    with running(address, host="0.0.0.0", token="correct horse") as client:
        for path in ("/", "/page.js", "/api/about", "/?token=wrong", "/?token="):
            answer = client.get(path, follow_redirects=False)
            assert answer.status_code == 401 and "token" in answer.text
        assert client.post("/api/example").status_code == 401
        bearer = {"Authorization": "Bearer correct horse"}
        assert client.get("/api/about", headers=bearer).status_code == 200
        answer = client.get("/?token=correct horse", follow_redirects=False)
        assert answer.status_code == 303 and answer.headers["location"] == "/"
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert client.get("/api/about").status_code == 200  # by its cookie
        assert client.get("/", headers={"Host": "rebound.evil.com"}).status_code == 421


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "example.org", "::"])
def test_other_machines_need_a_token(host):
    with pytest.raises(InputError, match=r"^host .* needs a token: everybody"):
        Settings(["mssa-tiny"], host)
    with pytest.raises(InputError, match="8 characters"):
        Settings(["mssa-tiny"], host, token="short")


@pytest.mark.parametrize(
    "given, shown",
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("/etc/cron.d/x.mp4", "x.mp4"),
        ("..", "clip"),
        ("", "clip"),
        ("a\0b\nc.mp4", "a_b_c.mp4"),
        ('x";y.mp4', "x__y.mp4"),
        ("Été 1.mp4", "Été 1.mp4"),
    ],
)
def test_names_are_never_paths(client, given, shown):
    assert shown_name(given) == shown
    data = cv2.imencode(".png", picture(0))[1].tobytes()
    said = send(client, data, given).json()
    assert said["name"] == shown
    path = client.app.state.clips.of[said["id"]].path
    assert path.name == "source.png" and client.app.state.folder in path.parents


@pytest.mark.parametrize("path", ["/../server.py", "/%2e%2e/server.py", "/..%2fserver.py"])
def test_no_files_but_the_page(client, path):
    assert client.get(path).status_code == 404
    assert (STATIC.parent / "server.py").exists()


def test_upload_too_large():
    def parts():  # its length is not said
        yield from [bytes(2**19)] * 5

    with running(max_mb=1) as client:
        for content in (bytes(2**20 + 1), parts()):
            answer = send(client, content)
            assert answer.status_code == 413 and "at most 1 MB" in answer.text
        assert client.post("/api/jobs", content=bytes(2**20 + 1)).status_code == 413
        assert not list((client.app.state.folder / "clips").glob("*"))


def test_decompression_bomb(client):
    for width, height in ((9000, 9000), (60000, 60000)):
        bomb = png_header(width, height)
        assert len(bomb) < 2000
        answer = send(client, bomb, "bomb.png")
        assert answer.status_code == 400 and "megapixels" in answer.json()["error"]
    assert not list((client.app.state.folder / "clips").glob("*"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a video at all",
        b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
)
def test_what_is_no_clip(client, data):
    answer = send(client, data, "holiday.mp4")
    assert answer.status_code == 400
    said = answer.json()["error"]
    assert said == "holiday.mp4: neither a picture nor a video that can be read"
    assert not list((client.app.state.folder / "clips").glob("*"))


def test_corrupt_files_are_told_as_the_command_does(client, tmp_path):
    whole = make_video(tmp_path / "whole.mp4", 20).read_bytes()
    for data in (whole[: len(whole) // 2], whole[:40] + bytes(500)):
        said = send(client, data, "film.mp4").json()["error"]
        assert said.startswith("film.mp4: ") and str(tmp_path) not in said
    cut = make_video(tmp_path / "whole.mkv", 90).read_bytes()
    job = predicted(client, cut[: len(cut) // 2], "film.mkv")
    assert job["state"] == "failed" and job["error"].startswith("film.mkv: ")
    assert "cut off" in job["error"] and "/" not in job["error"]
    assert not list((client.app.state.folder / "jobs").glob("*"))


def test_what_is_left_of_a_job_is_gone_when_it_is_over(client, tmp_path, monkeypatch):
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: (time.sleep(0.5), remove(*a, **k)))
    cut = make_video(tmp_path / "whole.mkv", 90).read_bytes()
    job = predicted(client, cut[: len(cut) // 2], "film.mkv")
    assert job["state"] == "failed" and job["error"]
    assert not list((client.app.state.folder / "jobs").glob("*"))


def test_video_to_every_download(client, tmp_path):
    film = make_video(tmp_path / "in.mp4", 8, sound="aac")
    job = predicted(client, film.read_bytes(), "my film.mp4")
    assert job["state"] == "done" and job["done"] == job["total"] == 8
    assert "device cpu" in job["runs_on"] and "on backend" in job["runs_on"]
    preview = tmp_path / "preview.mp4"
    answer = client.get(f"/api/jobs/{job['id']}/file", headers={"Range": "bytes=0-"})
    assert answer.status_code == 206  # browsers seek by ranges
    preview.write_bytes(answer.content)
    frames, _ = decode(preview)
    assert len(frames) == 8 and frames[0].shape == (96, 64, 3)  # the frame above the overlay
    assert sound_packets(preview)
    for view, form in (
        ("overlay", "mp4"), ("matte", "mov"), ("matte", "webm"), ("cutout", "gif"), ("mask", "png"),
    ):  # fmt: skip
        asked = {"view": view, "format": form}
        file = ended(client, client.post(f"/api/jobs/{job['id']}/files", json=asked).json())
        assert file["state"] == "done", file
        answer = client.get(f"/api/jobs/{file['id']}/file")
        ending = "zip" if form == "png" else form
        assert f"my%20film-{view}.{ending}" in answer.headers["content-disposition"]
        if form == "png":
            with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
                assert archive.namelist() == [f"{t:05d}.png" for t in range(8)]
            continue
        made = tmp_path / f"made.{form}"
        made.write_bytes(answer.content)
        assert len(decode(made)[0]) == 8
        assert form == "gif" or sound_packets(made)
    asked = {"view": "matte", "format": "mp4"}
    file = ended(client, client.post(f"/api/jobs/{job['id']}/files", json=asked).json())
    assert file["state"] == "failed" and "made.mp4: .mp4 has no alpha" in file["error"]


def test_masks_are_those_of_the_command(client, tmp_path):
    from vsod_models.media.reading import open_source
    from vsod_models.prediction import VideoPredictor, predict_file
    from vsod_models.zoo import load_model

    film = make_video(tmp_path / "in.mp4", 6)
    predictor = VideoPredictor(load_model("mssa-tiny"), "cpu", precision="auto", crf="dss")
    predict_file(predictor, open_source(film), tmp_path / "masks", view="mask")
    job = predicted(client, film.read_bytes(), crf="dss", view="mask")
    asked = {"view": "mask", "format": "png"}
    file = ended(client, client.post(f"/api/jobs/{job['id']}/files", json=asked).json())
    with zipfile.ZipFile(io.BytesIO(client.get(f"/api/jobs/{file['id']}/file").content)) as archive:
        for name in archive.namelist():
            made = cv2.imdecode(np.frombuffer(archive.read(name), np.uint8), 0)
            assert np.array_equal(made, cv2.imread(str(tmp_path / "masks" / name), 0))


def test_a_picture(client):
    data = cv2.imencode(".jpg", picture(0, (65, 47)))[1].tobytes()
    job = predicted(client, data, "dog.jpg", view="cutout")
    assert job["state"] == "done" and job["clip"]["picture"]
    shown = cv2.imdecode(
        np.frombuffer(client.get(f"/api/jobs/{job['id']}/file").content, np.uint8), 1
    )
    assert shown.shape[1] == 64 and shown.shape[0] % 2 == 0
    asked = {"view": "matte", "format": "png"}
    file = ended(client, client.post(f"/api/jobs/{job['id']}/files", json=asked).json())
    answer = client.get(f"/api/jobs/{file['id']}/file")
    made = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_UNCHANGED)
    assert made.shape == (47, 65, 4) and "dog-matte.png" in answer.headers["content-disposition"]


def test_queue_and_cancel(client, tmp_path, monkeypatch):
    go_on, there = Jobs._go_on, threading.Event()

    def wait_in_the_middle(self, job, step=1):
        if job.done == 3:
            there.set()
            job.stop.wait(240)
        go_on(self, job, step)

    monkeypatch.setattr(Jobs, "_go_on", wait_in_the_middle)
    clip = send(client, make_video(tmp_path / "in.mp4", 9).read_bytes()).json()
    asked = {"clip": clip["id"], "model": 0, "view": "mask"}
    first, second, third = (client.post("/api/jobs", json=asked).json() for _ in range(3))
    client.post(f"/api/jobs/{second['id']}/cancel")
    assert ended(client, second)["state"] == "cancelled"  # while the first one runs
    assert there.wait(240)
    shown = client.get(f"/api/jobs/{first['id']}/latest.jpg")
    assert shown.headers["content-type"] == "image/jpeg"
    states = [job["state"] for job in client.get("/api/jobs").json()["jobs"]]
    assert states == ["running", "cancelled", "waiting"]
    assert client.get(f"/api/jobs/{first['id']}/file").status_code == 409
    files = client.post(f"/api/jobs/{first['id']}/files", json={"view": "mask", "format": "gif"})
    assert files.status_code == 409
    client.post(f"/api/jobs/{first['id']}/cancel")
    said = ended(client, first)
    assert said["state"] == "cancelled" and said["done"] == 3
    client.delete(f"/api/jobs/{third['id']}")
    assert [job["id"] for job in client.get("/api/jobs").json()["jobs"]] == [
        first["id"], second["id"],
    ]  # fmt: skip
    for job in (first, second):
        client.delete(f"/api/jobs/{job['id']}")
    assert not client.app.state.clips.of
    assert client.get(f"/api/jobs/{first['id']}/latest.jpg").status_code == 404


def test_bad_requests(client):
    clip = client.post("/api/example").json()
    right = {"clip": clip["id"], "model": 0, "view": "mask"}
    for wrong in (
        {"model": 7}, {"model": "/etc"}, {"model": -1}, {"model": True}, {"view": "side-by-side"},
        {"view": "../x"}, {"crf": "x"},
    ):  # fmt: skip
        answer = client.post("/api/jobs", json=right | wrong)
        assert answer.status_code == 400 and next(iter(wrong)) in answer.json()["error"]
    assert client.post("/api/jobs", json=right | {"clip": "x"}).status_code == 404
    for content in (b"{", b"3", b"\xff"):
        assert client.post("/api/jobs", content=content).status_code == 400
    assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404


def test_nothing_stays():
    with running() as client:
        folder = client.app.state.folder
        client.post("/api/example")
        assert list((folder / "clips").glob("*/source.mp4"))
    assert not folder.exists()


def test_what_a_killed_server_left_goes_with_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def start():
        server = Served(stderr=subprocess.PIPE)
        about = httpx.get(server.address + "api/about", timeout=60).json()
        assert about["models"][0] == "vsod-mobile"
        return server

    with start() as killed:
        httpx.post(killed.address + "api/example", timeout=60)
        killed.process.kill()
        killed.process.wait()
    (left,) = tmp_path.iterdir()
    assert list(left.glob("clips/*/source.mp4"))
    with start() as server:
        (own,) = tmp_path.iterdir()
        assert own != left
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 130
        assert server.process.stderr.read() == "vsod: stopped: what was not saved is gone\n"
    assert not list(tmp_path.iterdir())


def test_videos_are_opened_as_containers_only(client, tmp_path, monkeypatch):
    film, opened, kinds = make_video(tmp_path / "in.mp4", 3).read_bytes(), av.open, []

    def spied(*arguments, container_options=None, **options):
        kinds.append((container_options or {}).get("format_whitelist", "any"))
        return opened(*arguments, container_options=container_options, **options)

    monkeypatch.setattr(av, "open", spied)
    assert send(client, film).status_code == 200
    described = b"G\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n"
    assert send(client, described, "stream.ts").status_code == 400  # SDP: where to listen
    assert kinds and all("mov" in kind and "sdp" not in kind for kind in kinds)


def test_clips_that_nobody_uses_go(client):
    data = cv2.imencode(".png", picture(0))[1].tobytes()
    used = predicted(client, data, "used.png")["clip"]["id"]
    sent = [send(client, data, f"{n}.png").json()["id"] for n in range(8)]
    assert list(client.app.state.clips.of) == [used, *sent[-5:]]
    assert len(list((client.app.state.folder / "clips").iterdir())) == 6


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 needs --token: everybody who reaches"),
        (["--host", "0.0.0.0", "--token", "short"], "--token has to be at least 8"),
        (["--max-mb", "0"], "--max-mb must be above 0"),
        (["--model", "nothing"], "--model nothing: neither a folder or checkpoint nor a shipped"),
        (["--labels", "nothing"], "--labels nothing: not a folder of `vsod label coarse`"),
        (["--data", "nothing"], "--data, --dataset, --split and --erase go with --labels"),
        (["--port", "99999"], "host 127.0.0.1, port 99999: "),
    ],
)
def test_the_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--no-open", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit):
            main(["serve", "--no-open", "--port", port])
        assert f"port {port}: address already in use" in capsys.readouterr().err


def test_labels_that_cannot_be_read_end_the_server(tmp_path, capsys):
    (tmp_path / "manifest.json").write_text(
        '{"dataset": "folder", "split": "train", "frames": {}, "skipped": {}}'
    )
    arguments = ["--port", "0", "--labels", str(tmp_path), "--data", str(tmp_path / "none")]
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--no-open", *arguments])
    assert stopped.value.code == 2 and str(tmp_path / "none") in capsys.readouterr().err


def test_a_clip_that_a_job_uses_outlives_the_other_jobs(client, tmp_path):
    job = predicted(client, make_video(tmp_path / "in.mp4", 3).read_bytes())
    asked = {"clip": job["clip"]["id"], "model": 0, "view": "mask"}
    other = ended(client, client.post("/api/jobs", json=asked).json())
    client.delete(f"/api/jobs/{job['id']}")
    file = client.post(f"/api/jobs/{other['id']}/files", json={"view": "mask", "format": "gif"})
    assert ended(client, file.json())["state"] == "done"
