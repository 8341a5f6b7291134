"""Reading and writing of videos and pictures: what goes in comes out, or one line says why not."""

import os
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("cv2")
Image = pytest.importorskip("PIL.Image")

from clips import decode, make_video, picture, sound_packets, sound_samples, turn  # noqa: E402

from vsod_models.errors import InputError  # noqa: E402
from vsod_models.files import natural_order  # noqa: E402
from vsod_models.media.reading import (  # noqa: E402
    ahead,
    open_source,
    upright,
)
from vsod_models.media.writing import open_writer  # noqa: E402


def copy(source, output, change=lambda picture: picture, **options):
    """Write every frame of a source as `change` makes it."""
    with open_writer(output, source, **options) as writer:
        for frame in source:
            writer.write(change(frame.picture), frame)
        writer.close()
    return writer


def nothing_left(folder, *files):
    return sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in files)


# ---- reading


def test_video_frames_have_their_pictures_and_times(tmp_path):
    source = open_source(make_video(tmp_path / "a.mp4", frames=9))
    frames = list(source)
    assert source.frames == len(frames) == 9
    assert source.rate == 25 and source.sound is None
    assert [f.time for f in frames] == pytest.approx([i / 25 for i in range(9)])
    assert [f.name for f in frames][-1] == "00008"
    for frame in frames:
        assert frame.picture.dtype == np.uint8
        assert np.abs(frame.picture.astype(int) - picture(frame.index)).mean() < 6
    assert [f.pts for f in source] == [f.pts for f in frames]  # it can be read again


def test_times_start_at_zero_where_the_clock_of_the_file_does_not(tmp_path):
    source = open_source(make_video(tmp_path / "a.ts", frames=5, shift=250, codec="mpeg2video"))
    assert [f.time for f in source] == pytest.approx([i / 25 for i in range(5)])


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("mirror_x", [False, True])
@pytest.mark.parametrize("mirror_y", [False, True])
def test_upright_follows_the_matrix(swap, mirror_x, mirror_y):
    stored = np.arange(2 * 3).reshape(2, 3, 1).astype(np.uint8)
    x, y = (-1 if mirror_x else 1), (-1 if mirror_y else 1)
    matrix = np.array([[0, y], [x, 0]] if swap else [[x, 0], [0, y]]) * 65536
    shown = upright(stored, matrix)
    assert shown.shape == ((3, 2, 1) if swap else (2, 3, 1))
    # Each stored pixel lies where the matrix sends it, once the corner is back at 0, 0.
    sent = {(int(r), int(c)): np.array([c, r]) @ np.sign(matrix) for r, c in np.ndindex(2, 3)}
    corner = np.min(list(sent.values()), axis=0)
    for (row, column), place in sent.items():
        to_x, to_y = place - corner
        assert shown[to_y, to_x] == stored[row, column]


def test_a_turned_video_is_upright(tmp_path):
    path = turn(make_video(tmp_path / "a.mp4", frames=2), 0, 1, -1, 0)  # a phone held upright
    frames = list(open_source(path))
    expected = np.rot90(picture(0), -1)
    assert frames[0].picture.shape == expected.shape == (64, 48, 3)
    assert np.abs(frames[0].picture.astype(int) - expected).mean() < 6


def test_pictures_of_every_kind(tmp_path):
    grey = np.linspace(0, 255, 48 * 64).reshape(48, 64).astype(np.uint8)
    rgba = np.dstack([picture(0), np.full((48, 64), 7, np.uint8)])
    Image.fromarray(grey).save(tmp_path / "frame1.png")
    Image.fromarray(rgba).save(tmp_path / "frame2.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "frame10.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    frames = list(open_source(tmp_path, rate=10))
    assert [f.name for f in frames] == ["frame1", "frame2", "frame10"]
    assert [f.time for f in frames] == pytest.approx([0, 0.1, 0.2])
    np.testing.assert_array_equal(frames[0].picture, np.dstack([grey] * 3))
    np.testing.assert_array_equal(frames[1].picture, picture(0))
    np.testing.assert_array_equal(frames[2].picture, np.dstack([grey] * 3))
    assert [f.name for f in open_source(str(tmp_path / "frame1*.png"))] == ["frame1", "frame10"]
    assert [f.name for f in open_source([tmp_path / "frame2.png"])] == ["frame2"]


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_photographs_are_upright(tmp_path, ending):
    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be turned right by a quarter
    Image.fromarray(picture(0)).save(tmp_path / f"a.{ending}", exif=orientation)
    (frame,) = open_source(tmp_path / f"a.{ending}")
    expected = np.rot90(picture(0), -1)
    assert frame.picture.shape == expected.shape
    assert np.abs(frame.picture.astype(int) - expected).mean() < 6


def test_natural_order():
    names = ["b2.png", "b10.png", "a.png", "b1.png", "1b.png"]
    assert natural_order({"f1", "f01", "f001"}) == ["f001", "f01", "f1"]  # equal numbers
    ordered = [path.name for path in natural_order(Path(name) for name in names)]
    assert ordered == ["1b.png", "a.png", "b1.png", "b2.png", "b10.png"]


def test_inputs_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "nothing.mp4").write_bytes(b"")
    make_video(tmp_path / "a.mp4", frames=2)
    for given, words in {
        "gone.mp4": "no such file",
        "*.jpg": "matches no file",
        "empty": "without pictures",
        "text.mp4": "neither a picture nor a video",
        "nothing.mp4": "is empty",
    }.items():
        with pytest.raises(InputError, match=words) as error:
            open_source(tmp_path / given)
        assert str(tmp_path / given) in str(error.value)
    with pytest.raises(InputError, match=r"a.mp4: not a picture"):
        open_source([tmp_path / "a.mp4", tmp_path / "a.mp4"])


def test_a_file_with_sound_alone(tmp_path):
    path = make_video(tmp_path / "a.mp4", sound="aac")
    import av

    with av.open(str(path)) as whole, av.open(str(tmp_path / "b.mp4"), "w") as part:
        stream = part.add_stream_from_template(whole.streams.audio[0])
        for packet in whole.demux(audio=0):
            if packet.size:
                packet.stream = stream
                part.mux(packet)
    with pytest.raises(InputError, match=r"b.mp4: has no video"):
        open_source(tmp_path / "b.mp4")


@pytest.mark.parametrize("ending", ["mp4", "webm"])
def test_a_truncated_video(tmp_path, ending):
    codec = "libx264" if ending == "mp4" else "libvpx-vp9"
    path = make_video(tmp_path / f"a.{ending}", frames=60, codec=codec)
    if ending == "mp4":  # with its index in front, or nothing of it could be read
        source = open_source(path)
        path = tmp_path / "b.mp4"
        copy(source, path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(InputError, match="cut off") as error:
        list(open_source(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_mp4_without_its_index(tmp_path):
    path = make_video(tmp_path / "a.mp4", frames=60)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])  # the camera died before it wrote it
    with pytest.raises(InputError, match=r"a.mp4: cut off: the index is missing"):
        open_source(path)


def test_damage_in_the_middle(tmp_path):
    path = make_video(tmp_path / "a.mp4", frames=60, size=(128, 96))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 600] = np.random.default_rng(0).bytes(600)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a.mp4: damaged or cut off after frame \d+ \(\d+\.\d+ s"):
        list(open_source(path))


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_truncated_picture(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match=f"a.{ending}: not a readable picture"):
        list(open_source(path))


def test_ahead_stops_its_thread_and_passes_errors_on():
    made = []

    def count():
        for i in range(100):
            made.append(i)
            yield i
            if i == 50:
                raise InputError("fifty")

    items = ahead(count(), depth=3)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    items.close()
    assert len(made) <= 5 + 3 + 2
    with pytest.raises(InputError, match="fifty"):
        list(ahead(count()))


# ---- writing


@pytest.mark.parametrize("ending", ["mp4", "mov", "webm"])
def test_size_times_and_pictures_survive(tmp_path, ending):
    times = [0, 20, 25, 90, 200, 201, 260, 300]  # 1/600 s: the rate varies
    path = make_video(tmp_path / "in.mp4", pts=times, time_base=Fraction(1, 600))
    output = tmp_path / f"out.{ending}"
    copy(open_source(path), output)
    pictures, written = decode(output)
    if ending == "webm":  # counts in milliseconds
        assert [float(t) for t in written] == pytest.approx([t / 600 for t in times], abs=6e-4)
    else:
        assert written == [Fraction(t, 600) for t in times]
    for index, made in enumerate(pictures):
        assert made.shape == (48, 64, 3)
        assert np.abs(made.astype(int) - picture(index)).mean() < 8
    assert nothing_left(tmp_path, path, output)


def test_the_last_frame_lasts_as_long_as_it_did(tmp_path):
    import av

    path = make_video(tmp_path / "in.mp4", pts=[0, 1, 2, 30])
    copy(open_source(path), tmp_path / "out.mp4")
    copy(open_source(tmp_path / "out.mp4"), tmp_path / "again.mp4")
    with av.open(str(tmp_path / "out.mp4")) as once, av.open(str(tmp_path / "again.mp4")) as twice:
        assert once.duration == twice.duration >= 30 / 25 * 1e6


@pytest.mark.parametrize("size", [(65, 48), (64, 49), (33, 17)])
@pytest.mark.parametrize("ending", ["mp4", "webm", "gif"])
def test_odd_sizes_are_kept(tmp_path, size, ending):
    for index in range(3):
        Image.fromarray(picture(index, size)).save(tmp_path / f"{index}.png")
    writer = copy(open_source(str(tmp_path / "*.png")), tmp_path / f"out.{ending}")
    pictures, _ = decode(tmp_path / f"out.{ending}")
    assert [p.shape[:2] for p in pictures] == [size[::-1]] * 3
    assert len(writer.notes) == (ending == "mp4")


def test_even_h264_is_what_every_player_takes(tmp_path):
    import av

    copy(open_source(make_video(tmp_path / "in.mp4")), tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    data = (tmp_path / "out.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays while it loads


@pytest.mark.parametrize("ending", ["webm", "mov", "gif"])
def test_alpha(tmp_path, ending):
    alpha = np.zeros((48, 64), np.uint8)
    alpha[:, 32:] = 255
    alpha[24:, 32:] = 200

    def matte(picture):
        return np.dstack([picture, alpha])

    copy(open_source(make_video(tmp_path / "in.mp4")), tmp_path / f"out.{ending}", matte)
    pictures, _ = decode(tmp_path / f"out.{ending}", "rgba")
    assert len(pictures) == 12
    expected = alpha if ending != "gif" else np.where(alpha >= 128, 255, 0)
    for made in pictures:
        assert np.abs(made[:, :, 3].astype(int) - expected).mean() < 3


def test_gif_keeps_times_it_can_count(tmp_path):
    path = make_video(tmp_path / "in.mp4", pts=[0, 4, 5, 30])
    copy(open_source(path), tmp_path / "out.gif")
    pictures, times = decode(tmp_path / "out.gif")
    assert [float(t) for t in times] == pytest.approx([0, 0.16, 0.2, 1.2])
    assert np.abs(pictures[3].astype(int) - picture(3)).mean() < 10
    fast = make_video(tmp_path / "fast.mp4", time_base=Fraction(1, 100))
    copy(open_source(fast), tmp_path / "fast.gif")
    assert [float(t) for t in decode(tmp_path / "fast.gif")[1]] == pytest.approx(
        [0, 0.02, 0.04, 0.06, 0.08, 0.1]
    )


def test_pixels_that_are_not_square_stay_so(tmp_path):
    source = open_source(make_video(tmp_path / "in.mp4"))
    source.pixel_aspect = Fraction(4, 3)
    copy(source, tmp_path / "wide.mp4")
    wide = open_source(tmp_path / "wide.mp4")
    assert wide.pixel_aspect == Fraction(4, 3)
    lying = open_source(turn(tmp_path / "wide.mp4", 0, 1, -1, 0))
    assert lying.pixel_aspect == Fraction(3, 4)


@pytest.mark.parametrize("ending", ["mp4", "mov"])
def test_sound_is_copied_byte_for_byte(tmp_path, ending):
    path = make_video(tmp_path / "in.mp4", frames=30, sound="aac")
    copy(open_source(path), tmp_path / f"out.{ending}")
    codec, packets = sound_packets(tmp_path / f"out.{ending}")
    assert codec == "aac"
    assert packets == sound_packets(path)[1]


def test_sound_is_coded_again_where_the_container_does_not_take_it(tmp_path):
    path = make_video(tmp_path / "in.mp4", frames=50, sound="aac")
    copy(open_source(path), tmp_path / "opus.webm")
    copy(open_source(tmp_path / "opus.webm"), tmp_path / "copied.webm")
    assert sound_packets(tmp_path / "opus.webm")[0] == "opus"
    packets = sound_packets(tmp_path / "opus.webm")[1], sound_packets(tmp_path / "copied.webm")[1]
    assert [p for p, _ in packets[0]] == [p for p, _ in packets[1]]
    wave = make_video(tmp_path / "wave.mov", frames=50, sound="pcm_s16le")
    copy(open_source(wave), tmp_path / "aac.mp4")
    assert sound_packets(tmp_path / "aac.mp4")[0] == "aac"
    for name in ("opus.webm", "aac.mp4"):
        samples = sound_samples(tmp_path / name)
        samples = samples.reshape(-1, 2).T if samples.shape[0] == 1 else samples
        assert samples.shape[1] / 48000 == pytest.approx(2.0, abs=0.06)
        spectrum = np.abs(np.fft.rfft(samples[0, 4800:52800].astype(float)))
        assert np.argmax(spectrum) == pytest.approx(440, abs=2)


def test_sound_that_is_longer_than_the_pictures_is_whole(tmp_path):
    path = make_video(tmp_path / "in.mp4", frames=10, sound="aac", seconds=3.0)
    copy(open_source(path), tmp_path / "out.mp4")
    assert sound_packets(tmp_path / "out.mp4")[1] == sound_packets(path)[1]


def test_sound_ends_with_the_pictures_when_stopped(tmp_path):
    source = open_source(make_video(tmp_path / "in.mp4", frames=100, sound="aac"))
    with open_writer(tmp_path / "out.mp4", source) as writer:
        for frame in source:
            if frame.index == 25:
                break
            writer.write(frame.picture, frame)
        writer.close(stopped=True)
    assert len(decode(tmp_path / "out.mp4")[0]) == 25
    last = sound_packets(tmp_path / "out.mp4")[1][-1][1]
    assert 0.9 < last < 1.0


def test_png_folder_keeps_each_size_and_name(tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    for name, size in {"a": (64, 48), "b": (31, 17)}.items():
        Image.fromarray(picture(1, size)).save(frames / f"{name}.bmp")
    copy(open_source(frames), tmp_path / "out")
    for name, size in {"a": (64, 48), "b": (31, 17)}.items():
        made = np.array(Image.open(tmp_path / "out" / f"{name}.png"))
        np.testing.assert_array_equal(made, picture(1, size))
    with pytest.raises(InputError, match=r"b.bmp: is 31x17 .* folder of PNG"):
        copy(open_source(frames), tmp_path / "out.mp4")
    assert nothing_left(tmp_path, frames, tmp_path / "out")


def test_a_size_that_changes_within_a_video_leaves_nothing(tmp_path):
    source = open_source(make_video(tmp_path / "in.mp4"))
    for ending in ("mp4", "gif"):
        with (
            pytest.raises(InputError, match="frame 00001: is 62x48"),
            open_writer(tmp_path / f"out.{ending}", source) as writer,
        ):
            for frame in source:
                writer.write(frame.picture[:, 2 * frame.index :], frame)
    assert nothing_left(tmp_path, tmp_path / "in.mp4")


def test_one_picture(tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "in.png")
    copy(open_source(tmp_path / "in.png"), tmp_path / "out.png", lambda p: p[:, :, 0])
    assert Image.open(tmp_path / "out.png").mode == "L"
    copy(open_source(tmp_path / "in.png"), tmp_path / "out.mp4")
    assert len(decode(tmp_path / "out.mp4")[0]) == 1
    with pytest.raises(InputError, match=r"one.png: holds one picture, .* has 12; give a folder"):
        copy(open_source(make_video(tmp_path / "in.mp4")), tmp_path / "one.png")


def test_inputs_are_never_overwritten(tmp_path):
    path = make_video(tmp_path / "in.mp4")
    before = path.read_bytes()
    (tmp_path / "soft.mp4").symlink_to(path)
    os.link(path, tmp_path / "hard.mp4")
    for name in ("in.mp4", "soft.mp4", "hard.mp4"):
        with pytest.raises(InputError, match=f"{name}: is an input"):
            copy(open_source(path), tmp_path / name, overwrite=True)
    assert path.read_bytes() == before
    frames = tmp_path / "frames"
    frames.mkdir()
    Image.fromarray(picture(0)).save(frames / "a.png")
    with pytest.raises(InputError, match=r"a.png: is an input"):
        copy(open_source(frames), frames, overwrite=True)
    Image.fromarray(picture(0)).save(frames / "a.jpg")
    with pytest.raises(InputError, match=r"a.png: would be written to .*a.png, as"):
        copy(open_source(frames), tmp_path / "out")


def test_what_exists_is_replaced_only_when_asked(tmp_path):
    source = open_source(make_video(tmp_path / "in.mp4", frames=2))
    (tmp_path / "out.mp4").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "out" / "00000.png").write_text("old")
    for name in ("out.mp4", "out"):
        with pytest.raises(InputError, match=f"{name}: exists already"):
            copy(source, tmp_path / name)
        copy(source, tmp_path / name, overwrite=True)
    assert len(decode(tmp_path / "out.mp4")[0]) == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "00000.png", "00001.png", "mine.txt",
    ]  # fmt: skip
    assert np.array(Image.open(tmp_path / "out" / "00000.png")).shape == (48, 64, 3)


def test_outputs_that_cannot_be(tmp_path):
    source = open_source(make_video(tmp_path / "in.mp4", frames=2))
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    for name, words in {
        "out.avi": "cannot write .avi",
        "folder.mp4": "is a folder",
        "file": "exists already",
        "file/out.mp4": "cannot be written: not a directory|cannot be written: file exists",
    }.items():
        with pytest.raises(InputError, match=words):
            copy(source, tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_no_permission(tmp_path):
    source = open_source(make_video(tmp_path / "in.mp4", frames=2))
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(InputError, match=r"out.mp4: cannot be written: permission denied"):
        copy(source, closed / "out.mp4")


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.parametrize("name", ["out.mp4", "out.mov", "out.webm", "out.gif", "out"])
def test_a_full_disk_leaves_nothing(tmp_path, name):
    """A limit on the size of a file stands in for the disk."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        noise = rng.integers(0, 255, (96, 128, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "in" / f"{index}.png")
    code = textwrap.dedent(
        """
        import resource, sys
        from vsod_models.errors import InputError
        from vsod_models.media.reading import open_source
        from vsod_models.media.writing import open_writer
        source = open_source(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        try:
            with open_writer(sys.argv[2], source) as writer:
                for frame in source:
                    writer.write(frame.picture, frame)
                writer.close()
        except InputError as error:
            print(error)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "in"), str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{tmp_path / name}: cannot be written: file too large\n"
    assert nothing_left(tmp_path, tmp_path / "in")
