"""`vsod example`: the clip that the README tries the command with."""

import numpy as np
import pytest

pytest.importorskip("av")

from clips import decode, sound_samples

from vsod_models import cli
from vsod_models.errors import InputError
from vsod_models.media.example import PHOTOS, RATE, SIZE, Example, write_example


@pytest.mark.parametrize("photo", PHOTOS)
def test_the_camera_moves_and_comes_back(photo):
    frames = [frame.picture for frame in Example(photo, 2.0)]
    assert len(frames) == 50 and {f.shape for f in frames} == {(SIZE[1], SIZE[0], 3)}
    steps = [
        np.abs(a.astype(int) - b).mean()
        for a, b in zip(frames, [*frames[1:], frames[0]], strict=True)
    ]
    assert min(steps) > 1  # never still, and no jump where the clip begins again
    assert max(steps) < 4 * np.median(steps)


def test_picture_sound_and_times(tmp_path):
    assert write_example(tmp_path / "clip.mp4", seconds=1.0) == RATE
    pictures, times = decode(tmp_path / "clip.mp4")
    assert [t * RATE for t in times] == list(range(RATE))
    expected = next(iter(Example(seconds=1.0))).picture
    assert np.abs(pictures[0].astype(int) - expected).mean() < 5
    sound = sound_samples(tmp_path / "clip.mp4")  # AAC, from a WAV that names no channels
    assert sound.shape[0] == 2 and abs(sound.shape[1] - 48000) < 2048
    spectrum = np.abs(np.fft.rfft(sound[0, :48000]))
    assert set(np.argsort(spectrum)[-3:]) == {220, 277, 330}  # Hz: one bin is 1 Hz
    assert np.abs(sound[:, :20]).max() < 0.01 < np.abs(sound).max() < 0.5


def test_the_command(tmp_path, capsys):
    output = tmp_path / "clip.webm"
    for options in ([], ["--overwrite", "--photo", "cat"]):
        with pytest.raises(SystemExit) as done:
            cli.main(["example", str(output), "--seconds", "0.2", *options])
        assert done.value.code == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{output}: 5 frames of cat"
    with pytest.raises(SystemExit) as done:
        cli.main(["example", str(output)])
    assert done.value.code == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [(dict(photo="dog"), "photo must be one of coffee, astronaut, cat, got 'dog'"),
     (dict(seconds=0), "seconds must be from 0.1 to 60, got 0"),
     (dict(seconds=float("nan")), "seconds must be from 0.1 to 60, got nan")],
)  # fmt: skip
def test_bad_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        write_example(tmp_path / "clip.mp4", **options)
    assert not any(tmp_path.iterdir())
