"""The benchmark's command line on tiny problems: records, refusals, bad input, clips, report."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks_benchmarks import assert_bad_input

pytest.importorskip("rich", reason="the extra `bench` is not installed")
pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")

from benchmarks import attention, attention_rivals, measure, report
from benchmarks.__main__ import COMMANDS, main

TINY = ["--shape", "1x2x5x5", "--heads", "4", "--dim", "16", "--seconds", "0.01"]


def run(tmp_path, *arguments, code=0):
    """Run `attention` with results under `tmp_path`."""
    assert main(["attention", "--out", str(tmp_path), *arguments]) == code


def read(tmp_path, stem="attention"):
    return json.loads((tmp_path / f"{stem}.json").read_text())


@pytest.fixture
def frames(tmp_path):
    """Three colour gradients (H, W, 3) uint8."""
    x = torch.arange(48, dtype=torch.uint8)
    return [(x[:, None, None] + x[None, :, None] + 40 * t).expand(48, 48, 3) for t in range(3)]


@pytest.fixture
def video(tmp_path, frames):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 48
        for frame in frames:
            image = av.VideoFrame.from_ndarray(frame.contiguous().numpy(), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return path


@pytest.fixture
def folder(tmp_path, frames):
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "frames"
    path.mkdir()
    for i, frame in enumerate(frames):
        image.imsave(path / f"{i:05d}.png", frame.numpy())
    return path


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_records(tmp_path, capsys):
    run(tmp_path, *TINY, "--baselines", "reference,sdpa,padded,varlen", "--threads", "1")
    out = capsys.readouterr().out
    first = out.splitlines()[0]
    assert first.startswith("cpu: ") and "1 CPU thread, torch" in first
    assert "shunted_attention runs on" in first

    document = read(tmp_path)
    assert document["benchmark"] == "attention"
    assert document["machine"]["threads"] == 1
    assert {"date", "commit", "options", "method", "peak", "seconds_total"} <= set(document)
    assert [case["dtype"] for case in document["cases"]] == ["float32", "bfloat16"]
    for case in document["cases"]:
        assert case["queries"] == 50 and case["key_counts"] == [50, 9]
        assert case["left_out"] == {"varlen": "does not run on cpu"}
        measured = [r for r in case["rows"] if r["direction"] != "backward"]
        assert {(row["rival"], row["direction"]) for row in measured} == {
            (rival, direction)
            for rival in ("ours", "reference", "sdpa", "padded")
            for direction in ("forward", "forward + backward")
        }
        for row in measured:
            assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
            assert row["repeats"] >= 1 and row["share_of_peak"] > 0
            assert row["speedup_of_ours"] == 1 or row["rival"] != "ours"
            factor = 1 if row["direction"] == "forward" else 3.5
            assert row["flops"] == factor * 4 * 50 * 16 * 2 * (50 + 9)
            if sys.platform == "linux":
                assert row["peak_extra_bytes"] >= 0

    rows = list(csv.DictReader((tmp_path / "attention.csv").open()))
    assert len(rows) == sum(len(case["rows"]) for case in document["cases"])
    assert str(tmp_path) not in (tmp_path / "attention.json").read_text()
    for plot in ("speed", "memory"):
        assert (tmp_path / f"attention-{plot}.svg").stat().st_size > 0
        assert (tmp_path / f"attention-{plot}.png").stat().st_size > 0


def test_compiled_rivals_are_measured_or_named(tmp_path):
    run(tmp_path, *TINY, "--baselines", "flex,compile", "--dtype", "float32")
    (case,) = read(tmp_path)["cases"]
    forward = {row["rival"] for row in case["rows"] if row["direction"] == "forward"}
    left_out = {name.split(",")[0] for name in case["left_out"]}
    assert forward | left_out == {"ours", "flex", "compile"}


def test_rivals_that_need_a_gpu_pack_their_inputs_right(monkeypatch):
    """varlen_attn through a stand-in, SDPA backends that a CPU has too; two samples, odd sizes."""
    from torch.nn.attention import varlen

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k):
        sequences = []
        for i in range(len(cu_q) - 1):
            rows, columns = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
            assert rows.stop - rows.start <= max_q and columns.stop - columns.start <= max_k
            heads_first = (x.movedim(1, 0)[None] for x in (q[rows], k[columns], v[columns]))
            out = torch.nn.functional.scaled_dot_product_attention(*heads_first)
            sequences.append(out[0].movedim(0, 1))
        return torch.cat(sequences)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    case = attention.Case((2, 3, 5, 5), 4, 16, ((1,) * 3, (2,) * 3),
                          torch.float32, torch.device("cpu"))  # fmt: skip
    inputs = attention.Inputs.random(case, 0)
    oracle = attention.Oracle.of(inputs)
    for name in ("varlen", "padded", "sdpa-flash", "sdpa-math", "reference", "sdpa"):
        built = attention_rivals.RIVALS[name].build(case)
        oracle.check(oracle.inputs.call(built, attention.BOTH)())


def test_wrong_rival_is_refused(tmp_path, monkeypatch):
    def build(case):
        return lambda q, keys, values: attention_rivals.RIVALS["sdpa"].build(case)(
            q, keys, [v * (1 + 3e-5) for v in values]
        )

    wrong = attention_rivals.Rival("wrong", build)
    monkeypatch.setitem(attention_rivals.RIVALS, "padded", wrong)
    run(tmp_path, *TINY, "--baselines", "sdpa,padded", "--dtype", "float32")
    (case,) = read(tmp_path)["cases"]
    assert {row["rival"] for row in case["rows"]} == {"ours", "sdpa"}
    assert case["left_out"]["padded, forward"].startswith("wrong: out is off by")


def test_rival_with_wrong_gradient_is_refused(tmp_path, monkeypatch):
    def build(case):
        def attention(q, keys, values):
            out = attention_rivals.RIVALS["sdpa"].build(case)(q, keys, values)
            return out + 0 * q if not q.requires_grad else out + 1e-3 * (q - q.detach())

        return attention

    monkeypatch.setitem(attention_rivals.RIVALS, "padded", attention_rivals.Rival("bad", build))
    run(tmp_path, *TINY, "--baselines", "sdpa,padded", "--dtype", "float32")
    (case,) = read(tmp_path)["cases"]
    assert "padded" not in {row["rival"] for row in case["rows"]}
    assert case["left_out"]["padded, forward + backward"].startswith("wrong: dq is off by")


def test_ours_wrong_fails_the_run(tmp_path, monkeypatch):
    wrong = attention_rivals.Rival("wrong", lambda case: lambda q, keys, values: 2 * q)
    monkeypatch.setattr(attention, "ours", lambda backend: wrong)
    run(tmp_path, *TINY, "--baselines", "sdpa", "--dtype", "float32", code=1)
    (case,) = read(tmp_path)["cases"]
    assert {row["rival"] for row in case["rows"]} == {"sdpa"}


def test_rival_that_raises_is_named_without_paths(tmp_path, monkeypatch):
    def build(case):
        raise RuntimeError("no library at /opt/some where/lib.so\nand more lines")

    monkeypatch.setitem(attention_rivals.RIVALS, "padded", attention_rivals.Rival("x", build))
    run(tmp_path, *TINY, "--baselines", "sdpa,padded", "--dtype", "float32")
    (case,) = read(tmp_path)["cases"]
    assert case["left_out"]["padded"].startswith("RuntimeError: no library at ")
    assert "/opt" not in case["left_out"]["padded"]


def test_too_slow_is_left_out(tmp_path):
    run(tmp_path, *TINY, "--baselines", "sdpa", "--dtype", "float32", "--limit", "1e-9")
    (case,) = read(tmp_path)["cases"]
    assert case["rows"] == []
    assert "expected to take more than" in case["left_out"]["sdpa, forward"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "5x28"], "argument --shape: '5x28' is not BxTxHxW"),
        (["--shape", "1x0x2x2"], "argument --shape: '1x0x2x2' is not"),
        (["--heads", "3"], "512 is not divisible by 3"),
        (["--heads", "5", "--dim", "8"], "5 heads cannot be shared by 2 reductions"),
        (["--reductions", "1,0"], "argument --reductions: '0' is not"),
        (["--baselines", "sdpa,nothing"], "no baseline 'nothing'"),
        (["--device", "quark"], "argument --device: invalid choice: 'quark'"),
        (["--backend", "cuda"], "shunted_attention: backend 'cuda' cannot run"),
        (["--seconds", "-1"], "'-1' is not a positive number"),
        (["--sweep", "--shape", "1x2x3x3"], "take one of"),
        (["--weights", "x.pt"], "--weights is for --clip"),
        (["--clip", "nowhere.mp4"], "clip nowhere.mp4 does not exist"),
        (["--clip", "x", "--heads", "4", "--dim", "16"], "--clip has 512 channels"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    if "--clip" in arguments:
        pytest.importorskip("av", reason="PyAV is not installed")
    assert_bad_input(capsys, ["attention", "--out", tmp_path, *arguments], message)


def test_clip_of_too_few_frames(tmp_path, capsys, folder):
    pytest.importorskip("av", reason="PyAV is not installed")
    run(tmp_path, "--clip", str(folder), "--frames", "4", code=2)
    assert "has 3 frames or images; 4 are needed" in capsys.readouterr().err


def test_clip_that_is_no_video(tmp_path, capsys):
    pytest.importorskip("av", reason="PyAV is not installed")
    path = tmp_path / "text.mp4"
    path.write_text("not a video")
    run(tmp_path, "--clip", str(path), code=2)
    assert "cannot be read as video or images" in capsys.readouterr().err


def test_frames_of_video_and_folder_agree(folder, video, frames):
    from benchmarks import clip

    images, decoded = (clip.read_frames(path, 3) for path in (folder, video))
    assert images.shape == decoded.shape == (3, 3, clip.SIZE, clip.SIZE)
    assert images.dtype == torch.uint8
    assert (images.float() - decoded.float()).abs().mean() < 8  # the video is coded with loss
    for image, frame in zip(images, frames, strict=True):
        assert abs(image.float().mean() - frame.float().mean()) < 2


def test_clip(tmp_path, video):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    arguments = ["--frames", "1", "--heads", "8", "--dtype", "float32", "--baselines", "sdpa"]
    run(tmp_path, "--clip", str(video), *arguments, "--seconds", "0.01")
    document = read(tmp_path, "attention-clip-clip")
    assert [case["shape"] for case in document["cases"]] == [[1, 1, 28, 28], [1, 1, 14, 14]]
    assert document["cases"][0]["source"] == "clip.mp4, VGG16 stage 4"
    assert document["options"]["clip"] == "clip.mp4"
    assert all(case["left_out"] == {} for case in document["cases"])


def test_report_rewrites_its_section_alone_and_twice_the_same(tmp_path, capsys):
    results = tmp_path / "results" / "machine"
    run(results, *TINY, "--baselines", "sdpa", "--dtype", "float32")
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- results:attention:begin -->\nold\n<!-- results:attention:end -->\nafter\n"
    )
    arguments = ["report", "--pages", str(readme), "--results", str(results.parent)]
    assert main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "old" not in text
    assert "2x5x5 = 50, 4 x 16, float32 | forward |" in text
    assert "(results/machine/attention-speed.svg)" in text
    assert main(arguments) == 0
    assert readme.read_text() == text


def test_summary_takes_machines_that_have_all_of_it(tmp_path, capsys):
    results = measure.ROOT / "benchmarks" / "results"
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:summary:begin -->\n<!-- results:summary:end -->\n")
    assert main(["report", "--pages", str(readme), "--results", str(results)]) == 0
    table = [line for line in readme.read_text().splitlines() if line.startswith("| ")]
    assert len(table) % 7 == 0 and all(line.count("|") == 7 for line in table)
    attention = json.loads(next(results.glob("*/attention.json")).read_text())
    row = next(
        row for case in attention["cases"] for row in case["rows"]
        if case["label"] == "5x28x28 = 3,920, 4 x 128, float32"
        and (row["rival"], row["direction"]) == ("ours", "forward + backward")
    )  # fmt: skip
    assert f"| {measure.seconds_text(row['median_s'])} |" in table[2]
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "attention.json").write_text(json.dumps(attention))
    assert main(["report", "--pages", str(readme), "--results", str(tmp_path)]) == 2
    assert "no machine with results of attention, conv_lstm" in capsys.readouterr().err


def test_the_pages_say_what_was_measured():
    """Every table in README.md and docs/ is that of the committed results."""
    written = report.rewritten(report.pages(), measure.ROOT / "benchmarks" / "results")
    assert len(written) >= 3
    for page, text in written.items():
        assert text == page.read_text(), f"{page.name}: run `python -m benchmarks report`"


def test_report_without_results_or_section(tmp_path, capsys):
    readme = tmp_path / "README.md"
    arguments = ["report", "--pages", str(readme), "--results", str(tmp_path)]
    for text in (None, "no section", "<!-- results:attention:begin -->\n"):
        if text is not None:
            readme.write_text(text)
        assert main(arguments) == 2
    readme.write_text("<!-- results:attention:begin -->\n<!-- results:attention:end -->\n")
    assert main(arguments) == 2
    assert "has no results of attention" in capsys.readouterr().err


PEAK = """
import torch
from benchmarks import measure
measure.one_heap()
for _ in range(2):  # 20 MB for the result and 20 MB more on the way
    result, seconds, peak = measure.call_and_peak(
        lambda: torch.ones(5_000_000) * 2, torch.device("cpu")
    )
    assert result.numel() == 5_000_000 and seconds > 0
    print(peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory on a CPU needs Linux's /proc")
def test_peak_memory_of_a_known_call():
    # As a benchmark runs: here threads of libraries that other tests load give memory back.
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    for peak in done.stdout.split():
        if peak == "None":
            pytest.skip("this system does not let a process reset its peak")
        assert 39e6 < int(peak) < 44e6


def test_key_counts_follow_padding_ceil():
    case = attention.Case((1, 5, 14, 14), 4, 128, ((1,) * 3, (2,) * 3, (1, 2, 4)),
                          torch.float32, torch.device("cpu"))  # fmt: skip
    assert case.key_counts == [980, 147, 5 * 7 * 4]


def test_dense_crf(tmp_path, capsys):
    pytest.importorskip("pydensecrf", reason="the extra `bench` is not installed")
    options = ["--size", "40x30", "--seconds", "0.05", "--out", str(tmp_path)]
    assert main(["dense_crf", *options]) == 0
    document = read(tmp_path, "dense_crf")
    assert [case["batch"] for case in document["cases"]] == [1, 4]
    for case in document["cases"]:
        assert case["mean_difference"] <= 1e-3
        assert [row["rival"] for row in case["rows"]] == ["dense_crf", "pydensecrf"]
    assert (tmp_path / "dense_crf-time.svg").exists()
    assert "1 x 40x30" in capsys.readouterr().out
    from benchmarks import dense_crf

    assert dense_crf.markdown(document).count("\n| ") == 3


def test_dense_crf_bad_input(capsys, monkeypatch):
    pytest.importorskip("pydensecrf", reason="the extra `bench` is not installed")
    monkeypatch.delenv("VSOD_DATA", raising=False)
    assert main(["dense_crf", "--images", "real"]) == 2
    assert "--images real needs VSOD_DATA" in capsys.readouterr().err
    for option in ("--seconds", "--threads"):
        with pytest.raises(SystemExit, match="2"):
            main(["dense_crf", option, "0"])
        assert f"argument {option}: '0' is not a positive" in capsys.readouterr().err


def test_dense_crf_does_not_time_a_wrong_result(tmp_path, capsys, monkeypatch):
    pytest.importorskip("pydensecrf", reason="the extra `bench` is not installed")
    from benchmarks import dense_crf

    monkeypatch.setattr(dense_crf, "dense_crf", lambda prob, image, **_: 1 - prob)
    options = ["--size", "40x30", "--batch", "1", "--seconds", "0.05", "--out", str(tmp_path)]
    assert main(["dense_crf", *options]) == 1
    assert "WRONG" in capsys.readouterr().out
    assert read(tmp_path, "dense_crf")["cases"][0]["rows"] == []


def test_dense_crf_without_pydensecrf(tmp_path, capsys, monkeypatch):
    """On a GPU this project's CPU op takes its place, and says so; on a CPU it is asked for."""
    from benchmarks import dense_crf

    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    options = ["--size", "40x30", "--batch", "4", "--seconds", "0.05", "--out", str(tmp_path)]
    assert main(["dense_crf", *options]) == 2
    assert "pip install pydensecrf2" in capsys.readouterr().err
    assert dense_crf.find_rival(torch.device("cuda")) == "dense_crf on the CPU"
    monkeypatch.setattr(dense_crf, "find_rival", lambda device: dense_crf.ON_CPU)
    assert main(["dense_crf", *options]) == 0
    assert "the rival is dense_crf on the CPU" in capsys.readouterr().out
    document = read(tmp_path, "dense_crf")
    assert document["cases"][0]["mean_difference"] == 0
    assert "| of dense_crf on the CPU |" in dense_crf.markdown(document)


def test_what_the_engine_of_batch_takes_beside_the_videos():
    """Two actors begin after 2 s and have four videos of 1 s each; the last one ends after 5 s."""
    from benchmarks.batch import engine

    taken = engine([{"seconds": 1.0}] * 4, [3.0, 3.5, 4.5, 5.0], actors=2)
    assert taken == {"start_seconds": 2.0, "video_seconds": 1.0, "overhead_seconds": 0.5}
