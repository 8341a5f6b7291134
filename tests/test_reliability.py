"""What `vsod` promises of input that nobody meant: one line, nothing lost, nothing outside."""

import hashlib
import json

import pytest

pytest.importorskip("cv2", reason="the extra `models` is not installed")
pytest.importorskip("typer", reason="the extra `models` is not installed")
pytest.importorskip("torchvision", reason="the extra `models` is not installed")
pytest.importorskip("av", reason="the extra `models` is not installed")
Image = pytest.importorskip("PIL.Image")

from trees import davis, image, text  # noqa: E402

from vsod_models import cli  # noqa: E402
from vsod_models.data import open_dataset  # noqa: E402
from vsod_models.errors import InputError  # noqa: E402


def vsod(capsys, *arguments):
    """(exit code, stdout, stderr) of `vsod ...`."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    return (stop.value.code or 0, *capsys.readouterr())


def refused(result, *words):
    """One line on stderr, exit code 2, with these words in it."""
    code, _, err = result
    assert code == 2, result
    assert err.startswith("vsod: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err
    return err


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
