"""Every trap of the datasets, on miniature trees."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2")
Image = pytest.importorskip("PIL.Image")

from trees import SIZE, coco_tree, davis, fbms, image, mask, segtrack, square, text  # noqa: E402

from vsod_models.data import open_dataset  # noqa: E402
from vsod_models.data.readers import coco  # noqa: E402
from vsod_models.data.readers.folders import shipped_list  # noqa: E402
from vsod_models.errors import InputError  # noqa: E402


def read(records):
    """{sequence: {name: mask or None}}"""
    return {s: {r.name: r.read_mask() for r in rs} for s, rs in records.sequences.items()}


EXPECTED = square(1)


# ---- open_dataset


def test_an_unknown_dataset_is_told_the_names():
    with pytest.raises(
        InputError, match=r"dataset is 'davis'; it has to be one of davis16, .*coco"
    ):
        open_dataset("davis", "x", "train")


def test_a_dataset_needs_a_folder(tmp_path):
    with pytest.raises(InputError, match="needs the folder"):
        open_dataset("davis16", None, "train")
    with pytest.raises(InputError, match="no such folder; it has to hold"):
        open_dataset("davis16", tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match="no option 'colour'"):
        open_dataset("davis16", davis(tmp_path), "train", colour=1)
    with pytest.raises(InputError, match="synthetic clips are not in a folder"):
        open_dataset("synthetic", tmp_path, "train")


def test_readers_do_without_torch():
    code = "import sys, vsod_models.data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- davis16


def test_davis_frames_and_masks(tmp_path):
    records = open_dataset("davis16", davis(tmp_path), "train")
    assert [(r.sequence, r.frame, r.name, r.split) for r in records] == [
        ("bear", 0, "00000", "train"), ("bear", 1, "00001", "train"),
        ("bear", 2, "00002", "train"), ("bike", 0, "00000", "train"),
        ("bike", 1, "00001", "train"),
    ]  # fmt: skip
    assert records[0].read_image().shape == (*SIZE, 3)
    assert np.array_equal(records[0].read_mask(), EXPECTED)


def test_davis_mask_with_alpha(tmp_path):
    """bear/00077.png is of mode LA, its alpha 255 everywhere."""
    root = davis(tmp_path)
    mask(root / "Annotations/480p/bear/00001.png", mode="LA")
    assert np.array_equal(open_dataset("davis16", root, "train")[1].read_mask(), EXPECTED)


def test_davis17_palette_masks_count_every_object(tmp_path):
    root = davis(tmp_path)
    ids = square(1) + 2 * square(1, rows=slice(7, 9))
    picture = Image.fromarray(ids, mode="P")
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    picture.save(root / "Annotations/480p/bear/00000.png")
    assert np.array_equal(open_dataset("davis16", root, "train")[0].read_mask(), ids > 0)


def test_davis_empty_masks_are_legal(tmp_path):
    root = davis(tmp_path)
    mask(root / "Annotations/480p/bear/00002.png", np.zeros(SIZE, np.uint8))
    records = open_dataset("davis16", root, "train")
    assert records[2].mask is not None and not records[2].read_mask().any()


def test_davis_lists_of_sequences_and_all(tmp_path):
    root = davis(tmp_path)
    text(root / "ImageSets/480p/own.txt", "bike\n\n")
    assert list(open_dataset("davis16", root, "own").sequences) == ["bike"]
    assert list(open_dataset("davis16", root, "all").sequences) == ["bear", "bike"]


def test_the_lists_of_msst(tmp_path):
    """25 and 25 sequences of DAVIS-2016 and 12 of FBMS-59; a list of one's own comes first."""
    halves = [
        shipped_list("davis16", f"msst-{part}").read_text().split() for part in ("train", "val")
    ]
    assert [len(half) for half in halves] == [25, 25] and len({*halves[0], *halves[1]}) == 50
    root = davis(tmp_path / "davis", [(name, 2) for name in [*halves[0], *halves[1]]])
    for part, half in zip(("msst-train", "msst-val"), halves, strict=True):
        assert list(open_dataset("davis16", root, part).sequences) == half
    text(root / "ImageSets/480p/msst-train.txt", "bear\n")
    assert list(open_dataset("davis16", root, "msst-train").sequences) == ["bear"]
    (root / "JPEGImages/480p/surf").rename(root / "surf")
    with pytest.raises(InputError, match=r"surf: no such folder, but .*msst-val\.txt lists it"):
        open_dataset("davis16", root, "msst-val")

    names = shipped_list("fbms59", "msst-train").read_text().split()
    assert len(set(names)) == 12
    for name in [*names, "cars2"]:
        image(tmp_path / "fbms/Trainingset" / name / f"{name}_01.jpg")
        mask(tmp_path / "fbms/Trainingset" / name / "GroundTruth" / f"{name}_01.pgm")
    found = open_dataset("fbms59", tmp_path / "fbms", "msst-train")
    assert set(found.sequences) == set(names)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda r: (r / "ImageSets/480p/train.txt").unlink(), r"train\.txt: no such list"),
        (
            lambda r: (r / "ImageSets/480p").rename(r / "ImageSets/2017"),
            r"DAVIS-2017, .*ImageSets/480p/train\.txt",
        ),
        (lambda r: text(r / "ImageSets/480p/train.txt", "\n"), r"train\.txt: the list .* is empty"),
        (
            lambda r: text(r / "ImageSets/480p/train.txt", "bear\n00000.jpg\n"),
            r"train\.txt: line 2 is neither",
        ),
        (
            lambda r: text(r / "ImageSets/480p/train.txt", "cow"),
            r"cow: no such folder, but .*train",
        ),
        (
            lambda r: (r / "JPEGImages/480p/bear/00001.jpg").unlink(),
            r"bear/00001\.jpg: no such frame, but .*train\.txt lists it",
        ),
        (
            lambda r: (r / "Annotations/480p/bear/00001.png").unlink(),
            r"bear/00001\.jpg: a frame without its mask",
        ),
        (
            lambda r: image(r / "JPEGImages/480p/bear/00001.png"),
            r"bear/00001\.png: a second picture of the name 00001",
        ),
    ],
)
def test_davis_that_is_broken(tmp_path, break_it, message):
    root = davis(tmp_path)
    break_it(root)
    with pytest.raises(InputError, match=message):
        open_dataset("davis16", root, "train")


def test_a_mask_without_its_frame(tmp_path):
    root = davis(tmp_path)
    mask(root / "Annotations/480p/bear/00009.png")
    with pytest.raises(InputError, match=r"bear/00009\.png: a mask without its frame"):
        open_dataset("davis16", root, "all")


def test_a_folder_may_have_masks_for_some_frames(tmp_path):
    root = davis(tmp_path)
    (root / "Annotations/480p/bear/00001.png").unlink()
    records = open_dataset("folder", root, "train")
    assert [r.mask is not None for r in records] == [True, False, True, True, True]
    assert records[1].read_mask() is None


# ---- fbms59


def test_fbms_ground_truth_is_sparse(tmp_path):
    found = read(open_dataset("fbms59", fbms(tmp_path), "test"))
    assert list(found) == ["camel01", "marple2", "marple7", "tennis"]
    assert list(found["tennis"]) == ["tennis455", "tennis456", "tennis464"]  # 10 after 2
    assert [m is not None for m in found["tennis"].values()] == [True, False, False]
    assert np.array_equal(found["tennis"]["tennis455"], EXPECTED)


def test_fbms_grey_levels_are_objects(tmp_path):
    found = read(open_dataset("fbms59", fbms(tmp_path), "train"))
    assert list(found) == ["cars2"]
    assert np.array_equal(found["cars2"]["cars2_01"], EXPECTED)


def test_fbms_colour_masks_have_a_white_background(tmp_path):
    """Paired by number, *PROB* and the .pgm beside them left out."""
    found = read(open_dataset("fbms59", fbms(tmp_path), "test"))["camel01"]
    assert [m is not None for m in found.values()] == [True, False, True]
    assert np.array_equal(found["camel01_01"], EXPECTED)
    assert np.array_equal(found["camel01_10"], EXPECTED)


@pytest.mark.parametrize("name", ["marple2", "marple7"])
def test_fbms_sequences_with_thresholds_of_their_own(tmp_path, name):
    found = read(open_dataset("fbms59", fbms(tmp_path), "val"))
    assert np.array_equal(found[name][f"{name}_01"], EXPECTED)


def test_fbms_that_is_broken(tmp_path):
    root = fbms(tmp_path)
    mask(root / "Trainingset/cars2/GroundTruth/cars2_77.pgm")
    with pytest.raises(InputError, match=r"cars2_77\.pgm: a mask without its frame"):
        open_dataset("fbms59", root, "train")
    with pytest.raises(InputError, match="split is 'dev'; fbms59 has train, test, all"):
        open_dataset("fbms59", root, "dev")
    for path in (root / "Testset/tennis/GroundTruth").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"GroundTruth: no \.pgm or \.ppm mask"):
        open_dataset("fbms59", root, "test")


# ---- segtrackv2


def test_segtrack_unites_objects_and_drops_penguin(tmp_path):
    found = read(open_dataset("segtrackv2", segtrack(tmp_path), "test"))
    assert list(found) == ["bmx", "frog", "worm"]
    for name, masks in found.items():
        assert list(masks) == [f"{name}_00000", f"{name}_00001"]
        assert all(np.array_equal(m, EXPECTED) for m in masks.values()), name
    assert "penguin" in open_dataset("segtrackv2", tmp_path, "all").sequences


def test_segtrack_that_is_broken(tmp_path):
    root = segtrack(tmp_path)
    mask(root / "GroundTruth/bmx/2/bmx_00001.png", square(size=(12, 20)))
    with pytest.raises(InputError, match=r"bmx_00001\.png: the mask is 20x12, another object's"):
        read(open_dataset("segtrackv2", root, "test"))
    for t in range(2):
        (root / f"GroundTruth/frog/frog_{t:05d}.bmp").unlink()
    with pytest.raises(InputError, match=r"frog_00000\.png: a frame without its mask"):
        open_dataset("segtrackv2", root, "test")


# ---- repack


@pytest.mark.parametrize("folder", ["GT_object_level", "ground-truth"])
@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_repacks_have_masks_of_any_mode_for_some_frames(tmp_path, folder, mode):
    for t in range(4):
        image(tmp_path / "camel01/Imgs" / f"camel01_{t:05d}.jpg")
    soft = square(255)
    if mode != "1":
        soft[6, 3:9], soft[1, 3:9] = 127, 10  # anti-aliased
    mask(tmp_path / "camel01" / folder / "camel01_00000.png", soft, mode)
    found = read(open_dataset("repack", tmp_path, "test"))["camel01"]
    assert [m is not None for m in found.values()] == [True, False, False, False]
    assert np.array_equal(found["camel01_00000"], EXPECTED)


def test_repack_that_is_broken(tmp_path):
    image(tmp_path / "a/Imgs/0.jpg")
    with pytest.raises(InputError, match="/a: it has to hold one of Imgs"):
        open_dataset("repack", tmp_path, "test")
    mask(tmp_path / "a/GT_object_level/1.png")
    with pytest.raises(InputError, match=r"1\.png: a mask without its frame"):
        open_dataset("repack", tmp_path, "test")
    (tmp_path / "a").rename(tmp_path / "static_images")
    with pytest.raises(InputError, match="open it as stills"):
        open_dataset("repack", tmp_path, "test")


# ---- stills


def test_stills_are_sequences_of_one_frame(tmp_path):
    for name in ("a", "b"):
        image(tmp_path / "images" / f"{name}.jpg")
        mask(tmp_path / "masks" / f"{name}.png")
    records = open_dataset("stills", tmp_path, "train")
    assert [(r.sequence, r.frame) for r in records] == [("a", 0), ("b", 0)]
    assert np.array_equal(records[0].read_mask(), EXPECTED)
    (tmp_path / "masks/b.png").unlink()
    with pytest.raises(InputError, match=r"b\.jpg: an image without its mask"):
        open_dataset("stills", tmp_path, "train")
    (tmp_path / "images/b.jpg").unlink()
    mask(tmp_path / "masks/c.png")
    with pytest.raises(InputError, match=r"c\.png: a mask without its image"):
        open_dataset("stills", tmp_path, "train")
    (tmp_path / "Masks2").mkdir()
    with pytest.raises(InputError, match="no frame of stills train"):
        open_dataset("stills", tmp_path, "train", images="Masks2", masks="Masks2")
    with pytest.raises(InputError, match="no folder of images"):
        open_dataset("stills", tmp_path / "Masks2", "train")


def test_a_list_of_names_chooses_stills(tmp_path):
    for name in ("a", "b", "c10"):
        image(tmp_path / "images" / f"{name}.jpg")
        mask(tmp_path / "ground_truth_mask" / f"{name}.png")
    listed = tmp_path / "some.txt"
    listed.write_text("c10\na\n")
    records = open_dataset("stills", tmp_path, str(listed))
    assert list(records.sequences) == ["a", "c10"]
    listed.write_text("d\n")
    with pytest.raises(InputError, match="no sequence 'd'"):
        open_dataset("stills", tmp_path, str(listed))
    listed.write_text("")
    with pytest.raises(InputError, match="list without names"):
        open_dataset("stills", tmp_path, str(listed))
    with pytest.raises(InputError, match="not a readable list"):
        open_dataset("stills", tmp_path, str(tmp_path / "other.txt"))


def test_duts_as_published(tmp_path):
    for part in ("DUTS-TR", "DUTS-TE"):
        image(tmp_path / part / f"{part}-Image" / f"{part}.jpg")
        mask(tmp_path / part / f"{part}-Mask" / f"{part}.png")
    assert [r.name for r in open_dataset("duts", tmp_path, "train")] == ["DUTS-TR"]
    assert [r.name for r in open_dataset("duts", tmp_path / "DUTS-TE", "test")] == ["DUTS-TE"]
    with pytest.raises(InputError, match="split is 'val'; duts has train, test"):
        open_dataset("duts", tmp_path, "val")


# ---- coco


def test_coco_groups_of_five_images_of_one_category(tmp_path):
    records = open_dataset("coco", coco_tree(tmp_path), "train")
    assert list(records.sequences) == ["polar-bear-00000", "polar-bear-00001"]
    names = [r.name for r in records]
    assert len(names) == 10 and len(set(names)) == 10
    assert f"{1:012d}" not in names  # a crowd region
    again = open_dataset("coco", tmp_path, "train")
    assert names == [r.name for r in again]
    assert names != [r.name for r in open_dataset("coco", tmp_path, "train", seed=1)]
    for record in records:
        found = record.read_mask()
        assert found.shape == (100, 120) and found[10:80, 20:90].all()
        rest = found.copy()
        rest[10:80, 20:90] = 0
        # The first image has a small instance of the category, which counts as well.
        expected = 100 if record.name == f"{0:012d}" else 0
        assert rest.sum() == expected


def test_coco_run_lengths():
    array = np.zeros((5, 4), np.uint8)
    array[1:4, 1:3] = 1
    counts = [6, 3, 2, 3, 6]
    rle = dict(counts=counts, size=[5, 4])
    assert np.array_equal(coco.decode_rle(rle, 5, 4), array)
    assert np.array_equal(coco.union((rle,), 5, 4), array * 255)
    with pytest.raises(InputError, match="do not fill 6x4"):
        coco.decode_rle(rle, 6, 4)
    # Texts as the COCO tools write them, differences and negative ones among them.
    assert coco.decode_text(b"63221") == [6, 3, 2, 5, 3]
    codes = pytest.importorskip("pycocotools.mask", reason="the reference decoder")
    random = np.random.default_rng(0)
    for cut in (0.05, 0.5, 0.98):
        array = (random.random((37, 53)) < cut).astype(np.uint8)
        array[5:30, 7:40] ^= 1
        code = codes.encode(np.asfortranarray(array))
        assert np.array_equal(coco.decode_rle(code, 37, 53), array)


@pytest.mark.filterwarnings("ignore:__array__")  # of pycocotools under NumPy 2
def test_coco_polygons_are_those_of_the_coco_tools():
    codes = pytest.importorskip("pycocotools.mask", reason="the reference decoder")
    random = np.random.default_rng(1)
    for _ in range(20):
        angle = np.sort(random.uniform(0, 2 * np.pi, 12))
        radius = random.uniform(10, 28, 12)
        points = np.stack([40 + radius * np.cos(angle), 32 + radius * np.sin(angle)], 1)
        outline = points.round(2).ravel().tolist()
        ours = coco.union(([outline],), 64, 80) > 0
        theirs = codes.decode(codes.frPyObjects([outline], 64, 80))[..., 0] > 0
        assert (ours & theirs).sum() > 0.97 * (ours | theirs).sum()


def test_coco_that_is_broken(tmp_path):
    with pytest.raises(InputError, match="train2017: no such folder"):
        open_dataset("coco", tmp_path, "train")
    root = coco_tree(tmp_path)
    (root / "train2017" / f"{3:012d}.jpg").unlink()
    with pytest.raises(InputError, match=r"000003\.jpg: no such image, but .*train2017\.json"):
        open_dataset("coco", root, "train")
    text(root / "annotations/instances_train2017.json", "{")
    with pytest.raises(InputError, match=r"train2017\.json: not JSON, so not the instances file"):
        open_dataset("coco", root, "train")
    (root / "annotations/instances_train2017.json").unlink()
    with pytest.raises(InputError, match=r"train2017\.json: no such instances file"):
        open_dataset("coco", root, "train")


# ---- real data

real = pytest.mark.skipif("VSOD_DATA" not in os.environ, reason="VSOD_DATA is not set")


@real
def test_real_davis():
    records = open_dataset("davis16", Path(os.environ["VSOD_DATA"], "davis16-270p"), "train")
    assert (len(records.sequences), len(records)) == (30, 2079)
    empty = [r for r in records.sequences["bmx-bumps"] if not r.read_mask().any()]
    assert len(empty) > 0


@real
@pytest.mark.parametrize(
    ("part", "annotated"), [("DAVIS", 4), ("DAVSOD", 4), ("FBMS", 1), ("VISAL", 1)]
)
def test_real_repacks(part, annotated):
    records = open_dataset("repack", Path(os.environ["VSOD_DATA"], "layouts/test", part), "test")
    masks = [r.read_mask() for r in records if r.mask is not None]
    assert len(records) == 4 and len(masks) == annotated
    assert all(0.001 < m.mean() < 0.7 for m in masks)
