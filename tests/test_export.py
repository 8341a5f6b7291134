"""`vsod export`: the numbers of an ONNX file, what it takes and refuses, what it says of itself."""

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
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")

import onnx
import onnxruntime
from clips import make_video, picture
from commands import refused, vsod

from vsod_models import zoo
from vsod_models.errors import InputError
from vsod_models.export import export_onnx, export_package
from vsod_models.networks.foreign import PerFrame
from vsod_models.networks.mssa import MSSA
from vsod_models.networks.msst import MSST
from vsod_models.prediction import VideoPredictor
from vsod_ops import shunted_attention

ROOT = Path(__file__).parent.parent
SMALL_VGG = dict(backbone="vgg16", width=0.125, image_size=(65, 65))
MODELS = {
    # Maps of 5 and 3 rows: r = 2 divides neither.
    "mssa": lambda: MSSA(
        "vgg11_bn", {"width": 0.125}, (16, 32), (8,), num_heads=(2, 4), dim=16, depth=1,
        feed_forward=16, decoder_dim=16, clip_length=3, image_size=(80, 96), motion=True,
    ),
    "os": lambda: MSST("os", **SMALL_VGG),
    "st": lambda: MSST("st", **SMALL_VGG),
    "full": lambda: MSST("full", **SMALL_VGG, hidden=6),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name -> the model, its file and the shapes of its inputs; each is exported once."""
    made = {}

    def export(name):
        if name not in made:
            torch.manual_seed(1)
            model = MODELS[name]().eval()
            model.terms = "a test"
            if model.needs_motion:  # of which nothing is seen before it is trained
                for parameter in model.motion.parameters():
                    nn.init.normal_(parameter, std=0.2)
            file = tmp_path_factory.mktemp("exported") / f"{name}.onnx"
            made[name] = model, file, export_onnx(model, file)
        return made[name]

    return export


def inputs_of(model, batch, length, height, width):
    inputs = [torch.rand(batch, length, 3, height, width)]
    if model.needs_prior:
        inputs.append(torch.rand(batch, length, 1, height, width))
    if model.needs_motion:
        inputs.append(torch.rand(batch, length, 4, -(-height // 4), -(-width // 4)))
    return inputs


def run(file, *inputs):
    session = onnxruntime.InferenceSession(str(file))
    names = [i.name for i in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))[0]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mssa", (2, 3, 80, 96)),
        ("mssa", (1, 1, 64, 64)),
        ("mssa", (1, 5, 130, 77)),
        ("os", (3, 1, 65, 65)),
        ("os", (1, 1, 70, 91)),
        ("st", (2, 1, 65, 65)),
        ("st", (1, 1, 48, 80)),
        ("full", (2, 4, 65, 65)),
        ("full", (1, 4, 48, 91)),
    ],
)
def test_onnxruntime_gives_the_logits_of_torch(exported, name, shape):
    model, file, _ = exported(name)
    inputs = inputs_of(model, *shape)
    with torch.no_grad():
        expected = model(*inputs)
    got = torch.from_numpy(run(file, *(x.numpy() for x in inputs)))
    assert expected.std() > 1e-3
    torch.testing.assert_close(got, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


def test_what_is_free_and_what_the_graph_is_made_of(exported):
    _, file, shapes = exported("mssa")
    assert shapes == {
        "frames": ("batch", "time", 3, "height", "width"),
        "motion": ("batch", "time", 4, "height", "width"),
    }
    graph = onnx.load(file)
    onnx.checker.check_model(graph)
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 23)]
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("Attention") == 4  # two levels of two head groups
    _, _, shapes = exported("full")
    assert shapes == {
        "frames": ("batch", 4, 3, "height", "width"),
        "prior": ("batch", 4, 1, "height", "width"),
    }


def test_it_runs_without_torch(exported, tmp_path):
    model, file, _ = exported("st")
    inputs = inputs_of(model, 1, 1, 65, 65)
    for name, x in zip(("frames", "prior"), inputs, strict=True):
        np.save(tmp_path / f"{name}.npy", x)
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['vsod_models'] = None  # importing them is an error\n"
        "import numpy, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(file)!r})\n"
        "inputs = {name: numpy.load(name + '.npy') for name in ('frames', 'prior')}\n"
        "out, = session.run(None, inputs)\n"
        "numpy.save('logits.npy', out)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = model(*inputs).numpy()
    mask, wanted = np.load(tmp_path / "logits.npy") > 0, expected > 0
    assert 0 < wanted.mean() < 1
    assert (mask == wanted)[abs(expected) > 1e-4].all()


def test_the_example_of_the_page(exported, tmp_path):
    """It is of vsod-mobile, which takes motion, as this one does; and it runs without torch."""
    model, file, _ = exported("mssa")
    shutil.copy(file, tmp_path / "model.onnx")
    shutil.copy(ROOT / "vsod_models" / "prior" / "motion.py", tmp_path)
    make_video(tmp_path / "clip.mp4", 3, size=(64, 48))
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.S)[1]
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['vsod_models'] = None  # importing them is an error\n"
        f"{code}\n"
        "numpy.savez('made.npz', frames=frames, motion=motion, masks=masks)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    made = {name: torch.from_numpy(x) for name, x in np.load(tmp_path / "made.npz").items()}
    assert made["frames"].shape == (1, 3, 3, 224, 416) and made["motion"].abs().max() > 0.5
    with torch.no_grad():
        expected = model(made["frames"], made["motion"]).sigmoid()
    torch.testing.assert_close(made["masks"], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", ["mssa", "full"])
def test_prediction_is_that_of_the_model(exported, name, count):
    model, file, _ = exported(name)
    loaded = zoo.load_model(f"onnx:{file}")
    assert (loaded.clip_length, loaded.outputs) == (model.clip_length, model.outputs)
    assert (loaded.needs_prior, loaded.needs_motion) == (model.needs_prior, model.needs_motion)
    assert loaded.terms == "a test"
    prior = (lambda frame, other: frame[..., 0] / np.float32(255)) if model.needs_prior else None
    frames = [picture(index) for index in range(count)]
    made, wanted = (
        VideoPredictor(m, "cpu", prior=prior).predict_clip(frames) for m in (loaded, model)
    )
    for got, expected in zip(made, wanted, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 3, 80, 96), np.float32),
        ((1, 3, 4, 80, 96), np.float32),
        ((1, 3, 3, 80, 96), np.float64),
        ((1, 3, 3, 8, 8), np.float32),  # smaller than the stride of the deepest map
        ((1, 0, 3, 80, 96), np.float32),
    ],
)
def test_wrong_inputs_are_errors(exported, shape, dtype):
    _, file, _ = exported("mssa")
    motion = np.zeros((1, 3, 4, 20, 24), np.float32)
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT|RUNTIME_EXCEPTION|FAIL"):
        run(file, np.zeros(shape, dtype), motion)


def test_a_window_of_another_length_is_an_error(exported):
    _, file, _ = exported("full")
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        run(file, *(np.zeros((1, 3, c, 65, 65), np.float32) for c in (3, 1)))


def test_a_file_of_another_version_says_so(exported, tmp_path):
    graph = onnx.load(exported("os")[1])
    next(p for p in graph.metadata_props if p.key == "version").value = "7"
    onnx.save(graph, tmp_path / "later.onnx")
    with pytest.raises(InputError, match=r"version 7; this vsod reads version 1"):
        zoo.load_model(f"onnx:{tmp_path / 'later.onnx'}")


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class WithLse(nn.Module):
    def forward(self, x):
        out, lse = shunted_attention(x, [x], [x], return_lse=True)
        return out + lse[..., None]


@pytest.mark.parametrize("layer", [Branching(), Bessel(), WithLse()])
def test_what_cannot_be_exported_is_named_with_its_layer(tmp_path, layer):
    network = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Sequential(nn.ReLU(), layer))
    model = PerFrame(network, "mine", (32, 32))
    with pytest.raises(InputError, match=r"model mine cannot be exported.*layer network\.1\.1: "):
        export_onnx(model, tmp_path / "a.onnx", name="mine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("export", "name"), [(export_onnx, "a.onnx"), (export_package, "a.pt2")])
def test_weights_that_hold_nan_are_named(tmp_path, export, name):
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 1, 1))
    nn.init.constant_(network[1].weight, float("nan"))
    model = PerFrame(network, "mine", (32, 32))
    words = r"model mine cannot be exported: its logits hold NaN.* its weight network\.1\.weight"
    with pytest.raises(InputError, match=words):
        export(model, tmp_path / name, name="mine")
    assert not list(tmp_path.iterdir())


def test_a_network_of_one_size_keeps_it(tmp_path):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 8 * 12, 8 * 12)

        def forward(self, frames):
            return self.linear(frames.flatten(1)).view(-1, 1, 8, 12)

    model = PerFrame(Flat(), "mine", (8, 12)).eval()
    shapes = export_onnx(model, tmp_path / "a.onnx")
    assert shapes["frames"][2:] == (3, 8, 12)
    frames = [picture(index) for index in range(3)]
    got, wanted = (
        VideoPredictor(m, "cpu").predict_clip(frames)
        for m in (zoo.load_model(f"onnx:{tmp_path / 'a.onnx'}"), model)
    )
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_the_command(exported, tmp_path, capsys):
    model, _, _ = exported("os")
    model.save_pretrained(tmp_path / "model")
    command = ("export", tmp_path / "model", "-o", tmp_path / "model.onnx")
    code, out, _ = vsod(capsys, *command)
    assert code == 0 and "opset 23" in out and "note: weights for a test" in out
    refused(vsod(capsys, *command), "model.onnx: exists already", "--overwrite")
    refused(vsod(capsys, *command[:-1], tmp_path / "a.bin"), "a.bin", "end in .onnx")
