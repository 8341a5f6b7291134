"""`vsod batch`: what is run, what is kept, and what is left when something is killed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("av", reason="the extra `models` is not installed")
pytest.importorskip("cv2", reason="the extra `models` is not installed")
pytest.importorskip("typer", reason="the extra `models` is not installed")

from clips import decode, make_video, sound_packets
from commands import refused, vsod

from vsod_models import batch, prediction
from vsod_models.batch import Cut, Options, Task, Worker, find_tasks, record_of
from vsod_models.errors import InputError
from vsod_models.files import locked, whole_file
from vsod_models.media.reading import open_source

MODEL = """
    import time
    from torch import nn

    class Bright(nn.Module):
        image_size = (16, 16)
        def forward(self, frames):
            time.sleep({seconds})
            return 6 * frames.mean(1, keepdim=True) - 3
    """


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """Makes `clips/NNN.mp4` in the current folder, and a model, tiny_batch_model:Bright."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("tiny_batch_model", None)

    def make(count, frames=3, seconds=0.0):
        text = textwrap.dedent(MODEL.format(seconds=seconds))
        (tmp_path / "tiny_batch_model.py").write_text(text)
        folder = tmp_path / "clips"
        folder.mkdir()
        first = make_video(folder / "000.mp4", frames=frames)
        for index in range(1, count):
            shutil.copy(first, folder / f"{index:03d}.mp4")
        return folder

    yield make
    sys.modules.pop("tiny_batch_model", None)


def worker(folder, model="tiny_batch_model:Bright", **options):
    predictor = dict(model=model, device="cpu", precision="float32")
    return Worker(Options(predictor, str(folder), "mask", retries=1, **options))


def row_of(made, task):
    return made({"source": task.source, "output": task.output})


def no_temporary_files(folder):
    assert not [p for p in folder.rglob("*") if ".part" in p.name]


# ---- which videos


def test_inputs_are_folders_globs_lists_and_files(clips, tmp_path, monkeypatch):
    folder = clips(2)
    (folder / "more").mkdir()
    shutil.copy(folder / "000.mp4", folder / "more" / "10.MOV")
    shutil.copy(folder / "000.mp4", folder / ".hidden.mp4")
    (folder / "note.txt").write_text("no video")
    out = folder / "out"
    out.mkdir()
    shutil.copy(folder / "000.mp4", out / "000.mp4")

    def names(*inputs, form="mp4"):
        found = find_tasks([str(i) for i in inputs], out, form)
        assert all(Path(task.source).is_absolute() for task in found)
        return [os.path.relpath(task.output, out) for task in found]

    assert names(folder) == ["000.mp4", "001.mp4", "more/10.mp4"]
    assert names(folder, form="png") == ["000", "001", "more/10"]
    assert names("clips/*.mp4", form="webm") == ["000.webm", "001.webm"]
    assert names("clips/000.mp4", "missing.mov") == ["000.mp4", "missing.mp4"]
    (tmp_path / "list.txt").write_text("clips/001.mp4\n\nclips/more/10.MOV\n")
    assert names("list.txt") == ["001.mp4", "10.mp4"]
    (tmp_path / "list.csv").write_text("id,path\n7,clips/001.mp4\n")
    assert names("list.csv") == ["001.mp4"]
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"video": ["clips/001.mp4"]}), tmp_path / "list.parquet")
    assert names("list.parquet") == ["001.mp4"]
    with open("list.txt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert names("-") == ["001.mp4", "10.mp4"]
    for words, given in {
        "would be written to": ("clips/000.mp4", "clips/out/000.mp4"),
        "one called path": ("two.csv",),
        "not readable as Parquet": ("broken.parquet",),
        "matches no file": ("nothing*.mp4",),
        "no videos in it": ("empty",),
        "no such file or folder": ("tpyo.mp4", "other"),
    }.items():
        (tmp_path / "two.csv").write_text("a,b\n1,2\n")
        (tmp_path / "broken.parquet").write_text("no")
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=words):
            find_tasks(list(given), out, "mp4")


# ---- one video, in this process


def test_what_was_done_is_kept_and_nothing_else_is_taken_for_it(clips, tmp_path):
    folder, out = clips(2), tmp_path / "out"
    first, second = find_tasks([str(folder)], out, "mp4")
    row = row_of(worker(out), first)
    assert (row["state"], row["kept"], row["frames"], row["error"]) == ("done", False, 3, "")
    assert (
        row["model"] == "tiny_batch_model:Bright" and json.loads(row["options"])["view"] == "mask"
    )
    assert len(decode(first.output)[0]) == 3
    before = os.stat(first.output).st_mtime_ns

    again = row_of(worker(out), first)
    assert again["kept"] and again["state"] == "done" and again["frames"] == 3
    assert os.stat(first.output).st_mtime_ns == before

    # Killed between the output's appearance and the record: it is ours, and whole.
    record = record_of(out, Path(first.output))
    said = json.loads(record.read_text())
    record.write_text(json.dumps({**said, "state": "running", "frames": 0}))
    assert row_of(worker(out), first)["frames"] == 3
    assert os.stat(first.output).st_mtime_ns == before

    # Other options, or a file of somebody else: refused, and made anew only when that is asked.
    other = worker(out)
    other.made_by = {**other.made_by, "crf": "dss"}
    row = row_of(other, first)
    assert row["state"] == "failed" and "other options" in row["error"]
    shutil.copy(first.output, second.output)
    row = row_of(worker(out), second)
    assert row["state"] == "failed" and "exists already" in row["error"]
    assert os.stat(first.output).st_mtime_ns == before
    anew = worker(out, overwrite=True)
    assert [row_of(anew, task)["kept"] for task in (first, second)] == [False, False]
    assert [row_of(anew, task)["kept"] for task in (first, second)] == [True, True]
    assert os.stat(first.output).st_mtime_ns > before

    # Killed before it was whole, with the former output still there.
    there = os.lstat(first.output).st_ino
    said = json.loads(record.read_text())
    record.write_text(json.dumps({**said, "state": "running", "replaces": there}))
    row = row_of(worker(out), first)
    assert row["state"] == "failed" and "exists already" in row["error"]
    anew = worker(out, overwrite=True)
    record.write_text(
        json.dumps({**said, "state": "running", "replaces": there, "run": anew.options.run})
    )
    assert not row_of(anew, first)["kept"]
    os.unlink(first.output)
    assert not row_of(worker(out), first)["kept"], "who deletes an output wants it again"
    no_temporary_files(out)


def test_an_input_that_fails_says_why_and_is_tried_again_where_that_can_help(
    clips, tmp_path, monkeypatch
):
    folder, out = clips(1), tmp_path / "out"
    (folder / "broken.mp4").write_bytes((folder / "000.mp4").read_bytes()[:400])
    made = worker(out)
    waits = []
    monkeypatch.setattr(batch.time, "sleep", waits.append)
    for name, words in {"broken.mp4": "cut off", "gone.mp4": "no such file"}.items():
        row = row_of(made, Task(str(folder / name), str(out / name)))
        assert row["state"] == "failed" and words in row["error"] and not waits
    assert not record_of(out, out / "gone.mp4").exists()

    task = Task(str(folder / "000.mp4"), str(out / "000.mp4"))
    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) <= failures:
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    failures = 10**6
    row = row_of(made, task)
    assert row["state"] == "failed" and "no space left" in row["error"]
    assert waits == [1], "one retry, after a second"
    assert not os.path.lexists(task.output) and not record_of(out, Path(task.output)).exists()
    calls.clear()
    failures = 2  # the record of the first attempt, and the output of the second
    assert row_of(made, task)["state"] == "failed"
    calls.clear()
    failures = 1
    assert row_of(made, task)["state"] == "done"
    no_temporary_files(out)


def test_only_an_actor_is_deaf_to_ctrl_c(clips, tmp_path):
    clips(1)
    before = signal.getsignal(signal.SIGINT)
    worker(tmp_path / "out")
    assert signal.getsignal(signal.SIGINT) is before
    batch.Actor(Options({"model": "tiny_batch_model:Bright"}, str(tmp_path / "out"), "mask"))
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # goes back after each test


def test_a_video_that_kills_its_process_is_given_up(clips, tmp_path):
    folder, out = clips(1), tmp_path / "out"
    made = worker(out)
    (task,) = find_tasks([str(folder)], out, "mp4")
    file = record_of(out, Path(task.output))
    file.parent.mkdir(parents=True)
    record = {"state": "running", "run": made.options.run, "attempts": 2, "made_by": made.made_by}
    file.write_text(json.dumps(record))
    row = row_of(made, task)
    assert row["state"] == "failed" and "was killed 2 times" in row["error"]
    assert row_of(worker(out), task)["state"] == "done", "another run tries anew"


def test_memory_has_a_limit(clips, tmp_path):
    """In a process of its own, which keeps the limit until it ends."""
    clips(1)
    code = f"""
        import resource
        from vsod_models.batch import Cut, Options, Task, Worker, limit_memory
        predictor = dict(model="tiny_batch_model:Greedy", device="cpu", precision="float32")
        made = Worker(Options(predictor, {str(tmp_path / "out")!r}, "mask", memory=4.0))
        row = made(dict(source="clips/000.mp4", output={str(tmp_path / "out/000.mp4")!r}))
        assert row["state"] == "failed", row
        print(row["error"])
        made.predictor.model.network.wanted = 1
        row = made(dict(source="clips/000.mp4", output={str(tmp_path / "out/000.mp4")!r}))
        assert row["state"] == "done", row
        """
    with open("tiny_batch_model.py", "a") as file:
        file.write(
            "\n\nclass Greedy(Bright):\n"
            "    wanted = 6 * 2**30\n"
            "    def forward(self, frames):\n"
            "        import torch\n"
            "        torch.ones(self.wanted, dtype=torch.uint8)\n"
            "        return super().forward(frames)\n"
        )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "out of the memory that an actor may take" in done.stdout
    no_temporary_files(tmp_path)


def test_a_second_driver_is_refused(clips, tmp_path, capsys):
    pytest.importorskip("ray", reason="the extra `batch` is not installed")
    folder = clips(1)
    with locked(tmp_path / "out", "a batch"):
        result = vsod(capsys, "batch", folder, "-o", tmp_path / "out", "--model",
                      "tiny_batch_model:Bright", "--device", "cpu")  # fmt: skip
    refused((result[0], "", result[2]), "out: a batch is running in it already")


def test_bad_arguments(clips, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray", reason="the extra `batch` is not installed")
    monkeypatch.setitem(sys.modules, "ray.data", None)  # importing it is an error
    folder = clips(1)
    (tmp_path / "file").write_text("no folder")
    for words, given in {
        "--format avi": ("--format", "avi"),
        "has no alpha": ("--as", "matte"),
        "--parts does not go with": ("--parts", "5", "--format", "gif"),
        "manifest.txt: has to end": ("--manifest", "manifest.txt"),
        "clips: has to end": ("--manifest", "clips"),
        "a folder for the outputs": ("-o", "file"),
        "--background": ("--background", "no colour"),
        "neither a folder": ("--model", "nobody"),
    }.items():
        model = () if "--model" in given else ("--model", "tiny_batch_model:Bright")
        result = vsod(capsys, "batch", folder, "-o", tmp_path / "out", *model, *given)
        refused((result[0], "", result[2]), words)
    assert not any((tmp_path / "out").glob("*.mp4"))


@pytest.mark.parametrize("given", [["tpyo"], ["two.csv"], ["clips", "--format", "avi"]])
def test_bad_input_is_told_before_the_libraries_load(clips, tmp_path, given):
    pytest.importorskip("ray", reason="the extra `batch` is not installed")
    clips(1)
    (tmp_path / "two.csv").write_text("a,b\n1,2\n")
    code = f"""
        import atexit, sys
        from vsod_models.cli import main
        atexit.register(lambda: print("loaded", {{"ray", "torch"}} & set(sys.modules)))
        main({["batch", *given, "-o", "out"]!r})
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    refused((done.returncode, "", done.stderr))
    assert done.stdout == "loaded set()\n"


# ---- a long video in parts


def part_rows(made, task, seconds=0.6):
    cut = Cut(seconds, *made.predictor.reach())
    tasks = batch.cut_up(task, cut)
    assert len(tasks) > 1
    return [made(asdict(part)) for part in tasks]


@pytest.mark.parametrize("model", ["mssa-tiny", "tiny_batch_model:Bright"])
@pytest.mark.parametrize("windows", [1, 3])
def test_the_masks_of_parts_are_those_of_the_whole(clips, tmp_path, model, windows):
    clips(1)
    make_video(tmp_path / "long.mp4", frames=60, gop=7)
    made = worker(tmp_path / "out", model)
    made.predictor.batch = windows
    whole, cut = (
        Task(str(tmp_path / "long.mp4"), str(tmp_path / "out" / name)) for name in ("whole", "cut")
    )
    assert row_of(made, whole)["state"] == "done"
    rows = part_rows(made, cut)
    assert [row["state"] for row in rows] == ["part", "part", "part", "done"]
    assert rows[-1]["frames"] == 60 and not rows[-1]["kept"]
    names = sorted(os.listdir(whole.output))
    assert len(names) == 60 and sorted(os.listdir(cut.output)) == names
    for name in names:
        made_whole, made_cut = (Path(task.output, name).read_bytes() for task in (whole, cut))
        assert made_whole == made_cut, name
    again = part_rows(made, cut)
    assert all(row["state"] == "done" and row["kept"] for row in again)
    no_temporary_files(tmp_path / "out")
    left = [path.name for path in (tmp_path / "out" / batch.RECORDS).iterdir()]
    assert sorted(left) == ["cut.json", "whole.json"]


@pytest.mark.parametrize("ending, view", [("mp4", "mask"), ("mov", "matte"), ("webm", "matte")])
def test_parts_are_joined_as_they_are_coded_with_times_and_sound(clips, tmp_path, ending, view):
    """Times that vary and do not start at 0."""
    clips(1)
    pts = [3 * index + index % 3 for index in range(45)]
    long = make_video(
        tmp_path / "long.mp4", pts=pts, shift=9, time_base=Fraction(1, 60), sound="aac", gop=12
    )
    options = Options(dict(model="tiny_batch_model:Bright", device="cpu"), str(tmp_path), view)
    made = Worker(options)
    whole, cut = (Task(str(long), str(tmp_path / f"{n}.{ending}")) for n in ("whole", "cut"))
    assert row_of(made, whole)["state"] == "done"
    rows = part_rows(made, cut)
    assert rows[-1]["state"] == "done", rows
    form = "rgba" if view == "matte" else "rgb24"
    (pictures, times), (joined, joined_times) = (decode(t.output, form) for t in (whole, cut))
    assert joined_times == times and len(joined) == 45
    for one, other in zip(pictures, joined, strict=True):
        assert one.shape == other.shape and abs(one.astype(int) - other).mean() < 2
    assert sound_packets(cut.output) == sound_packets(whole.output)
    assert open_source(cut.output).rate == open_source(whole.output).rate


def test_a_kill_between_parts_loses_the_part_that_was_under_way(clips, tmp_path):
    clips(1)
    make_video(tmp_path / "long.mp4", frames=60, gop=7)
    with open("tiny_batch_model.py", "a") as file:
        file.write(
            "\n\nimport os\nimport signal\n\nclass Mortal(Bright):\n"
            "    left = int(os.environ.get('VSOD_LEFT', 10**6))\n"
            "    def forward(self, frames):\n"
            "        self.left -= 1\n"
            "        if not self.left:\n"
            "            os.kill(os.getpid(), signal.SIGKILL)\n"
            "        return super().forward(frames)\n"
        )
    task = Task(str(tmp_path / "long.mp4"), str(tmp_path / "out" / "long"))
    code = f"""
        from test_batch import Task, part_rows, worker
        made = worker({str(tmp_path / "out")!r}, "tiny_batch_model:Mortal")
        part_rows(made, Task(*{(task.source, task.output)!r}))
        """
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True,
        env={**os.environ, "VSOD_LEFT": "25", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    (folder,) = (tmp_path / "out" / batch.RECORDS).glob("long.*")
    first = folder / "000000-000015"
    assert [p.name for p in sorted(folder.glob("[0-9]*[0-9]"))] == [first.name]
    assert not os.path.lexists(task.output), "nothing is there before it is whole"
    before = first.stat().st_mtime_ns

    made = worker(tmp_path / "out", "tiny_batch_model:Mortal")
    cut = Cut(0.6, *made.predictor.reach())
    rows = []
    for number, part in enumerate(batch.cut_up(task, cut)):
        rows.append(made(asdict(part)))
        assert number or first.stat().st_mtime_ns == before, "it was done"
    assert [row["state"] for row in rows] == ["part", "part", "part", "done"]
    assert len(os.listdir(task.output)) == 60 and not folder.exists()
    no_temporary_files(tmp_path / "out")


def test_what_is_short_or_cannot_be_cut_is_one_row(clips, tmp_path):
    folder = clips(1, frames=20)
    task = Task(str(folder / "000.mp4"), str(tmp_path / "out.mp4"))
    cut = Cut(0.2, 1, 2)
    assert len(batch.cut_up(task, cut)) == 4
    assert batch.cut_up(task, Cut(0.5, 1, 2)) == [task]
    for name in ("gone.mp4", "broken.mp4"):
        (folder / "broken.mp4").write_bytes((folder / "000.mp4").read_bytes()[:-300])
        task = Task(str(folder / name), str(tmp_path / "out.mp4"))
        assert batch.cut_up(task, cut) == [task]


# ---- all of them, in Ray


def actors(mark):
    """Process numbers of the actors that were started with VSOD_MARK=mark."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            name = (process / "cmdline").read_bytes()
            if b"MapWorker" in name and f"VSOD_MARK={mark}".encode() in (
                process / "environ"
            ).read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, Path("errors").read_text()
        time.sleep(0.02)


def test_two_hundred_videos_and_five_kills(clips, tmp_path):
    """Three actors, one after another, both at once, and the driver: nothing is lost.

    Before them the driver is stopped by SIGTERM.  One of the videos is cut into two parts.
    """
    pytest.importorskip("ray", reason="the extra `batch` is not installed")
    count, out = 200, tmp_path / "out"
    folder = clips(count, frames=2, seconds=0.05)
    with open("tiny_batch_model.py", "a") as file:  # no machine is done before it was killed
        file.write(
            "\n\nfrom glob import glob\n\nclass Held(Bright):\n"
            "    def forward(self, frames):\n"
            f"        while len(glob('{out}/*.mp4')) >= int(open('{tmp_path}/most').read()):\n"
            "            time.sleep(0.02)\n"
            "        return super().forward(frames)\n"
        )
    (folder / "007.mp4").write_bytes(b"no video")
    (folder / "077.mp4").write_bytes((folder / "000.mp4").read_bytes()[:-300])
    make_video(folder / "050.mp4", frames=60, gop=7)
    # Ray's workers are nice by 15, which stops them where another job is busy.
    environment = {**os.environ, "VSOD_MARK": str(tmp_path), "RAY_worker_niceness": "0"}
    command = [
        sys.executable, "-m", "vsod_models.cli", "batch", "clips", "-o", "out", "--as", "mask",
        "--model", "tiny_batch_model:Held", "--device", "cpu", "--actors", "2", "--json-lines",
        "--retries", "4", "--parts", "1",
    ]  # fmt: skip

    def start():
        with open("printed", "w") as printed, open("errors", "w") as errors:
            return subprocess.Popen(command, env=environment, stdout=printed, stderr=errors)

    def done():
        """Output -> when it was written, of all whose records say that they are done."""
        files = {}
        for record in (out / batch.RECORDS).glob("[!.]*.json"):
            if '"state": "done"' in record.read_text():
                output = out / record.name.removesuffix(".json")
                files[output] = output.stat().st_mtime_ns
        return files

    def allow(outputs):
        """So many are made, and a few at most that are under way; the rest waits."""
        with whole_file("most") as part:
            part.write_text(str(outputs))

    seen = {}
    allow(15)
    process = start()
    try:
        wait_for(lambda: len(done()) >= 5 and '"done"' in Path("printed").read_text(), process)
        process.terminate()
        assert process.wait(120) == 130, Path("errors").read_text()
        stopped = (out / "manifest.jsonl").read_text().splitlines()
        assert {json.loads(line)["state"] for line in stopped} >= {"done", "waiting"}
        (out / "manifest.jsonl").unlink()
        process = start()
        for number, at in enumerate((15, 40, 65, 90), start=1):
            allow(at + 10)
            wait_for(lambda at=at: len(done()) >= at and actors(tmp_path), process)
            alive = actors(tmp_path)
            for one in alive if number == 4 else alive[:1]:
                os.kill(one, signal.SIGKILL)
            seen |= done()
        allow(130)
        wait_for(lambda: len(done()) >= 120, process)
        seen |= done()
        process.kill()
        process.wait()
        assert not (out / "manifest.jsonl").exists(), "it is written when a run ends"
        allow(count)
        process = start()
        process.wait(400)
    finally:
        process.kill()
    assert process.returncode == 1, Path("errors").read_text()
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    printed = [json.loads(line) for line in Path("printed").read_text().splitlines()]
    assert sorted(printed, key=lambda row: row["input"]) == rows
    states = {Path(row["input"]).stem: row["state"] for row in rows}
    assert len(states) == count
    assert {name for name, state in states.items() if state != "done"} == {"007", "077"}
    kept = {Path(row["output"]) for row in rows if row["kept"]}
    assert set(seen) <= kept and len(seen) >= 120
    for file, when in seen.items():
        assert file.stat().st_mtime_ns == when, f"{file} was run twice"
    for row in rows:
        if row["state"] == "done":
            frames = 60 if "050" in row["input"] else 2
            assert row["frames"] == frames and len(decode(row["output"])[0]) == frames
        else:
            assert row["error"].startswith(row["input"]) and not os.path.exists(row["output"])
    no_temporary_files(out)


def test_the_bits_are_those_of_predict(clips, tmp_path):
    folder, out = clips(1, frames=5), tmp_path / "out"
    (task,) = find_tasks([str(folder)], out, "png")
    assert row_of(worker(out), task)["state"] == "done"
    alone = prediction.load_predictor("tiny_batch_model:Bright", "cpu", precision="float32")
    source = open_source(task.source)
    prediction.predict_file(alone, source, tmp_path / "alone", view="mask")
    names = sorted(p.name for p in (tmp_path / "alone").iterdir())
    assert len(names) == 5
    for name in names:
        assert (out / "000" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
