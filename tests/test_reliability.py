"""What `vsod` promises of input that nobody meant: one line, nothing lost, nothing outside."""

import contextlib
import copy
import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("cv2", reason="the extra `models` is not installed")
pytest.importorskip("typer", reason="the extra `models` is not installed")
pytest.importorskip("torchvision", reason="the extra `models` is not installed")
pytest.importorskip("av", reason="the extra `models` is not installed")
Image = pytest.importorskip("PIL.Image")

from clips import decode, make_video, sound_packets, turn  # noqa: E402
from commands import refused, vsod  # noqa: E402
from trees import davis, image, text  # noqa: E402

from vsod_models.cli import app as application  # noqa: E402
from vsod_models.data import open_dataset  # noqa: E402
from vsod_models.errors import InputError  # noqa: E402
from vsod_models.media import sound  # noqa: E402
from vsod_models.media.reading import open_source  # noqa: E402
from vsod_models.media.writing import open_writer  # noqa: E402
from vsod_models.networks.contract import SaliencyModel  # noqa: E402
from vsod_models.networks.mssa import MSSA  # noqa: E402
from vsod_models.prediction import VideoPredictor  # noqa: E402
from vsod_models.zoo import load_model  # noqa: E402


def snapshot(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


# ---- names


ESCAPES = ["..", "../outside", "/JPEGImages/480p/../00000.jpg", "/JPEGImages/480p/bear/../x.jpg",
           "/", ".", "/JPEGImages/480p/./../../00000.jpg", "a\\..\\b"]  # fmt: skip


@pytest.mark.parametrize("line", ESCAPES)
def test_a_list_that_leads_outside_is_refused_by_every_command(tmp_path, capsys, line):
    root = davis(tmp_path / "set", split="val")
    for out in ("labels", "maps"):  # what `..` in them would be
        image(tmp_path / out / ".." / "00000.png")
    with open(root / "ImageSets/480p/val.txt", "a") as file:
        file.write(f"{line}\n")
    before = snapshot(tmp_path)
    sources = ("--maps", "minimum-barrier")
    for name in ("davis16", "folder"):
        code, out, _ = vsod(capsys, "data", "check", name, root, "--split", "val", "--jobs", 1)
        assert code == 1 and "problem: " in out and "val.txt" in out
        into = ("-o", tmp_path / "labels")
        refused(vsod(capsys, "label", "coarse", name, root, "--split", "val", *into, *sources),
                "val.txt: line 6")  # fmt: skip
        refused(vsod(capsys, "data", "prepare", name, root, tmp_path / "new", "--split", "val",
                     "--partial"), "val.txt: line 6")  # fmt: skip
        refused(vsod(capsys, "predict", "--dataset", name, "--data", root, "-o", tmp_path / "maps",
                     "--overwrite"), "val.txt: line 6")  # fmt: skip
        refused(vsod(capsys, "prior", "make", name, root, "--split", "val", "--cache",
                     tmp_path / "cache"), "val.txt: line 6")  # fmt: skip
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("split", ["../480p/train", "..", "/etc/passwd", ""])
def test_a_split_is_the_name_of_a_list(tmp_path, capsys, split):
    root = davis(tmp_path / "set")
    refused(vsod(capsys, "data", "prepare", "folder", root, tmp_path / "new", "--split", split),
            "split")  # fmt: skip
    assert not (tmp_path / "new").exists()


def test_a_category_of_coco_names_no_folder_outside(tmp_path):
    image(tmp_path / "val2017/1.jpg")
    category = {"id": 1, "name": "../../x"}
    content = {"categories": [category], "images": [], "annotations": []}
    text(tmp_path / "annotations/instances_val2017.json", json.dumps(content))
    with pytest.raises(InputError, match=r"instances_val2017.json: category '../../x'"):
        open_dataset("coco", tmp_path, "val")


def test_names_with_spaces_survive_the_layout(tmp_path, capsys):
    root = davis(tmp_path / "set", (("my clip", 2), ("other", 2)))
    text(root / "ImageSets/480p/train.txt", "my clip\nother\n")
    new = tmp_path / "new"
    code, _, err = vsod(capsys, "data", "prepare", "folder", root, new, "--split", "train")
    assert code == 0, err
    assert set(open_dataset("davis16", new, "train").sequences) == {"my clip", "other"}


# ---- the command itself


def commands(group=None, name=()):
    group = application if group is None else group
    for command in group.registered_commands:
        yield (*name, command.name)
    for inner in group.registered_groups:
        yield from commands(inner.typer_instance, (*name, inner.name))


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_every_help_has_an_example_of_its_command(capsys, command):
    code, out, _ = vsod(capsys, *command, "--help")
    assert code == 0
    assert f"Example: vsod {' '.join(command)} " in " ".join(out.split())


def test_the_command_tells_its_version_and_completes(capsys):
    code, out, _ = vsod(capsys, "--version")
    assert code == 0 and out.startswith("vsod")
    _, out, _ = vsod(capsys, "--help")
    assert "--install-completion" in out


@pytest.mark.parametrize("error, code, words", [
    (MemoryError(), 2, "out of memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes\n#1"), 2,
     "can't allocate memory: 9 bytes"),
    (OSError(28, "No space left on device"), 2, "No space left on device"),
    (KeyError("x"), 70, "KeyError: 'x'; a fault of vsod's own: --debug shows where"),
    (KeyboardInterrupt(), 130, "stopped"),
])  # fmt: skip
def test_whatever_a_command_raises_is_one_line(capsys, monkeypatch, error, code, words):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("vsod_models.data.readers.find_dataset", fails)
    result = vsod(capsys, "data", "check", "davis16", "nowhere")
    assert result[0] == code and result[2].count("\n") == 1
    assert result[2].startswith("vsod: ") and words in result[2]


# ---- runs


RECIPE = """
model: {name: mssa, backbone: vgg11, backbone_options: {width: 0.125}, levels: [8, 16],
  skips: [4], num_heads: [2, 4], dim: 16, depth: 1, feed_forward: 16, decoder_dim: 8,
  clip_length: 2, image_size: [32, 32]}
data: {train: [{dataset: synthetic, options: {clips: 4, frames: 4, size: [40, 40]}}],
  sizes: [[32, 32]], workers: 0}
accelerator: cpu
batch_size: 2
checkpoint_every: 2
"""


def start(recipe, out, *arguments):
    recipe.write_text(RECIPE)
    command = [sys.executable, "-m", "vsod_models.cli", "train", "--config", str(recipe)]
    return subprocess.Popen(
        [*command, f"out={out}", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_training_says_what_it_kept_and_one_folder_takes_one(tmp_path, number):
    pytest.importorskip("lightning")
    pytest.importorskip("skimage")
    first = start(tmp_path / "recipe.yaml", tmp_path / "run", "iterations=1000000")
    deadline = time.monotonic() + 240
    while not (tmp_path / "run/last.ckpt").exists():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.05)
    second = start(tmp_path / "recipe.yaml", tmp_path / "run", "--resume", "iterations=1000000")
    _, err = second.communicate(timeout=240)
    assert second.returncode == 2 and "a training is running in it already" in err
    assert first.poll() is None
    first.send_signal(number)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 130 and "Traceback" not in err, err
    assert err.splitlines()[-1].endswith(
        "last.ckpt is the last checkpoint; --resume goes on from it"
    )
    assert not [p for p in (tmp_path / "run").iterdir() if ".part" in p.name]


def test_sigterm_stops_also_what_a_script_runs_in_the_background():
    """Shells ignore Ctrl-C there; a block that must not be cut short ends first."""
    code = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
from vsod_models.cli.app import add, app, main
from vsod_models.workers import ctrl_c_later

def wait():
    with ctrl_c_later():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), int(sys.argv[1]))
        print("whole")
    print("went on")

add(app, "wait", wait, "wait")
main(["wait"])
"""
    for number, after, exit_code in ((signal.SIGTERM, "", 130), (signal.SIGINT, "went on\n", 0)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(int(number))], capture_output=True, text=True
        )
        assert done.stdout == "whole\n" + after and "Traceback" not in done.stderr
        assert done.returncode == exit_code


def limited(tmp_path, preparation, *arguments):
    """`vsod ...` in a process that runs `preparation` first."""
    lines = [preparation, "from vsod_models.cli import main; import sys", "main(sys.argv[1:])"]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines), *map(str, arguments)],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_disk_that_is_full_at_a_checkpoint_is_one_line(tmp_path):
    """Files end at 64 kB, as they do at a quota."""
    pytest.importorskip("lightning")
    pytest.importorskip("skimage")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))"
    done = limited(tmp_path, limit, "train", "--config", "recipe.yaml", "out=run", "iterations=4")
    assert done.returncode == 2, done
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"vsod: {tmp_path}/run/last.ckpt: cannot be written, is the disk full?"
    ), done.stderr
    assert "Traceback" not in done.stderr
    assert not [p for p in (tmp_path / "run").rglob("*") if ".part" in p.name]
    assert not (tmp_path / "run/last.ckpt").exists()


def test_a_disk_that_is_full_at_the_model_keeps_the_former_one(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    pytest.importorskip("skimage")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    arguments = [f"out={tmp_path / 'run'}", "iterations=2"]
    from safetensors import SafetensorError

    from vsod_models.training.recipe import read_config
    from vsod_models.training.run import train

    config = read_config(tmp_path / "recipe.yaml", arguments)
    before = snapshot(train(config))

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_model", full)
    config.iterations = 4
    with pytest.raises(InputError, match=r"model: cannot be written: .*No space left"):
        train(config, resume=True)
    assert snapshot(tmp_path / "run/model") == before
    assert not [p for p in (tmp_path / "run").iterdir() if ".part" in p.name]


# Root may write everywhere, and so do the tests of many machines: give that right up.
HUMBLE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if os.geteuid() == 0:
    for right in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert libc.prctl(24, right, 0, 0, 0) == 0, ctypes.get_errno()  # out of the bounding set
    if "HUMBLE" not in os.environ:  # which counts from the next program on
        import sys
        os.environ["HUMBLE"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
"""

# Every command that writes, into a folder where it may not; and one that reads what it may not.
READ_ONLY = """
import sys
from vsod_models.cli import main

for line in open(sys.argv[1]):
    print("run", line.strip(), flush=True)
    print("run", line.strip(), file=sys.stderr, flush=True)
    try:
        main(line.split())
    except SystemExit as stop:
        print("code", stop.code, file=sys.stderr, flush=True)
"""


def test_a_folder_where_nothing_may_be_written_is_one_line(tmp_path):
    pytest.importorskip("skimage")
    davis(tmp_path / "set", split="val")
    make_video(tmp_path / "clip.mp4", 3)
    (tmp_path / "locked").mkdir()
    image(tmp_path / "locked/kept.png")
    unreadable = tmp_path / "secret.mp4"
    unreadable.write_bytes((tmp_path / "clip.mp4").read_bytes())
    data = "--dataset folder --data set"
    commands = [
        "predict clip.mp4 -o locked/masks.mp4 --size 32x32",
        "predict clip.mp4 -o locked/new/deep --size 32x32",
        "predict clip.mp4 -o locked --overwrite --size 32x32",
        f"predict {data} -o locked --size 32x32",
        f"eval --pred set/Annotations/480p {data} --workers 1 --json locked/x.json",
        "data synthetic locked/set --clips 1 --val-clips 1 --frames 2 --height 32 --width 32",
        "data prepare davis16 set locked/copy --split val --partial",
        "label coarse folder set -o locked/labels --split val --maps minimum-barrier",
        "example locked/clip.mp4 --seconds 0.1",
        "predict secret.mp4 -o masks.mp4 --size 32x32",
    ]
    (tmp_path / "commands").write_text("\n".join(commands))
    before = snapshot(tmp_path)
    (tmp_path / "locked").chmod(0o555)
    unreadable.chmod(0o000)
    try:
        done = subprocess.run(
            [sys.executable, "-c", HUMBLE + READ_ONLY, "commands"], capture_output=True, text=True,
            cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    finally:
        (tmp_path / "locked").chmod(0o755)
        unreadable.chmod(0o644)
    assert done.returncode == 0, done.stderr
    runs = done.stderr.split("run ")[1:]
    assert len(runs) == len(commands), done.stderr
    for run in runs:
        _, *said, code = run.strip().splitlines()
        assert code == "code 2" and len(said) == 1 and said[0].startswith("vsod: "), run
        assert "locked" in said[0] or "secret" in said[0], run
        assert "permission denied" in said[0].lower(), run
    assert snapshot(tmp_path) == before


def test_a_failing_eval_leaves_no_folder(tmp_path, capsys):
    root = davis(tmp_path / "set", split="val")
    (tmp_path / "maps").mkdir()
    call = ("eval", "--pred", tmp_path / "maps", "--dataset", "folder", "--data", root)
    refused(vsod(capsys, *call, "--json", tmp_path / "new/deep/x.json"))
    assert not (tmp_path / "new").exists()


def test_one_is_not_said_as_several(tmp_path, capsys):
    target = tmp_path / "set"
    sizes = ("--frames", 1, "--height", 32, "--width", 32)
    _, said, _ = vsod(capsys, "data", "synthetic", target, "--clips", 1, "--val-clips", 1, *sizes)
    assert "clips of 1 frame, 32x32" in said
    _, said, _ = vsod(capsys, "data", "check", "folder", target, "--split", "val", "--jobs", 1)
    assert "folder val: 1 sequence, 1 frame, 1 mask\n" in said
    maps = target / "Annotations/480p"
    score = ("eval", "--pred", maps, "--dataset", "folder", "--data", target, "--workers", 1)
    _, said, err = vsod(capsys, *score, "--protocol", "frame")
    assert "Used: 1 frame of 1 sequence." in said, err


# Workers do not get on with their start before the file is there.
HELD = """
import os, sys, time
if any(f"multiprocessing.{kind}" in word for kind in ("spawn", "forkserver")
       for word in sys.orig_argv):
    while not os.path.exists("go"):
        time.sleep(0.01)
"""


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
@pytest.mark.parametrize("command", [
    "data check folder set --split val --jobs 2",
    "eval --pred set/Annotations/480p --dataset folder --data set --workers 2 --json out.json",
])  # fmt: skip
def test_ctrl_c_in_the_middle_of_a_pool_is_one_line(tmp_path, command):
    """It goes to all processes of a terminal, also to those that are just starting."""
    davis(tmp_path / "set", split="val")
    text(tmp_path / "held/sitecustomize.py", HELD)
    path = [str(tmp_path / "held"), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "vsod_models.cli", *command.split()], start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip

    def together():
        """How many processes there are in the session of the command."""
        count = 0
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = status.read_text().rpartition(")")[2].split()
                count += fields[0] != "Z" and fields[3] == str(process.pid)
        return count

    deadline = time.monotonic() + 120
    while together() < 3:  # what tracks or forks them, and the first
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    (tmp_path / "go").touch()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err == "vsod: stopped: what was not finished is not kept\n"
    assert not (tmp_path / "out.json").exists()
    while together():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- pictures


def png(width, height, mode=0):
    """A grey PNG that claims a size, with almost no data."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def broken():
    """name -> bytes that are no picture, though they begin as one."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (90, 20, 30)).save(buffer, "png")
    whole = buffer.getvalue()
    tiff = io.BytesIO()
    Image.new("RGB", (16, 12)).save(tiff, "tiff")
    return {
        "bomb": png(60_000, 60_000), "zero": png(0, 0), "claims": png(5000, 5000),
        "half": whole[: len(whole) // 2], "head": whole[:20], "empty": b"", "text": b"hello",
     "tiff": tiff.getvalue()[:40],
        "jpeg": b"\xff\xd8\xff\xe0" + bytes(50) + b"\xff\xd9",
        "webp": b"RIFF\x10\x00\x00\x00WEBPVP8L" + bytes(8),
    }  # fmt: skip


@pytest.mark.parametrize("kind", broken())
@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_a_broken_picture_is_one_problem_among_others(tmp_path, capsys, kind, ending):
    root = davis(tmp_path / "set", split="val")
    bad = root / "JPEGImages/480p/bear/00001.jpg"
    bad.unlink()
    bad = bad.with_suffix(ending)
    bad.write_bytes(broken()[kind])
    code, out, err = vsod(capsys, "data", "check", "davis16", root, "--split", "val", "--jobs", 1)
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert (code, err, len(problems)) == (1, "", 1), (out, err)
    assert str(bad) in problems[0] and "not a readable picture" in problems[0]
    refused(vsod(capsys, "data", "prepare", "davis16", root, tmp_path / "new", "--split", "val",
                 "--partial"), str(bad))  # fmt: skip
    assert not (tmp_path / "new").exists()
    refused(vsod(capsys, "predict", bad, "-o", tmp_path / "mask.png"), str(bad))
    assert not list(tmp_path.glob("*.png"))


def test_a_name_with_a_digit_that_is_no_number(tmp_path):
    root = davis(tmp_path / "set", split="val")
    for folder, ending in (("JPEGImages", "jpg"), ("Annotations", "png")):
        os.rename(root / folder / f"480p/bear/00001.{ending}",
                  root / folder / f"480p/bear/1\u00b22.{ending}")  # fmt: skip
    assert len(open_dataset("davis16", root, "all")) == 5


# ---- videos


@pytest.mark.parametrize("codec", ["libmp3lame", "pcm_s16le", "aac"])
@pytest.mark.parametrize("ending", [".mp4", ".mov", ".webm"])
def test_sound_of_an_avi_is_kept(tmp_path, codec, ending):
    path = make_video(tmp_path / "clip.avi", 12, codec="mpeg4", sound=codec)
    source, output = open_source(path), tmp_path / f"out{ending}"
    with open_writer(output, source) as writer:
        for frame in source:
            writer.write(frame.picture, frame)
        writer.close()
    assert not writer.notes
    assert len(decode(output)[0]) == 12
    _, packets = sound_packets(output)
    assert 0.3 < float(packets[-1][1]) < 0.6 and abs(float(packets[0][1])) < 0.1


def test_sound_that_cannot_be_kept_costs_the_sound_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sound, "_fits", lambda *_: False)
    monkeypatch.setattr(sound, "_can_be_coded", lambda *_: False)
    path = make_video(tmp_path / "clip.mkv", 5, sound="aac")
    source = open_source(path)
    with open_writer(tmp_path / "out.mp4", source) as writer:
        for frame in source:
            writer.write(frame.picture, frame)
        writer.close()
    assert len(decode(tmp_path / "out.mp4")[0]) == 5
    assert writer.notes == [f"{path}: sound that .mp4 cannot hold is left out"]


@pytest.mark.parametrize("cut", [8, 20, 40, 200, 0.3, 0.5, 0.6, 0.9])
def test_a_truncated_mp4_says_so_and_how_to_repair_it(tmp_path, capsys, cut):
    path = make_video(tmp_path / "clip.mp4", 12, sound="aac")
    data = path.read_bytes()
    path.write_bytes(data[: cut if isinstance(cut, int) else int(cut * len(data))])
    refused(vsod(capsys, "predict", path, "-o", tmp_path / "out.mp4"), str(path),
            "cut off: the index is missing", "untrunc")  # fmt: skip


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile {}\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "text": "hello\n", "empty": "", "svg": "<svg xmlns='http://www.w3.org/2000/svg'/>",
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("name", ["clip.mp4", "clip.m3u8", "clip.txt"])
def test_a_text_that_names_other_files_is_no_video(tmp_path, capsys, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "secret.mp4", 3)
    (tmp_path / name).write_text(PLAYLISTS[kind].format("secret.mp4"))
    refused(vsod(capsys, "predict", name, "-o", "out.mp4"), name)
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("name", ["a:b.mp4", "http:x.mp4", "concat:secret.mp4", "-clip.mp4",
                                  "%d.mp4", "a b|c.mp4"])  # fmt: skip
def test_any_name_of_a_file_is_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "plain.mp4", 3, sound="aac")
    os.rename("plain.mp4", name)
    source = open_source(name)
    with open_writer(f"out {name}", source) as writer:
        for frame in source:
            writer.write(frame.picture, frame)
        writer.close()
    assert sorted(os.listdir()) == sorted([name, f"out {name}"])
    assert sound_packets(tmp_path / f"out {name}")[0] == "aac"


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)])
def test_a_phone_video_is_upright_pixel_for_pixel(tmp_path, matrix):
    plain = [frame.picture for frame in open_source(make_video(tmp_path / "plain.mp4", 3))]
    path = turn(make_video(tmp_path / "turned.mp4", 3), *matrix)
    quarter = {(0, 1, -1, 0): 3, (-1, 0, 0, -1): 2, (0, -1, 1, 0): 1}[matrix]
    for frame, expected in zip(open_source(path), plain, strict=True):
        np.testing.assert_array_equal(frame.picture, np.rot90(expected, quarter))


@pytest.mark.parametrize("arguments, words", [
    (("--rate", "nan"), "rate must be"), (("--rate", "inf"), "rate must be"),
    (("--rate", "-1"), "rate must be"), (("--rate", "1e-9"), "rate must be"),
    (("--size", "100000x100000"), "size must be"), (("--size", "0x5"), "size must be"),
    (("--device", "mps"), "device must be"), (("--device", "meta"), "device must be"),
    (("--device", "cuda:-1"), "device"), (("--batch", "0"), "batch must be"),
    (("--overlap", "-1"), "overlap must be"), (("--background", "nocolour"), "background must"),
    (("--crf", "foo"), "crf must be"), (("--precision", "int8"), "precision must be"),
    (("--model", "/"), "config.json is missing"), (("--as", "foo"), "must be one of"),
])  # fmt: skip
def test_an_option_that_cannot_be_is_one_line(tmp_path, capsys, arguments, words):
    image(tmp_path / "frames/0.png")
    refused(vsod(capsys, "predict", tmp_path / "frames", "-o", tmp_path / "out", *arguments), words)
    assert not (tmp_path / "out").exists()


# ---- maps


def test_maps_that_something_else_made_are_not_taken_for_new_ones(tmp_path, capsys):
    root, out = davis(tmp_path / "set", split="val"), tmp_path / "maps"
    call = ("predict", "--dataset", "folder", "--data", root, "-o", out, "--size", "32x32")
    code, said, err = vsod(capsys, *call)
    assert code == 0 and "5 frames of 2 sequences" in said, err
    (out / "bike").rename(tmp_path / "away")
    (out / "bike").mkdir()  # an empty folder is not a whole one
    assert "2 frames of 2 sequences" in vsod(capsys, *call)[1]
    before = snapshot(out)
    refused(
        vsod(capsys, *call, "--as", "overlay"), "made with view mask, not overlay", "--overwrite"
    )
    refused(vsod(capsys, *call, "--crf", "dss"), "made with crf None, not dss", "--overwrite")
    refused(vsod(capsys, *call[:-1], "64x64"), "made with size", "--overwrite")
    assert snapshot(out) == before
    (out / "bear/.vsod.json").unlink()
    refused(vsod(capsys, *call), "do not say what made them", "--overwrite")
    (out / "bear/mine.png").write_bytes(b"mine")
    assert "5 frames of 2 sequences" in vsod(capsys, *call, "--overwrite")[1]
    (out / "bear/00001.png").unlink()
    refused(vsod(capsys, *call), "1 of its 3 maps are missing", "--overwrite")
    code, said, _ = vsod(capsys, *call, "--overwrite")
    assert (out / "bear/mine.png").read_bytes() == b"mine"
    (out / "bear/mine.png").unlink()
    assert snapshot(out) == before
    load_model("vsod-mobile").save_pretrained(tmp_path / "renamed")
    code, said, err = vsod(capsys, *call, "--model", tmp_path / "renamed")
    assert code == 0 and "0 frames of 2 sequences" in said, err  # it is the same model
    for folder in ("JPEGImages", "Annotations"):
        file = next((root / folder / "480p/bear").glob("00002.*"))
        file.rename(tmp_path / f"{folder}{file.suffix}")
    listed = root / "ImageSets/480p/val.txt"
    lines = listed.read_text().splitlines(keepends=True)
    listed.write_text("".join(line for line in lines if "bear/00002" not in line))
    refused(vsod(capsys, *call), "bear: its maps were made of other frames", "--overwrite")
    assert "4 frames of 2" in vsod(capsys, *call, "--overwrite")[1]
    assert not (out / "bear/00002.png").exists()
    score = ("eval", "--pred", out, "--dataset", "folder", "--data", root, "--workers", 1)
    assert "Made by vsod predict: vsod-mobile (" in vsod(capsys, *score)[1]
    for record in out.glob("*/.vsod.json"):
        record.unlink()
    code, said, _ = vsod(capsys, *score)
    assert code == 0 and "Made by" not in said


def test_one_model_is_known_by_its_weights_and_its_arguments():
    options = dict(backbone="vgg11", backbone_options={"width": 0.125}, levels=[8, 16], skips=[4],
                   num_heads=[2, 4], dim=16, depth=1, feed_forward=16, decoder_dim=8,
                   clip_length=2, image_size=[32, 32])  # fmt: skip
    model = MSSA(**options)
    other = MSSA(**options, keep_aspect=True)  # the same weights, other masks
    other.load_state_dict(model.state_dict())
    known = [
        VideoPredictor(m, "cpu").record()["hash"] for m in (model, copy.deepcopy(model), other)
    ]
    assert known[0] == known[1] != known[2]


class Broken(SaliencyModel):
    """Gives NaN from frame 1 on."""

    clip_length, image_size, outputs, needs_prior = 1, (8, 8), "all", False

    def encode(self, frames):
        return [frames[:, :, :1]]

    def decode(self, maps, size):
        return torch.where(maps[0] > 0.5, torch.nan, maps[0])


def test_masks_that_are_no_numbers_are_an_error(tmp_path):
    frames = [np.full((8, 8, 3), value, np.uint8) for value in (10, 250)]
    with pytest.raises(InputError, match="gives NaN for frame 00001"):
        VideoPredictor(Broken(), "cpu").predict_clip(frames)


def test_a_pipe_or_a_device_is_no_file(tmp_path, capsys):
    root = davis(tmp_path / "set", split="val")
    frame = root / "JPEGImages/480p/bear/00001.jpg"
    frame.unlink()
    os.mkfifo(frame)
    code, out, _ = vsod(capsys, "data", "check", "davis16", root, "--split", "val", "--jobs", 1)
    assert code == 1 and f"problem: {frame}: a pipe or device, not a file" in out
    refused(vsod(capsys, "predict", frame, "-o", tmp_path / "out.png"), "a pipe or device")
    lists = root / "ImageSets/480p/val.txt"
    lists.unlink()
    lists.symlink_to("/dev/zero")
    refused(vsod(capsys, "data", "prepare", "folder", root, tmp_path / "new", "--split", "val"),
            "val.txt: a pipe or device")  # fmt: skip


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999", "x"])
def test_a_seed_is_a_number_that_generators_take(tmp_path, capsys, seed):
    root = davis(tmp_path / "set", split="val")
    code, _, err = vsod(capsys, "prior", "train", "folder", "-o", tmp_path / "out", root,
                        "--split", "val", "--backbone", "none", "--seed", seed)  # fmt: skip
    assert code == 2 and "--seed" in err and not (tmp_path / "out").exists()
