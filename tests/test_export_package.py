"""`vsod export -o model.pt2`: packages of AOTInductor, in Python and, without Python, in C++."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("av", reason="the extra `models` is not installed")
pytest.importorskip("cv2", reason="the extra `models` is not installed")
if shutil.which("c++") is None:
    pytest.skip("there is no C++ compiler", allow_module_level=True)

from clips import picture
from commands import refused, vsod
from einops import rearrange

from vsod_models import zoo
from vsod_models.errors import InputError
from vsod_models.export import export_package
from vsod_models.networks.contract import SaliencyModel
from vsod_models.networks.mssa import MSSA
from vsod_models.prediction import VideoPredictor
from vsod_ops import ConvLSTM

EXAMPLE = Path(__file__).parent.parent / "examples" / "cpp"


def mssa():
    """Maps of 5 and 6 rows and columns: r = 2 divides not all of them."""
    return MSSA(
        "vgg11_bn", {"width": 0.125}, (16,), (), num_heads=(2,), dim=16, depth=1,
        feed_forward=16, decoder_dim=8, clip_length=3, image_size=(80, 96), motion=True,
    )  # fmt: skip


class Recurrent(SaliencyModel):
    clip_length, image_size, outputs = 2, (16, 24), "last"

    def __init__(self):
        super().__init__()
        self.look = nn.Conv2d(3, 4, 3, padding=1)
        self.lstm = ConvLSTM(4, 4, 3)
        self.read = nn.Conv2d(4, 1, 1)

    def encode(self, frames, prior=None):
        flat = self.look(rearrange(frames, "b t c h w -> (b t) c h w"))
        return [rearrange(flat, "(b t) c h w -> b t c h w", b=frames.shape[0])]

    def decode(self, maps, size):
        out, _ = self.lstm(maps[0])
        return self.read(out[:, -1])


MODELS = {"mssa": (mssa, "float32"), "recurrent": (Recurrent, "bfloat16")}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """name -> the model, its package and the shapes of its inputs; each is compiled once."""
    made = {}

    def export(name):
        if name not in made:
            torch.manual_seed(1)
            build, precision = MODELS[name]
            model = build().eval()
            model.terms = "a test"
            if model.needs_motion:  # of which nothing is seen before it is trained
                for parameter in model.motion.parameters():
                    nn.init.normal_(parameter, std=0.2)
            file = tmp_path_factory.mktemp("packages") / f"{name}.pt2"
            made[name] = model, file, export_package(model, file, precision=precision)
        return made[name]

    return export


def inputs_of(model, batch, length, height, width):
    inputs = [torch.rand(batch, length, 3, height, width)]
    if model.needs_motion:
        inputs.append(torch.rand(batch, length, 4, -(-height // 4), -(-width // 4)))
    return inputs


@pytest.mark.parametrize("shape", [(2, 3, 80, 96), (1, 1, 64, 64), (1, 5, 130, 77)])
def test_a_package_gives_the_logits_of_the_model(packages, shape):
    model, file, shapes = packages("mssa")
    assert shapes == {
        "frames": ("batch", "time", 3, "height", "width"),
        "motion": ("batch", "time", 4, "height", "width"),
    }
    inputs = inputs_of(model, *shape)
    got = torch._inductor.aoti_load_package(str(file))(*inputs)
    with torch.no_grad():
        expected = model(*inputs)
    assert expected.std() > 1e-3
    torch.testing.assert_close(got, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


def test_bfloat16_inside_and_float32_outside(packages):
    model, file, shapes = packages("recurrent")
    assert shapes == {"frames": ("batch", 2, 3, "height", "width")}
    (frames,) = inputs_of(model, 3, 2, 17, 33)
    got = torch._inductor.aoti_load_package(str(file))(frames)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model.decode(model.encode(frames), (17, 33)).float()
    assert got.dtype == torch.float32
    assert (got.bfloat16().float() == got).all()
    torch.testing.assert_close(got, expected, atol=2e-2 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize(("name", "count"), [("mssa", 1), ("mssa", 4), ("recurrent", 3)])
def test_prediction_is_that_of_the_model(packages, name, count):
    model, file, _ = packages(name)
    loaded = zoo.load_model(f"aoti:{file}")
    assert (loaded.clip_length, loaded.outputs) == (model.clip_length, model.outputs)
    assert (loaded.image_size, loaded.terms) == (model.image_size, "a test")
    frames = [picture(index) for index in range(count)]
    made, wanted = (VideoPredictor(m, "cpu").predict_clip(frames) for m in (loaded, model))
    tolerance = 1e-4 if name == "mssa" else 1e-2
    for got, expected in zip(made, wanted, strict=True):
        np.testing.assert_allclose(got, expected, atol=tolerance)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, motion: (x[:, :, :2], motion), r"frames must have shape (2, 3, 3, 80, 96)"),
        (lambda x, motion: (x[0], motion), "frames must have 5 dimensions"),
        (lambda x, motion: (x.double(), motion), "frames must be float32, got float64"),
        (lambda x, motion: (x.bfloat16(), motion), "frames must be float32, got bfloat16"),
        (lambda x, motion: (x[:0], motion[:0]), "frames must be at least (1, 1, 1, 32, 32)"),
        (lambda x, motion: (x[..., :8, :8], motion[..., :2, :2]), "frames must be at least"),
        (lambda x, motion: (x, motion[:1]), "motion must have shape (2, 3, 4, 20, 24)"),
        (lambda x, motion: (x, motion[..., :9]), "motion must have shape (2, 3, 4, 20, 24)"),
        (lambda x, motion: (x, x), "motion must have shape (2, 3, 4, 20, 24)"),
    ],
)
def test_wrong_inputs_are_errors(packages, change, words):
    model, file, _ = packages("mssa")
    package = torch._inductor.aoti_load_package(str(file))
    with pytest.raises(RuntimeError, match=re.escape(words)):
        package(*change(*inputs_of(model, 2, 3, 80, 96)))


def test_a_window_of_another_length_is_an_error_and_strides_are_free(packages):
    model, file, _ = packages("recurrent")
    package = torch._inductor.aoti_load_package(str(file))
    with pytest.raises(RuntimeError, match=re.escape("frames must have shape (1, 2, 3, 16, 24)")):
        package(*inputs_of(model, 1, 3, 16, 24))
    (frames,) = inputs_of(model, 1, 2, 16, 24)
    turned = frames.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    torch.testing.assert_close(package(turned), package(frames), atol=0, rtol=0)


def test_files_that_are_no_packages(packages, tmp_path, monkeypatch):
    _, file, _ = packages("recurrent")
    (tmp_path / "cut.pt2").write_bytes(file.read_bytes()[:-1000])
    (tmp_path / "text.pt2").write_text("no package")
    for name in ("cut.pt2", "text.pt2"):
        with pytest.raises(InputError, match=rf"{name}: no package that can be run"):
            zoo.load_model(f"aoti:{tmp_path / name}")
    with pytest.raises(InputError, match=r"none\.pt2: no such file"):
        zoo.load_model(f"aoti:{tmp_path / 'none.pt2'}")
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        with pytest.raises(InputError, match="and this one has DEFAULT; export it here"):
            zoo.load_model(f"aoti:{file}")


def test_the_command(packages, tmp_path, capsys):
    _, file, _ = packages("recurrent")
    command = ("export", "vsod-mobile", "-o")
    refused(vsod(capsys, *command, file), "recurrent.pt2: exists already", "--overwrite")
    refused(
        vsod(capsys, *command, tmp_path / "a.pt2", "--precision", "int8"), "float32 or bfloat16"
    )
    onnx = tmp_path / "a.onnx"
    refused(vsod(capsys, *command, onnx, "--precision", "bfloat16"), "an ONNX file has float32")


def write_ppm(path, pixels):
    height, width, _ = pixels.shape
    path.write_bytes(f"P6\n{width} {height}\n255\n".encode() + pixels.tobytes())
    return path


def read_pgm(path):
    kind, sizes, most, pixels = path.read_bytes().split(b"\n", 3)
    assert (kind, most) == (b"P5", b"255")
    width, height = map(int, sizes.split())
    return np.frombuffer(pixels, np.uint8).reshape(height, width)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The example, compiled by the lines of its page."""
    page = (EXAMPLE / "README.md").read_text()
    lines = re.search(r"^torch=.*?(?=^ffmpeg)", page, re.MULTILINE | re.DOTALL)[0]
    folder = tmp_path_factory.mktemp("program")
    shutil.copy(EXAMPLE / "masks.cpp", folder)
    script = f"python() {{ '{sys.executable}' \"$@\"; }}\n{lines}echo $operators\n"
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, capture_output=True, text=True, check=True
    )
    return folder / "masks", done.stdout.strip()


def run(program, *arguments):
    masks, operators = program
    file, *others = arguments
    env = {"PATH": os.environ["PATH"]}  # nothing that leads to Python
    command = [masks, file, operators, *others]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(("name", "count"), [("mssa", 4), ("mssa", 1), ("recurrent", 3)])
def test_masks_in_cpp(packages, program, tmp_path, name, count):
    model, file, _ = packages(name)
    frames = [picture(index, (61, 45)) for index in range(count)]
    files = [write_ppm(tmp_path / f"{i}.ppm", frame) for i, frame in enumerate(frames)]
    done = run(program, file, tmp_path, *files)
    assert done.returncode == 0, done.stderr

    planes = torch.stack([torch.from_numpy(f).movedim(-1, 0) for f in frames]).float() / 255
    size = dict(mode="bilinear", antialias=True)
    small = nn.functional.interpolate(planes, model.image_size, **size)
    for index in range(count):
        first = index if model.outputs == "last" else index - index % model.clip_length
        first -= (model.clip_length - 1) if model.outputs == "last" else 0
        window = [min(max(first + t, 0), count - 1) for t in range(model.clip_length)]
        inputs = [small[window][None]]
        if model.needs_motion:
            height, width = (-(-n // 4) for n in model.image_size)
            inputs.append(torch.zeros(1, model.clip_length, 4, height, width))
        with torch.no_grad():
            logits = model(*inputs) if name == "mssa" else model.decode(model.encode(*inputs), 0)
        probability = logits.sigmoid().flatten(0, -4)[
            index - first if len(logits.shape) == 5 else 0
        ]
        expected = nn.functional.interpolate(probability[None], (45, 61), **size)[0, 0] * 255
        got = read_pgm(tmp_path / f"{index:05d}.pgm")
        assert got.shape == (45, 61)
        assert np.ptp(got) > 0
        tolerance = 0.51 if name == "mssa" else 3
        assert np.abs(got - expected.numpy()).max() <= tolerance


def test_errors_in_cpp(packages, program, tmp_path):
    _, file, _ = packages("recurrent")
    frame = write_ppm(tmp_path / "0.ppm", picture(0))
    cut = tmp_path / "cut.ppm"
    cut.write_bytes(frame.read_bytes()[:-1])
    for arguments, words in (
        ((file, tmp_path, cut), "cut.ppm: ends before its last pixel"),
        ((file, tmp_path, file), "recurrent.pt2: no PPM file"),
        ((file, tmp_path / "nothing", frame), "00000.pgm: cannot be written"),
        ((frame, tmp_path, frame), ""),
    ):
        done = run(program, *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("masks: ") and words in done.stderr
