"""The scripts of the two papers, on miniature trees: from nothing to the tables, through kills."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2", reason="the extra `models` is not installed")
pytest.importorskip("lightning", reason="the extra `models` is not installed")

from PIL import Image
from quick_commands import install
from trees import coco_tree, davis, square, text

from vsod_models.data.synthetic import synthetic_clip
from vsod_models.labels.erasing import correct

ROOT = Path(__file__).parent.parent
SIZE = (40, 48)
TINY = (
    "backbone_weights=null model.image_size=[32,32] data.sizes=[[33,33]] data.workers=0 "
    "batch_size=1 accelerator=cpu checkpoint_every=1 precision=32-true "
)
TINY_MSSA = TINY + (
    "model.backbone=vgg11 model.backbone_options.width=0.125 model.dim=16 model.depth=1 "
    "model.feed_forward=16 model.decoder_dim=8 model.clip_length=2"
)
TINY_MSST = TINY + "model.backbone=mobilenet_v2 model.width=0.25 model.hidden=4"


def save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All datasets of the two papers, of three frames a sequence."""
    root = tmp_path_factory.mktemp("data")
    clips = (synthetic_clip(0, i, 3, SIZE, photos=False) for i in range(99))
    parts = {"train": ("bear", "bus", "hike", "train"), "val": ("cows", "dog")}
    parts |= {"msst-train": ("bear", "bus"), "msst-val": ("cows", "dog")}
    for part, sequences in parts.items():
        text(root / f"davis/ImageSets/480p/{part}.txt", "\n".join(sequences) + "\n")
    for name in sorted({*parts["train"], *parts["val"]}):
        for t, (frame, mask) in enumerate(zip(*next(clips), strict=True)):
            save(root / f"davis/JPEGImages/480p/{name}/{t:05d}.jpg", frame)
            save(root / f"davis/Annotations/480p/{name}/{t:05d}.png", 255 * np.uint8(mask > 0))
    listed = (ROOT / "vsod_models/data/splits/fbms59-msst-train.txt").read_text().split()
    for part, names in (("Trainingset", listed), ("Testset", ["camel01"])):
        for name in names:
            frames, masks = next(clips)
            for t, frame in enumerate(frames):
                save(root / "fbms" / part / name / f"{name}_{t:02d}.jpg", frame)
            truth = root / "fbms" / part / name / "GroundTruth"
            save(truth / f"{name}_00.pgm", 255 * np.uint8(masks[0] > 0))
    for name in ("frog", "penguin"):
        for t, (frame, mask) in enumerate(zip(*next(clips), strict=True)):
            save(root / f"segtrack/JPEGImages/{name}/{t:05d}.png", frame)
            save(root / f"segtrack/GroundTruth/{name}/{t:05d}.png", 255 * np.uint8(mask > 0))
    for i in range(4):
        frames, masks = next(clips)
        save(root / f"stills/images/{i}.jpg", frames[0])
        save(root / f"stills/masks/{i}.png", 255 * np.uint8(masks[0] > 0))
    coco_tree(root / "coco")
    return {
        name: str(root / name.lower()) for name in ("DAVIS", "FBMS", "SEGTRACK", "STILLS", "COCO")
    }


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """A folder whose bin/ has a quick `vsod` and `python`."""
    folder = tmp_path_factory.mktemp("commands")
    install(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/quick_commands.py"), str(folder)]
    server = subprocess.Popen(command, env=environment, cwd=folder)
    deadline = time.monotonic() + 600
    while not (folder / "socket").exists():
        assert server.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    yield folder
    server.kill()
    server.wait()


def run(script, out, folder, parts=(), **environment):
    """The script's exit code, and what it printed; `folder`: of `commands`."""
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / script), str(out), *parts],
        cwd=out.parent, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **environment},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


MSST = [f"{name}{crf}" for name in ("OS", "ST", "full", "branch") for crf in ("", "+CRF")]
PAIR = ["MSSA", "baseline"]
KINDS = ("train", "predict", "eval")
# Of each case: its changes of the recipes, how many trainings, predictions and evaluations it is,
# and the rows of its tables.
CASES = {
    "table1-paper": (TINY_MSSA, (4, 6, 3), PAIR * 3),
    "table1-small": (TINY_MSSA, (4, 2, 1), PAIR),
    "msst-paper": (TINY_MSST, (11, 14, 2), [
        *MSST, *(f"{name}-fine{crf}" for name in ("OS", "ST", "full") for crf in ("", "+CRF"))
    ]),
    "msst-small": (TINY_MSST, (12, 15, 4), [
        *MSST, *(f"{name}{crf}" for name in ("fine", "coarse", "person") for crf in ("", "+CRF"))
    ]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_from_nothing_to_the_table(case, data, commands, tmp_path):
    """At full size it is killed thrice, and goes on; a second run has nothing left to do."""
    name, scale = case.split("-")
    changes, expected, titles = CASES[case]
    given = data if scale == "paper" else {key: data[key] for key in ("DAVIS", "STILLS")}
    environment = dict(
        SCALE=scale, SEEDS="0", CHANGES=changes, PRETRAIN="2", FINETUNE="2", STAGE="2",
        PRIOR="--backbone none --epochs 2 --frames 8", **given,
    )  # fmt: skip
    parts = ["ablation", "coarse"] if name == "msst" else []
    out, log = tmp_path / "out", commands / "log"
    before = len(log.read_text().splitlines()) if log.exists() else 0
    kills = {before + 1: 0.3, before + 6: 0.2, before + 13: 0.1} if scale == "paper" else {}
    (commands / "kills").write_text(json.dumps(kills))
    for _ in range(len(kills) + 1):
        code, printed = run(f"{name}.sh", out, commands, parts, **environment)
        if code != 128 + 9:
            break
    assert code == 0, printed
    done = log.read_text().splitlines()[before:]
    counts = [sum(c.startswith(f"vsod {kind} ") for c in done) for kind in KINDS]
    # What was killed ran twice, and so did predictions whose evaluation was not there yet.
    assert all(count >= least for count, least in zip(counts, expected, strict=True)), done
    assert counts[0] + counts[2] <= expected[0] + expected[2] + len(kills), done
    files = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    code, again = run(f"{name}.sh", out, commands, parts, **environment)
    assert code == 0 and printed.endswith(again)
    new = log.read_text().splitlines()[before + len(done) :]
    assert new and all(command.startswith("python ") for command in new)

    table = (out / f"{name}.md").read_text()
    lines = [line for line in table.splitlines() if re.match(r"\| \S+ \| 0\.", line)]
    rows = [line.split("|")[1:-1] for line in lines]
    assert [row[0].strip() for row in rows] == titles
    assert all(0 <= float(cell) <= 1 for row in rows for cell in row[1:])
    remade = {out / f"{name}.md", out / f"figures/{name}-losses.png"}
    assert {file for file, before in files.items() if file.read_bytes() != before} <= remade
    drawn = {file.name.split("-")[-1] for file in (out / "figures").iterdir()}
    kind = "scatter.png" if name == "table1" else "bars.png"
    assert drawn == {"curves.png", "grid.jpg", "losses.png", kind}
    assert list(tmp_path.iterdir()) == [out], "everything lies under OUT"


def test_a_part_alone_reports_what_there_is(data, commands, tmp_path):
    """The times that were measured, where nothing was trained; they are not measured again."""
    times = text(
        tmp_path / "out/times/msst.md", "| stage | time |\n| --- | ---: |\n| CRF | 1 s |\n"
    )
    code, printed = run("msst.sh", tmp_path / "out", commands, ["times"], SCALE="small", **data)
    assert code == 0, printed
    assert (tmp_path / "out/msst.md").read_text().endswith(times.read_text())


def test_what_is_missing_is_named(commands, tmp_path):
    for environment, message in (
        ({"SCALE": "large"}, "SCALE is large; there are paper and small"),
        ({"SCALE": "small"}, "DAVIS= has to be the folder of DAVIS-2016"),
        ({"SCALE": "paper", "DAVIS": str(tmp_path)}, "has to be the folder of"),
    ):
        for script in ("table1.sh", "msst.sh"):
            code, printed = run(script, tmp_path / "out", commands, **environment)
            assert code == 2 and message in printed and printed.count("\n") == 1, printed


def test_the_played_person(tmp_path):
    """Erases what is mostly background, of every second label, and nothing else."""
    root, labels = davis(tmp_path / "davis", [("bear", 3)]), tmp_path / "labels"
    label = square()  # the object
    label[8:10, 12:15] = 255  # and something else
    for t in range(3):
        save(labels / f"bear/{t:05d}.png", label)
    frames = {f"bear/{t:05d}": {} for t in range(3)}
    text(labels / "manifest.json", json.dumps({"frames": frames}))
    play = runpy.run_path(str(ROOT / "recipes/played_person.py"))["main"]
    play(labels, "davis16", root, "train", tmp_path / "wrong.json")
    entries = json.loads((tmp_path / "wrong.json").read_text())
    assert entries == [{"frame": f"bear/0000{t}", "point": [12, 8]} for t in (0, 2)]
    erased = label > 0
    assert correct(erased, erased.copy(), entries[0]) == 6
    assert np.array_equal(erased, square() > 0)
