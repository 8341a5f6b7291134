"""Evaluation against plain loops over py_sod_metrics, and everything that a folder can lack."""

import csv
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")
py_sod_metrics = pytest.importorskip("py_sod_metrics")
pytest.importorskip("typer")
pytest.importorskip("rich")
Image = pytest.importorskip("PIL.Image")

from vsod_models import cli  # noqa: E402
from vsod_models.data.records import Record, Records  # noqa: E402
from vsod_models.errors import InputError  # noqa: E402
from vsod_models.evaluation import (  # noqa: E402
    MEASURES,
    PROTOCOLS,
    SaliencyEvaluator,
    evaluate_folder,
    score_frame,
)
from vsod_models.evaluation.evaluator import read_prediction  # noqa: E402
from vsod_models.evaluation.figures import draw_grid, shared_frames  # noqa: E402
from vsod_models.evaluation.measures import weighted_f_measure  # noqa: E402

SIZE = (24, 31)


def blob(generator, size=SIZE):
    """A mask of one ellipse and a map that is roughly it, with noise and a narrow range."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    centre = generator.uniform(0.3, 0.7, 2) * size
    radius = generator.uniform(0.15, 0.3, 2) * size
    distance = np.hypot((rows - centre[0]) / radius[0], (columns - centre[1]) / radius[1])
    noisy = 0.9 / (1 + np.exp(6 * (distance - 1))) + generator.uniform(0, 0.1, size)
    return (20 + 200 * noisy).astype(np.uint8), distance < 1


def make_sequences(lengths=(("a", 5), ("b", 3), ("c", 9)), size=SIZE):
    """sequence -> frame name -> (prediction, mask)."""
    generator = np.random.default_rng(0)
    return {
        sequence: {f"{frame:05d}": blob(generator, size) for frame in range(length)}
        for sequence, length in lengths
    }


@pytest.fixture
def tree(tmp_path):
    """A folder of predictions and the records of its ground truth, 5 + 3 + 9 frames."""
    return write_tree(tmp_path, make_sequences())


def write_tree(folder, sequences):
    records = []
    for sequence, frames in sequences.items():
        (folder / "pred" / sequence).mkdir(parents=True)
        (folder / "gt" / sequence).mkdir(parents=True)
        for index, (name, (prediction, mask)) in enumerate(frames.items()):
            path = folder / "gt" / sequence / f"{name}.png"
            Image.fromarray(mask.astype(np.uint8) * 255).save(path)
            Image.fromarray(prediction).save(folder / "pred" / sequence / f"{name}.png")
            records.append(Record(sequence, index, name, path, path, "val"))
    return folder / "pred", Records("blobs", "val", records)


def library_loop(frames, protocol):
    """The library alone, one (prediction uint8, ground truth uint8 0 or 255) after another: the
    averages of one sequence, curves as they are.  The library has no curve of 255 thresholds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Fmeasure announces its successor
        metrics = {
            "MAE": py_sod_metrics.MAE(),
            "S": py_sod_metrics.Smeasure(),
            "wF": py_sod_metrics.WeightedFmeasure(),
            "F": py_sod_metrics.Fmeasure(beta=0.3),
            "E": py_sod_metrics.Emeasure(),
        }
    for prediction, truth in frames:
        for name, metric in metrics.items():
            if protocol != "davsod" and name in ("MAE", "S", "wF"):
                metric.step(
                    prediction / 255, truth > PROTOCOLS[protocol].mask_above, normalize=False
                )
            else:
                metric.step(prediction, truth)
    results = {
        "MAE": metrics["MAE"].get_results()["mae"],
        "S": metrics["S"].get_results()["sm"],
        "wF": metrics["wF"].get_results()["wfm"],
        "adpF": metrics["F"].get_results()["fm"]["adp"],
        "adpE": metrics["E"].get_results()["em"]["adp"],
    }
    if protocol != "frame":
        results["F curve"] = metrics["F"].get_results()["fm"]["curve"]
        results["E curve"] = metrics["E"].get_results()["em"]["curve"]
        results["precision"] = metrics["F"].get_results()["pr"]["p"]
        results["recall"] = metrics["F"].get_results()["pr"]["r"]
    return results


def numbers(results):
    """The averages of `library_loop` as a row of a table."""
    row = {name: value for name, value in results.items() if name in MEASURES}
    for letter in "FE":
        if f"{letter} curve" in results:
            row[f"max{letter}"] = results[f"{letter} curve"].max()
            row[f"mean{letter}"] = results[f"{letter} curve"].mean()
    return row


def assert_parity(result, frames_used, tolerance=1e-6):
    """`frames_used`: sequence -> pairs for `library_loop`; averaged here by hand."""
    loops = {name: library_loop(pairs, result.protocol) for name, pairs in frames_used.items()}
    for name, loop in loops.items():
        for measure, expected in numbers(loop).items():
            assert result.sequences[name][measure] == pytest.approx(expected, abs=tolerance)
    if result.protocol != "frame":
        weights = [1 / len(loops)] * len(loops)
    else:
        total = sum(len(pairs) for pairs in frames_used.values())
        weights = [len(pairs) / total for pairs in frames_used.values()]
    overall = {
        key: sum(w * loop[key] for w, loop in zip(weights, loops.values(), strict=True))
        for key in next(iter(loops.values()))
    }
    row = numbers(overall)
    assert set(row) == set(MEASURES) or result.protocol == "frame"
    for measure, expected in row.items():
        assert result.overall[measure] == pytest.approx(expected, abs=tolerance), measure
    if result.protocol != "frame":  # the library's thresholds go down, ours up
        for curve, key in {"F": "F curve", "E": "E curve", "precision": "precision"}.items():
            np.testing.assert_allclose(result.curves[curve], overall[key][::-1], atol=tolerance)


# ---- numbers


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_equals_a_loop_over_the_library(protocol):
    sequences = make_sequences()
    evaluator = SaliencyEvaluator(protocol)
    used = {}
    for sequence, frames in sequences.items():
        for name, (prediction, mask) in frames.items():
            evaluator.add(sequence, name, prediction, mask)
        pairs = [(prediction, mask.astype(np.uint8) * 255) for prediction, mask in frames.values()]
        used[sequence] = pairs if protocol == "frame" else pairs[1:-1]
    result = evaluator.result()
    assert result.frames == {name: len(pairs) for name, pairs in used.items()}
    assert_parity(result, used, tolerance=1e-7)


def test_davis_equals_a_loop_over_the_library(request):
    """Published maps; four frames a sequence, all of them when --sweep is raised."""
    if "VSOD_DATA" not in os.environ:
        pytest.skip("VSOD_DATA is not set")
    maps = Path(os.environ["VSOD_DATA"], "mtnet-davis16-maps")
    truths = Path(os.environ["VSOD_DATA"], "davis16-270p", "Annotations", "480p")
    whole = request.config.getoption("--sweep") > 12
    records, used = [], {}
    for folder in sorted(path for path in maps.iterdir() if path.is_dir()):
        paths = sorted((truths / folder.name).glob("*.png"))
        paths = paths if whole else [*paths[:5], paths[-1]]
        records += [
            Record(folder.name, index, path.stem, path, path, "val")
            for index, path in enumerate(paths)
        ]
        used[folder.name] = pairs = []
        for path in paths[1:-1]:
            truth = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
            prediction = cv2.imread(str(folder / path.name), cv2.IMREAD_GRAYSCALE)
            pairs.append((cv2.resize(prediction, truth.shape[::-1]), truth))
    assert not (maps / "dog" / "00059.png").exists()  # nor is any other last one: none is asked for
    result = evaluate_folder(maps, Records("davis16", "val", records), "davsod", workers=2)
    assert sum(result.frames.values()) == (639 if whole else 40)
    assert_parity(result, used)

    inner = [
        record for frames in Records("", "", records).sequences.values() for record in frames[1:-1]
    ]
    result = evaluate_folder(maps, Records("davis16", "val", inner), "frame", workers=2)
    assert_parity(result, used)


def test_weighted_f_measure_equals_the_library_s():
    """Objects at borders, many objects, single rows and columns; ties between nearest pixels."""
    generator = np.random.default_rng(4)
    library = py_sod_metrics.WeightedFmeasure().cal_wfm
    for case in range(200):
        size = generator.integers(1, 40, 2)
        mask = generator.random(size) < generator.choice([0.003, 0.02, 0.1, 0.5, 0.98])
        if case % 2:
            mask = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))) > 0
        saliency = generator.random(size)
        expected = library(saliency, mask) if mask.any() else 0
        assert weighted_f_measure(saliency, mask) == pytest.approx(expected, abs=1e-7), case


def test_255_thresholds_are_those_of_the_definition():
    prediction, mask = blob(np.random.default_rng(3))
    scores = score_frame(prediction, mask, PROTOCOLS["frame"])
    low, high = int(prediction.min()), int(prediction.max())
    normalised = (prediction.astype(float) - low) / (high - low)
    library = py_sod_metrics.Emeasure()
    library.gt_fg_numel, library.gt_size = mask.sum(), mask.size
    assert scores.f.shape == scores.e.shape == scores.precision.shape == (255,)
    for index in range(255):
        salient = normalised >= index / 254
        hits = (salient & mask).sum()
        precision, recall = hits / max(salient.sum(), 1), hits / mask.sum()
        f = 1.3 * precision * recall / (0.3 * precision + recall) if hits else 0
        assert scores.precision[index] == pytest.approx(precision)
        assert scores.recall[index] == pytest.approx(recall)
        assert scores.f[index] == pytest.approx(f)
        e = library.cal_em_with_threshold(normalised, mask, index / 254)
        assert scores.e[index] == pytest.approx(e)


def test_maximum_of_the_averaged_curve_and_sequences_of_equal_weight():
    """One sequence is best at a low threshold, the other at a high one; they differ in length."""
    mask = np.zeros((10, 10), bool)
    mask[2:8, 2:8] = True
    low = np.where(mask, 60, 0).astype(np.uint8)
    low[2, 2] = 255  # best at thresholds up to 60
    high = np.where(mask, 255, 120).astype(np.uint8)
    high[0, 0] = 0  # best above 120
    results = {}
    for protocol in PROTOCOLS:
        evaluator = SaliencyEvaluator(protocol)
        for frame in range(3):
            evaluator.add("low", str(frame), low, mask)
        for frame in range(5):
            evaluator.add("high", str(frame), high, mask)
        results[protocol] = result = evaluator.result()
        assert result.sequences["low"]["maxF"] == result.sequences["high"]["maxF"] == 1
        assert result.overall["maxF"] == result.curves["F"].max() < 0.9
    davsod, frame = results["davsod"], results["frame"]
    assert davsod.frames == {"low": 1, "high": 3} and frame.frames == {"low": 3, "high": 5}
    for result, share in ((davsod, 1 / 2), (frame, 3 / 8)):
        expected = sum(
            weight * result.sequences[name]["wF"]
            for name, weight in (("low", share), ("high", 1 - share))
        )
        assert result.overall["wF"] == pytest.approx(expected)
    # Normalised, `high` has 120/255 on its background; `low` has 60/255 in its object.
    assert davsod.sequences["low"]["MAE"] == pytest.approx(35 * (1 - 60 / 255) / 100)
    halved = SaliencyEvaluator("davsod")
    halved.add("low", "0", low // 2 + 3, mask)
    raw = SaliencyEvaluator("frame")
    raw.add("low", "0", low // 2 + 3, mask)
    assert halved.result().overall["MAE"] < raw.result().overall["MAE"]


def test_perfect_and_inverted_maps():
    _, mask = blob(np.random.default_rng(1), (40, 40))
    for prediction, expected in ((mask, 1), (~mask, 0)):
        measures = score_frame(
            prediction.astype(np.uint8) * 255, mask, PROTOCOLS["davsod"]
        ).measures()
        assert measures["MAE"] == pytest.approx(1 - expected)
        assert measures["adpF"] == pytest.approx(expected)
        assert measures["wF"] == pytest.approx(expected, abs=0.1)
        assert measures["adpE"] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("grey", ["blob", 0, 77, 255])
def test_no_score_is_nan(protocol, grey):
    generator = np.random.default_rng(2)
    prediction, _ = blob(generator)
    if grey != "blob":
        prediction[:] = grey
    masks = {name: np.zeros(SIZE, bool) for name in ("empty", "column", "corner", "pixel")}
    masks["column"][:, -1] = True  # an object that enters or leaves: its S is NaN in the library
    masks["corner"][-1, -1] = True
    masks["pixel"][3, 3] = True
    masks["full"] = np.ones(SIZE, bool)
    for name, mask in masks.items():
        scores = score_frame(prediction, mask, PROTOCOLS[protocol])
        assert all(np.isfinite(value).all() for value in scores), name
        if name == "empty":
            saliency = prediction / 255
            if protocol == "davsod" and grey == "blob":
                saliency = (saliency - saliency.min()) / np.ptp(saliency)
            assert scores.mae == pytest.approx(saliency.mean())
            assert scores.s == pytest.approx(1 - saliency.mean())
            assert scores.weighted_f == scores.adaptive_f == scores.f.max() == 0
            assert scores.e[0] == 0  # everything is salient at threshold 0


# ---- arrays


def test_arrays_in_any_order_and_again():
    frames = make_sequences([("a", 12)])["a"]
    expected, shuffled, other = (SaliencyEvaluator() for _ in range(3))
    for name, pair in frames.items():
        expected.add("a", str(int(name)), *pair)  # 0 .. 11: "10" comes after "9"
    for name, (prediction, mask) in reversed(frames.items()):
        part = other if int(name) % 2 else shuffled
        part.add("a", str(int(name)), 255 - prediction, mask)
        part.add("a", str(int(name)), prediction, mask)
    shuffled.merge(other)
    assert shuffled.result().skipped == expected.result().skipped == {"a": ["0", "11"]}
    assert shuffled.result().overall == pytest.approx(expected.result().overall)
    with pytest.raises(ValueError, match="protocols davsod and frame differ"):
        shuffled.merge(SaliencyEvaluator("frame"))


def test_floating_point_is_what_a_saved_map_would_be():
    prediction, mask = blob(np.random.default_rng(5))
    saved, exact = SaliencyEvaluator(), SaliencyEvaluator()
    saved.add("a", "0", prediction, mask)
    exact.add("a", "0", (prediction / 255).astype(np.float32), mask.astype(np.float32))
    assert exact.result().to_json() == saved.result().to_json()
    resized = SaliencyEvaluator()
    resized.add("a", "0", cv2.resize(prediction, (62, 48)), mask)
    assert resized.result().overall["maxF"] == pytest.approx(
        saved.result().overall["maxF"], abs=0.05
    )


@pytest.mark.parametrize(
    ("prediction", "mask", "message"),
    [
        (np.zeros((3, 4, 1), np.uint8), np.zeros((3, 4)), r"prediction has to be \(H, W\)"),
        (np.zeros((3, 4), np.int64), np.zeros((3, 4)), "uint8 or floating point, not int64"),
        (np.full((3, 4), np.nan), np.zeros((3, 4)), r"outside of \[0, 1\]"),
        (np.full((3, 4), 1.5), np.zeros((3, 4)), r"outside of \[0, 1\]"),
        (np.zeros((3, 4)), np.zeros((3, 4, 3)), r"mask has to be \(H, W\)"),
        (np.zeros((3, 4)), np.full((3, 4), 255), "threshold it first"),
    ],
)
def test_wrong_arrays(prediction, mask, message):
    with pytest.raises(ValueError, match=message):
        SaliencyEvaluator().add("a", "0", prediction, mask)


def test_no_frames_and_no_such_protocol():
    with pytest.raises(ValueError, match="no frames"):
        SaliencyEvaluator().result()
    with pytest.raises(InputError, match="'davis': there are davsod, davsod-raw, frame"):
        SaliencyEvaluator("davis")


# ---- folders


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_folder_equals_arrays_and_workers_change_nothing(tree, protocol):
    predictions, records = tree
    evaluator = SaliencyEvaluator(protocol)
    for record in records:
        prediction = np.array(Image.open(predictions / record.sequence / f"{record.name}.png"))
        evaluator.add(record.sequence, record.name, prediction, record.read_mask())
    calls = []
    one = evaluate_folder(predictions, records, protocol, advance=lambda **at: calls.append(at))
    two = evaluate_folder(predictions, records, protocol, workers=2)
    assert one.to_json() == two.to_json() == {**evaluator.result().to_json(), "dataset": "blobs"}
    total = 17 if protocol == "frame" else 11
    assert calls[-1] == {"completed": total, "total": total} and len(calls) == total


def test_annotated_frames_count_and_skipped_files_are_not_touched(tree):
    predictions, records = tree
    sparse = [
        Record(r.sequence, r.frame, r.name, r.image, r.mask if r.frame % 2 else None, "val")
        for r in records
    ]
    (predictions / "c" / "00001.png").write_bytes(b"first annotated")
    (predictions / "c" / "00007.png").unlink()  # last annotated
    result = evaluate_folder(predictions, Records("blobs", "val", sparse))
    assert result.frames == {"a": 2, "b": 1, "c": 2}
    assert result.skipped == {"c": ["00001", "00007"]}
    assert result.kept_whole == ["a", "b"]


def test_missing_predictions(tree):
    predictions, records = tree
    for name in ("00003", "00004", "00006"):
        (predictions / "c" / f"{name}.png").unlink()
    (predictions / "b" / "00001.png").unlink()
    with pytest.raises(InputError, match=r"4 of 11 .* missing: b 00001; c 00003-00004, 00006$"):
        evaluate_folder(predictions, records)
    result = evaluate_folder(predictions, records, allow_missing=True)
    assert result.missing == {"b": ["00001"], "c": ["00003", "00004", "00006"]}
    assert result.frames == {"a": 3, "c": 4} and "b" not in result.sequences
    for path in predictions.glob("*/*.png"):
        path.unlink()
    with pytest.raises(InputError, match="11 of 11"):
        evaluate_folder(predictions, records, allow_missing=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_prediction_is_named(tree, workers):
    predictions, records = tree
    path = predictions / "c" / "00004.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"c/00004.png: not a readable picture"):
        evaluate_folder(predictions, records, workers=workers)


def test_coloured_predictions_count_by_their_luma(tmp_path):
    colours = np.zeros((*SIZE, 3), np.uint8)
    colours[..., 0], colours[:9, :, 1] = 200, 100
    Image.fromarray(colours).save(tmp_path / "colours.png")
    expected = np.array(Image.fromarray(colours).convert("L"), int)
    assert abs(read_prediction(tmp_path / "colours.png") - expected).max() <= 1


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "LA", "P", "16 bit"])
def test_pictures_of_other_kinds_are_read_as_grey(tree, kind):
    predictions, records = tree
    expected = evaluate_folder(predictions, records).to_json()
    for path in predictions.glob("*/*.png"):
        with Image.open(path) as picture:
            grey = np.array(picture)
        if kind == "16 bit":
            Image.fromarray(grey.astype(np.uint16) * 257).save(path)
        elif kind == "P":  # the palette runs backwards: its indices are not the levels
            picture = Image.fromarray(255 - grey, "P")
            picture.putpalette(np.repeat(np.arange(255, -1, -1, dtype=np.uint8), 3).tobytes())
            picture.save(path)
        else:
            Image.fromarray(grey).convert(kind).save(path)
    assert evaluate_folder(predictions, records).to_json() == expected


def test_other_sizes_are_resized_and_told(tree):
    predictions, records = tree
    expected = evaluate_folder(predictions, records).overall
    for path in predictions.glob("*/*.png"):
        grey = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(path), cv2.resize(grey, (93, 72)))
    before = {path: path.read_bytes() for path in predictions.glob("*/*.png")}
    result = evaluate_folder(predictions, records)
    assert result.resized == {"93x72 to 31x24": 11}
    assert result.overall["MAE"] == pytest.approx(expected["MAE"], abs=0.01)
    assert before == {path: path.read_bytes() for path in predictions.glob("*/*.png")}


def test_wrong_folders(tree, tmp_path):
    predictions, records = tree
    with pytest.raises(InputError, match="nowhere: not a folder of predictions"):
        evaluate_folder(tmp_path / "nowhere", records)
    message = r"holds the folders gt, pred, and none of the 3 sequences of blobs val \(a, b, c\)"
    with pytest.raises(InputError, match=message):
        evaluate_folder(tmp_path, records)
    with pytest.raises(InputError, match="holds no folder and 5 files"):
        evaluate_folder(predictions / "a", records)
    with pytest.raises(InputError, match="no frame has ground truth"):
        evaluate_folder(predictions, Records("blobs", "val", []))
    with pytest.raises(InputError, match="workers is 0"):
        evaluate_folder(predictions, records, workers=0)
    (predictions / "dog").mkdir()
    assert evaluate_folder(predictions, records).strangers == ["dog"]


def only_above_100(picture):
    return picture > 100


def test_ground_truth_threshold_is_the_protocol_s(tmp_path):
    """Level 128 is background for davsod; a dataset's own rule stands."""
    prediction, mask = blob(np.random.default_rng(6))
    predictions, records = write_tree(tmp_path, {"a": {"0": (prediction, mask)}})
    path = records[0].mask
    Image.fromarray(np.where(mask, 128, 0).astype(np.uint8)).save(path)
    assert evaluate_folder(predictions, records, "davsod").overall["maxF"] == 0
    assert evaluate_folder(predictions, records, "frame").overall["maxF"] > 0.5
    own = Record("a", 0, "0", path, path, "val", foreground=only_above_100)
    result = evaluate_folder(predictions, Records("blobs", "val", [own]), "davsod")
    assert result.overall["maxF"] > 0.5


def test_workers_start_without_torch():
    code = "import sys, vsod_models.evaluation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- the command


@pytest.fixture
def vsod_eval(tree, monkeypatch, capsys):
    predictions, records = tree
    opened = []

    def open_dataset(name, root, split):
        opened.append((name, root, split))
        return records

    monkeypatch.setattr("vsod_models.data.open_dataset", open_dataset, raising=False)

    def run(*arguments):
        command = ["eval", "--data", "somewhere", "--dataset", "blobs", "--workers", "1"]
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, *map(str, arguments)])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    run.predictions, run.opened = predictions, opened
    return run


def test_command_writes_all(vsod_eval, tmp_path):
    (vsod_eval.predictions / "c" / "00004.png").unlink()
    files = {name: tmp_path / "out" / f"o.{name}" for name in ("json", "csv", "png")}
    code, out, err = vsod_eval(
        "--pred", vsod_eval.predictions, "--split", "test", "--allow-missing",
        "--json", files["json"], "--csv", files["csv"], "--curves", files["png"],
    )  # fmt: skip
    assert code == 0, err
    assert vsod_eval.opened == [("blobs", Path("somewhere"), "test")]
    said = " ".join(out.split())
    assert "protocol davsod" in said and "Used: 10 frames of 3 sequences." in said
    assert "Skipped by the protocol, 6 frames: a 00000, 00004; b 00000, 00002; c 00000" in said
    assert "Missing and left out, 1 prediction: c 00004." in said
    document = json.loads(files["json"].read_text())
    assert list(document) == ["protocol", "dataset", "frames", "overall", "sequences"]
    assert (document["protocol"], document["dataset"]) == ("davsod", "blobs")
    assert document["frames"] == 10
    assert list(document["sequences"]) == ["a", "b", "c"]
    for row in (document["overall"], *document["sequences"].values()):
        assert tuple(row) == MEASURES
    with open(files["csv"], newline="") as file:
        rows = {row["sequence"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["overall", "a", "b", "c"]
    assert float(rows["c"]["maxF"]) == document["sequences"]["c"]["maxF"]
    assert rows["c"]["frames"] == "6"
    with Image.open(files["png"]) as picture:
        assert np.array(picture.convert("L")).std() > 5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "o.csv",
        "o.json",
        "o.png",
    ]


def test_command_compares(vsod_eval, tmp_path):
    folder = vsod_eval.predictions
    code, out, _ = vsod_eval(
        "--pred", folder, "--pred", f"again={folder}", "--protocol", "frame",
        "--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv", "--curves", tmp_path / "o.svg",
    )  # fmt: skip
    assert code == 0
    document = json.loads((tmp_path / "o.json").read_text())
    assert list(document) == ["pred", "again"]
    assert document["pred"] == document["again"] and document["pred"]["protocol"] == "frame"
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 1 + 2 * 4
    assert out.count("again") == 2  # the title of its table and its row of the comparison


def test_command_draws(vsod_eval, tmp_path):
    """A point and a bar for each method, at its numbers; a row for each sequence of the grid."""
    folder = vsod_eval.predictions
    other = tmp_path / "other"
    for path in folder.glob("*/*.png"):
        (other / path.parent.name).mkdir(parents=True, exist_ok=True)
        with Image.open(path) as picture:
            Image.fromarray(255 - np.array(picture)).save(other / path.parent.name / path.name)
    drawings = {kind: tmp_path / f"{kind}.svg" for kind in ("scatter", "bars", "grid")}
    code, _, err = vsod_eval(
        "--pred", f"one={folder}", "--pred", f"two={other}", "--json", tmp_path / "o.json",
        *(argument for kind, path in drawings.items() for argument in (f"--{kind}", path)),
    )  # fmt: skip
    assert code == 0, err
    document = json.loads((tmp_path / "o.json").read_text())
    drawn = {kind: path.read_text() for kind, path in drawings.items()}
    for name in ("one", "two"):
        overall = document[name]["overall"]
        assert f"<!-- {name}  {overall['MAE']:.3f} / {overall['S']:.3f} -->" in drawn["scatter"]
        assert f"<!-- {overall['MAE']:.3f} -->" in drawn["bars"]
        assert f"<!-- {name} -->" in drawn["bars"] and f"<!-- {name} -->" in drawn["grid"]
    assert all("<!-- blobs, protocol davsod -->" in drawing for drawing in drawn.values())
    assert drawn["grid"].count("<image") == 3 * 4, "frame, ground truth and two maps of each"


def test_the_grid_shows_what_all_methods_have(tree, tmp_path):
    predictions, records = tree
    other = tmp_path / "other"
    shutil.copytree(predictions, other)
    (other / "c" / "00004.png").unlink()
    shown = shared_frames(records, {"one": predictions}, "davsod")
    assert [(r.sequence, r.name) for r in shown] == [("a", "00002"), ("b", "00001"), ("c", "00004")]
    shown = shared_frames(records, {"one": predictions, "two": other}, "davsod")
    assert (shown[2].sequence, shown[2].name) == ("c", "00005")
    result = evaluate_folder(predictions, records)
    with pytest.raises(InputError, match="a frame that all predictions have"):
        draw_grid(tmp_path / "o.png", {"x": result}, {"x": tmp_path / "none"}, records)


def test_command_refuses(vsod_eval, tmp_path):
    folder = vsod_eval.predictions
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (
            ["--pred", folder, "--protocol", "davis"],
            "protocol 'davis': there are davsod, davsod-raw, frame",
        ),
        (["--pred", folder, "--curves", tmp_path / "o.txt"], "has to end in .png, .svg or .pdf"),
        (["--pred", folder, "--bars", tmp_path / "o.jpg"], "--bars"),
        (["--pred", folder, "--grid", tmp_path / "o.gif"], ".png, .svg, .pdf or .jpg"),
        (["--pred", folder, "--pred", folder], "give it a name of its own, as in NAME="),
        (["--pred", folder, "--json", tmp_path / "file" / "o.json"], "file: file exists"),
        (["--pred", tmp_path], "none of the 3 sequences"),
    ):
        code, _, err = vsod_eval(*arguments)
        assert code == 2 and message in err and err.count("\n") == 1, err


def test_nothing_is_left_of_a_failure(vsod_eval, tmp_path):
    (vsod_eval.predictions / "c" / "00004.png").write_bytes(b"torn")
    written = tmp_path / "o.json"
    written.write_text("as it was")
    before = sorted(tmp_path.iterdir())
    code, _, err = vsod_eval(
        "--pred", vsod_eval.predictions, "--json", written, "--csv", tmp_path / "o.csv"
    )
    assert code == 2 and "00004.png" in err
    assert written.read_text() == "as it was" and sorted(tmp_path.iterdir()) == before


def test_folder_without_write_permission(vsod_eval, tmp_path, monkeypatch):
    """Known before the work, and the file named is the one asked for.  Root may write anywhere."""

    def refuse(prefix, suffix, dir):
        raise PermissionError(13, "Permission denied", f"{dir}/{prefix}x{suffix}")

    monkeypatch.setattr("vsod_models.files.tempfile.mkstemp", refuse)
    (vsod_eval.predictions / "c" / "00004.png").unlink()
    target = tmp_path / "locked" / "o.json"
    code, _, err = vsod_eval("--pred", vsod_eval.predictions, "--json", target)
    assert code == 2 and err == f"vsod: {target}: permission denied\n"
