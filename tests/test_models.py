"""Models of other people: factories, entry points, the hub, ONNX files; what is wrong with them."""

import http.server
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("av", reason="the extra `models` is not installed")
pytest.importorskip("cv2", reason="the extra `models` is not installed")
pytest.importorskip("typer", reason="the extra `models` is not installed")
pytest.importorskip("torchvision", reason="the extra `models` is not installed")

from clips import decode, make_video, picture
from commands import refused, vsod
from trees import davis

from vsod_models import zoo
from vsod_models.networks.exported import METADATA, metadata_of
from vsod_models.networks.foreign import from_factory
from vsod_models.networks.mssa import MSSA
from vsod_models.networks.sam2 import Sam2Refiner, surest
from vsod_models.prediction import VideoPredictor

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
SMALL = dict(backbone="mobilenet_v2", image_size=(64, 64), dim=16, num_heads=(2, 2), depth=1)


def block(name):
    return re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)```", PAGE.read_text(), re.S)[1]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of its own name into the current folder; gives that name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = []

    def write(code):
        made.append(f"mine_{len(made)}_{os.getpid()}_{abs(hash(tmp_path))}")
        (tmp_path / f"{made[-1]}.py").write_text(textwrap.dedent(code))
        return made[-1]

    yield write
    for name in made:
        sys.modules.pop(name, None)


# ---- one's own


def test_the_example_of_the_page(tmp_path, capsys, module):
    code = block("mine.py")
    body = [line for line in code.splitlines() if line.strip()]
    assert len(body) <= 15
    name = module(code)
    make_video(tmp_path / "clip.mp4", frames=4)
    davis(tmp_path / "DAVIS", split="val")
    for line in block("commands").splitlines():
        words = line.replace("mine:", f"{name}:").split()
        assert words[0] == "vsod"
        code, out, err = vsod(capsys, *words[1:])
        assert code == 0, err
    assert "colourful" in out or "overall" in out
    frames, _ = decode(tmp_path / "masks.mp4")
    assert len(frames) == 4


class Blue(nn.Module):
    image_size, mean, std = (48, 64), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, frames):
        return self.scale * frames[:, 2, ::2, ::2]


def test_a_network_of_frames_is_wrapped():
    model = from_factory(Blue, "here:Blue")
    assert model.image_size == (48, 64) and model.clip_length == 1
    frames = [picture(index) for index in range(3)]
    made = VideoPredictor(model, "cpu").predict_clip(frames)
    for frame, saliency in zip(frames, made, strict=True):
        blue = torch.from_numpy(frame[:, :, 2].copy())[None, None].float() / 255
        logits = 3 * (blue - 0.5) / 0.5
        small = nn.functional.interpolate(logits[:, :, ::2, ::2], (48, 64), mode="bilinear")
        np.testing.assert_allclose(saliency, small[0, 0].sigmoid().numpy(), atol=1e-6)


class Tapped(nn.Module):
    """Reads its layers in its own order: folding the batch norm would change the first map."""

    image_size = (32, 32)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.BatchNorm2d(1))
        self.layers[1].running_mean.fill_(3.0)

    def forward(self, frames):
        return self.layers[0](frames)


def test_nothing_is_changed_in_the_code_of_others():
    network = Tapped()
    frame = np.full((32, 32, 3), 200, np.uint8)
    predictor = VideoPredictor(from_factory(lambda: network, "here"), "cpu", precision="auto")
    (made,) = predictor.predict_clip([frame])
    assert predictor.dtype == torch.float32
    expected = network(torch.full((1, 3, 32, 32), 200 / 255)).sigmoid()[0, 0]
    np.testing.assert_allclose(made, expected.detach().numpy(), atol=1e-6)


def test_names_of_a_package(tmp_path, monkeypatch):
    package = tmp_path / "somebody-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[vsod.models]\nblue = test_models:Blue\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert isinstance(zoo.load_model("blue").network, nn.Module)
    with pytest.raises(zoo.InputError, match=r"another one \(blue.*module:factory"):
        zoo.load_model("bleu")


BAD = {
    "def make(): return 3": "returns int",
    "def make(a): return a": "TypeError",
    "def make(): raise RuntimeError('no weights\\nhere')": "RuntimeError: no weights",
    "def make(): exit(3)": "SystemExit",
    "make = 3": "is int, not a function",
    "raise ValueError('of the module')": "importing .* fails: ValueError: of the module",
    "import does_not_exist_anywhere": "needs does_not_exist_anywhere",
    "def make(:": "SyntaxError",
    "other = 1": "there is no make in",
    "from torch import nn\nclass make(nn.Identity):\n image_size = 3": "image_size is 3",
    "from torch import nn\nclass make(nn.Identity):\n image_size = (9**9, 9)": "at most",
    "from torch import nn\nclass make(nn.Identity):\n mean = 'abc'": "mean and std",
    "from torch import nn\nclass make(nn.Identity):\n mean = (0.5,)": "mean and std: three numbers",
    "from torch import nn\nclass make(nn.Identity):\n std = (1, 0, 1)": "none of std is 0",
    "from torch import nn\nclass make(nn.Identity): pass": r"gives \(1, 3, 384, 384\)",
    "from torch import nn\nclass make(nn.Module):\n def forward(self, x): return [x]":
        "gives list for frames",
    "from torch import nn\nclass make(nn.Module):\n def forward(self, x): return x[:, 0] / 0 * 0":
        "gives NaN for frame 00000",
    "from torch import nn\nclass make(nn.Module):\n def forward(self, x): exit(3)": "SystemExit: 3",
    "from torch import nn\nclass make(nn.Module):\n def forward(self, x): return x @ x[0, 0, :3]":
        "RuntimeError: ",
}  # fmt: skip


@pytest.mark.parametrize("code", BAD, ids=lambda code: code.splitlines()[-1].strip()[:40])
def test_what_is_wrong_with_a_factory_is_one_line(tmp_path, capsys, module, code):
    name = module(code)
    make_video(tmp_path / "clip.mp4", frames=2)
    result = vsod(capsys, "predict", "clip.mp4", "-o", "out.mp4", "--model", f"{name}:make")
    assert re.search(BAD[code], refused(result, f"model {name}:make"))
    assert not (tmp_path / "out.mp4").exists()


def test_a_window_of_somebody_elses_model_is_checked(module, tmp_path, capsys):
    name = module("""
        from vsod_models.networks.contract import SaliencyModel
        class make(SaliencyModel):
            clip_length, image_size, outputs = 2, (8, 8), "all"
            def encode(self, frames, prior=None): return [frames]
            def decode(self, maps, size): return maps[0]
        """)
    make_video(tmp_path / "clip.mp4", frames=2)
    refused(
        vsod(capsys, "predict", "clip.mp4", "-o", "out.mp4", "--model", f"{name}:make"),
        "decode gives (1, 2, 3, 8, 8); (1, 2, 1, H, W) is needed",
    )


def test_names_that_are_none(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "clip.mp4", frames=2)
    (tmp_path / "tabnanny.py").write_text("raise SystemExit('in place of a library')")
    for name, word in {
        "nowhere:make": "no module nowhere is installed",
        "tabnanny:nothing": "there is no nothing in",
        "no such model": "neither a folder",
        "hub:nobody": "hub:owner/name is needed",
        "hub:../..": "model hub:../..: cannot be had",
        "onnx:nothing.onnx": "no such file",
        "onnx:clip.mp4": "no ONNX file",
    }.items():
        refused(vsod(capsys, "predict", "clip.mp4", "-o", "out.mp4", "--model", name), word)
    given = ("--model-option", "mean=0,0,0")
    refused(vsod(capsys, "predict", "clip.mp4", "-o", "out.mp4", *given), "takes no options (mean)")
    refused(
        vsod(capsys, "predict", "clip.mp4", "-o", "out.mp4", "--trust-remote-code"),
        "no remote code",
    )


class Touch:
    """Code that a pickle runs when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_pickle_does_not_run(tmp_path, capsys, recwarn):
    make_video(tmp_path / "clip.mp4", frames=2)
    for write in (torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))):
        write({"state_dict": Touch(tmp_path / "ran")}, tmp_path / "model.ckpt")
        given = ("--model", tmp_path / "model.ckpt")
        refused(vsod(capsys, "predict", tmp_path / "clip.mp4", "-o", tmp_path / "o.mp4", *given),
                "model.ckpt: not a checkpoint")  # fmt: skip
    assert not (tmp_path / "ran").exists() and not recwarn.list


# ---- the hub


@pytest.fixture
def hub(tmp_path):
    """The address of a hub with the files of folders `<owner>/<name>`; and what was asked of it."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            asked.append(self.path)
            match = re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/([^/]+)/(.+)", self.path)
            file = tmp_path / "hub" / match[1] / match[3] if match else None
            found = file is not None and file.is_file()
            content = file.read_bytes() if found else b""
            self.send_response(200 if found else 404)
            if not found and match and (tmp_path / "hub" / match[1]).is_dir():
                self.send_header("X-Error-Code", "EntryNotFound")
            elif not found:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("ETag", f'"{len(content)}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *rest):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def load_in_a_process(tmp_path, names, endpoint):
    """What `load_model` says of each name, in a process with this hub and a cache of its own."""
    code = f"""
        from vsod_models.zoo import load_model
        for name in {names!r}:
            try:
                model = load_model(name)
                print(type(model).__name__, sum(p.sum().item() for p in model.parameters()))
            except Exception as error:
                print(type(error).__name__, error)
        """
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_our_classes_from_the_hub(tmp_path, hub):
    address, asked = hub
    model = MSSA(**SMALL)
    model.save_pretrained(tmp_path / "hub/me/small")
    pickled = tmp_path / "hub/me/pickled"
    model.save_pretrained(pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({"code": Touch(tmp_path / "ran")}, pickled / "pytorch_model.bin")
    names = ["hub:me/small", "hub:me/pickled", "hub:me/nothing"]
    small, without, nothing = load_in_a_process(tmp_path, names, address)
    kind, total = small.split()
    assert kind == "MSSA"
    assert float(total) == pytest.approx(sum(p.sum().item() for p in model.parameters()))
    assert without.startswith("InputError model hub:me/pickled: has no model.safetensors")
    assert nothing.startswith("InputError model hub:me/nothing: cannot be had: ")
    assert not any("pytorch_model" in path for path in asked) and not (tmp_path / "ran").exists()
    # The hub is gone: what was there before is found, and the rest is a sentence.
    small, nothing = load_in_a_process(
        tmp_path, ["hub:me/small", "hub:me/other"], "http://127.0.0.1:9"
    )
    assert small.split()[0] == "MSSA"
    assert nothing.startswith("InputError model hub:me/other: ")


# ---- ONNX


def onnx_file(path, shape, body, metadata=(), kind=1):
    """A file that computes `body(graph helper) -> nodes` from the input "frames" of `shape`."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    inputs = [helper.make_tensor_value_info("frames", kind, shape)]
    outputs = [helper.make_tensor_value_info("map", kind, None)]
    constants = [
        helper.make_tensor("two", 1, [], [2.0]),
        helper.make_tensor("axes", 7, [1], [len(shape) - 3]),
    ]
    graph = helper.make_graph(body(helper), "test", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)
    return f"onnx:{path}"


def mean_of_channels(helper):
    return [
        helper.make_node("ReduceMean", ["frames", "axes"], ["mean"], keepdims=1),
        helper.make_node("Mul", ["mean", "two"], ["map"]),
    ]


def test_an_onnx_file_of_frames(tmp_path):
    pytest.importorskip("onnxruntime")
    name = onnx_file(tmp_path / "a.onnx", ["n", 3, "h", "w"], mean_of_channels)
    with pytest.raises(zoo.InputError, match="image_size=HEIGHT,WIDTH"):
        zoo.load_model(name)
    options = {"image_size": "48,64", "mean": "0.5,0.5,0.5", "std": "0.5,0.5,0.5"}
    model = zoo.load_model(name, options=options)
    frames = [picture(index) for index in range(3)]
    made = VideoPredictor(model, "cpu").predict_clip(frames)
    for frame, saliency in zip(frames, made, strict=True):
        expected = 2 * (frame.mean(2) / 255 - 0.5) / 0.5
        np.testing.assert_allclose(saliency, 1 / (1 + np.exp(-expected)), atol=1e-6)
    # Another file is another model to a record of what made a mask.
    other = onnx_file(tmp_path / "b.onnx", ["m", 3, "h", "w"], mean_of_channels)
    records = [VideoPredictor(m, "cpu").record()
               for m in (model, zoo.load_model(other, options=options))]  # fmt: skip
    assert records[0]["hash"] != records[1]["hash"]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_onnx_file_of_windows_says_of_itself_what_it_needs(tmp_path, count):
    pytest.importorskip("onnxruntime")

    class Said(MSSA):
        terms = "a test"

    said = metadata_of(Said(**SMALL, clip_length=3), image_size="48,64", values="probabilities")
    assert set(said) <= set(METADATA) and said["clip_length"] == "3" and said["terms"] == "a test"
    name = onnx_file(tmp_path / "a.onnx", [1, 3, 3, 48, 64], mean_of_channels, said)
    model = zoo.load_model(name)
    assert (model.clip_length, model.image_size, model.terms) == (3, (48, 64), "a test")
    frames = [picture(index) // 2 for index in range(count)]
    made = VideoPredictor(model, "cpu").predict_clip(frames)
    for frame, saliency in zip(frames, made, strict=True):
        np.testing.assert_allclose(saliency, 2 * frame.mean(2) / 255, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        (["n", 3, 8, 8], {"mean": "a,b,c"}, "mean is 'a,b,c'; 3 numbers"),
        (["n", 3, 8, 8], {"std": "0,1,1"}, "0 divides nothing"),
        (["n", 3, 8, 8], {"image_size": "9,9"}, "takes 8,8 only"),
        (["n", 3, 8, 8], {"values": "anything"}, "logits or probabilities"),
        (["n", 3, 8, 8], {"clip_length": "4"}, "windows"),
        (["n", 3, 8, 8], {"needs_prior": "true"}, "has the inputs frames"),
        ([8, 8], {}, "takes"),
        (["n", 3, 8, 8], {"sizes": "8,8"}, "sizes is not one of image_size"),
    ],
)
def test_what_is_wrong_with_an_onnx_file(tmp_path, shape, options, words):
    pytest.importorskip("onnxruntime")

    def copied(helper):
        return [helper.make_node("Identity", ["frames"], ["map"])]

    name = onnx_file(tmp_path / "a.onnx", shape, copied)
    with pytest.raises(zoo.InputError, match=re.escape(words)):
        zoo.load_model(name, options=options)


def test_an_onnx_file_that_gives_no_map(tmp_path):
    pytest.importorskip("onnxruntime")

    def copied(helper):
        return [helper.make_node("Identity", ["frames"], ["map"])]

    model = zoo.load_model(onnx_file(tmp_path / "a.onnx", ["n", 3, 8, 8], copied))
    with pytest.raises(zoo.InputError, match="one map a frame"):
        VideoPredictor(model, "cpu").predict_clip([picture(0)])


# ---- transformers


def segformer(folder, labels=("background", "dog", "cat"), **config):
    """A tiny one with random weights, saved; and the model."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(**sizes, id2label=dict(enumerate(labels)), **config)
    )
    model.eval().save_pretrained(folder)
    text = '{"size": {"height": 64, "width": 96}, "image_mean": [0.5, 0.5, 0.5], '
    (folder / "preprocessor_config.json").write_text(text + '"image_std": [0.5, 0.5, 0.5]}')
    return model


def test_a_segmentation_model_of_transformers(tmp_path):
    tiny = segformer(tmp_path / "tiny")
    model = zoo.load_model(f"transformers:{tmp_path}/tiny")
    assert model.image_size == (64, 96)
    frame = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    pixels = (torch.from_numpy(frame).movedim(-1, 0)[None] / 255 - 0.5) / 0.5
    with torch.no_grad():
        shares = tiny(pixels).logits.softmax(1)
    for options, classes in (({}, [1, 2]), ({"labels": "Dog"}, [1]), ({"labels": "0,cat"}, [0, 2])):
        model = zoo.load_model(f"transformers:{tmp_path}/tiny", options=options)
        (made,) = VideoPredictor(model, "cpu").predict_clip([frame])
        logits = shares[:, classes].sum(1, keepdim=True).logit()
        expected = nn.functional.interpolate(logits, (64, 96), mode="bilinear").sigmoid()[0, 0]
        np.testing.assert_allclose(made, expected.numpy(), atol=1e-5)
    for options, words in (
        ({"labels": "horse"}, "no class 'horse'"),
        ({"labels": "0,1,2"}, "nothing is left"),
        ({"label": "1"}, "label is not one of image_size"),
        ({"mean": "1"}, "3 numbers"),
    ):
        with pytest.raises(zoo.InputError, match=words):
            zoo.load_model(f"transformers:{tmp_path}/tiny", options=options)


REMOTE = """
    import pathlib, torch, transformers
    pathlib.Path({ran!r}).write_text("")

    class TinyConfig(transformers.PretrainedConfig):
        model_type = "tiny_remote"

    class Tiny(transformers.PreTrainedModel):
        config_class = TinyConfig
        def __init__(self, config):
            super().__init__(config)
            self.layer = torch.nn.Conv2d(3, 1, 1)
            self.post_init()
        def forward(self, x):
            return [torch.zeros(1), self.layer(x)]
    """


def test_code_in_a_repository_runs_only_when_it_is_trusted(tmp_path, monkeypatch):
    """As BiRefNet is published: the class is in the repository, and gives a list of maps."""
    pytest.importorskip("transformers")
    from safetensors.torch import save_file

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, ran = tmp_path / "remote", tmp_path / "ran"
    folder.mkdir()
    (folder / "tiny.py").write_text(textwrap.dedent(REMOTE.format(ran=str(ran))))
    auto = '{"AutoConfig": "tiny.TinyConfig", "AutoModelForImageSegmentation": "tiny.Tiny"}'
    (folder / "config.json").write_text(f'{{"model_type": "tiny_remote", "auto_map": {auto}}}')
    weights = {"layer.weight": torch.ones(1, 3, 1, 1), "layer.bias": torch.zeros(1)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    name = f"transformers:{folder}"
    with pytest.raises(zoo.InputError, match="trust_remote_code=True"):
        zoo.load_model(name)
    assert not ran.exists()
    given = {"mean": "0,0,0", "std": "1,1,1"}
    model = zoo.load_model(name, options=given, trust_remote_code=True)
    assert ran.exists() and model.image_size == (1024, 1024)
    predictor = VideoPredictor(model, "cpu", size=(48, 64))
    (made,) = predictor.predict_clip([picture(0)])
    expected = 1 / (1 + np.exp(picture(0).sum(2) / -255.0))
    np.testing.assert_allclose(made, expected, atol=1e-5)


def test_what_is_wrong_with_a_repository_is_one_line(tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    make_video(tmp_path / "clip.mp4", frames=2)
    segformer(tmp_path / "many", labels=("sky", "sea"))
    segformer(tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save({"code": Touch(tmp_path / "ran")}, tmp_path / "pickled/pytorch_model.bin")
    transformers.BertConfig().save_pretrained(tmp_path / "words")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown/config.json").write_text('{"model_type": "nobodys"}')
    for name, words in {
        f"{tmp_path}/many": "gives (1, 2, 16, 24)",
        f"{tmp_path}/pickled": "OSError: ",
        f"{tmp_path}/words": "a model of type bert gives no maps of classes",
        f"{tmp_path}/unknown": "nobodys is not known to transformers",
        "nobody": "owner/name or a folder is needed",
    }.items():
        given = ("--model", f"transformers:{name}", "-o", tmp_path / "out.mp4")
        refused(vsod(capsys, "predict", tmp_path / "clip.mp4", *given), words)
    assert not (tmp_path / "ran").exists()


# ---- SAM 2


@pytest.fixture(scope="module")
def tiny_sam2(tmp_path_factory):
    """A folder with a video SAM 2 of random weights, for pictures of 64x64."""
    transformers = pytest.importorskip("transformers")
    backbone = dict(
        model_type="sam2_hiera_det_model", hidden_size=8, num_attention_heads=1,
        image_size=[64, 64], embed_dim_per_stage=[8, 16, 32, 64], blocks_per_stage=[1, 1, 2, 1],
        num_attention_heads_per_stage=[1, 1, 1, 1], global_attention_blocks=[3],
        window_size_per_stage=[8, 4, 4, 4], window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    vision = dict(
        model_type="sam2_vision_model", backbone_config=backbone, fpn_hidden_size=128,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )  # fmt: skip
    decoder = dict(hidden_size=128, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32)
    config = transformers.Sam2VideoConfig(
        vision_config=vision, prompt_encoder_config=dict(hidden_size=128, image_size=64),
        mask_decoder_config=decoder, image_size=64, memory_attention_hidden_size=128,
        memory_attention_num_layers=1, memory_attention_feed_forward_hidden_size=32,
        memory_attention_rope_feat_sizes=[4, 4], memory_encoder_hidden_size=128,
        mask_downsampler_embed_dim=128, memory_fuser_embed_dim=128,
        memory_fuser_intermediate_dim=32, memory_fuser_num_layers=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sam2")
    transformers.Sam2VideoModel(config).save_pretrained(folder)
    size, masks = dict(height=64, width=64), dict(height=16, width=16)
    transformers.Sam2VideoProcessor(
        transformers.Sam2ImageProcessor(size=size, mask_size=masks),
        transformers.Sam2VideoVideoProcessor(size=size), target_size=64,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_the_surest_mask_is_the_prompt_and_the_rest_is_tracked(tiny_sam2):
    refine = Sam2Refiner(str(tiny_sam2))
    pictures = [np.random.default_rng(i).integers(0, 255, (48, 80, 3), np.uint8) for i in range(5)]
    saliency = [np.zeros((48, 80), np.float32) for _ in pictures]
    assert surest(saliency) is None
    assert all(a is b for a, b in zip(refine(pictures, saliency), saliency, strict=True))
    saliency[2][10:30, 20:50] = 0.9
    saliency[3][10:30, 20:50] = 0.6
    saliency[3][0] = 0.3  # less sure
    assert surest(saliency) == 2
    made = refine(pictures, saliency)
    assert [m.shape for m in made] == [(48, 80)] * 5
    # The prompt comes back as it is, at SAM 2's size; every other frame was tracked.
    assert made[2][20, 35] > 0.99 and made[2][40, 70] < 0.01
    for index in (0, 1, 3, 4):
        assert not np.array_equal(made[index], saliency[index]) and np.isfinite(made[index]).all()


def test_refining_on_the_command(tiny_sam2, tmp_path, capsys):
    make_video(tmp_path / "clip.mp4", frames=30)
    out = ("-o", tmp_path / "out.mp4", "--model", "mssa-tiny", "--device", "cpu")
    sam2 = ("--refine", f"sam2:{tiny_sam2}")
    code, printed, err = vsod(capsys, "predict", tmp_path / "clip.mp4", *out, *sam2)
    assert code == 0 and f"refined by sam2:{tiny_sam2}" in printed, err
    assert len(decode(tmp_path / "out.mp4")[0]) == 30
    out = (*out, "--overwrite")
    for given, words in (
        (("--refine", "sam3:x"), "--refine sam3:x: sam2:owner/name is needed"),
        (("--refine", "sam2:nobody"), "owner/name or a folder is needed"),
        ((*sam2, "--causal"), "frames that are to come"),
    ):
        refused(vsod(capsys, "predict", tmp_path / "clip.mp4", *out, *given), words)
