"""The networks under MSST's streams: sizes, dilation, weights from torchvision's files."""

from urllib.error import URLError

import pytest
import torch

pytest.importorskip("torchvision", reason="the extra `models` is not installed")

import torchvision

from vsod_models.errors import InputError
from vsod_models.networks import backbones
from vsod_models.networks.fcn import NAMES, DilatedMobileNetV2, LargeFOV, build_fcn


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("size", [(65, 97), (50, 31)])
def test_both_maps_have_the_output_stride(name, output_stride, size):
    model = build_fcn(name, 3, output_stride=output_stride, width=0.25).eval()
    middle, last = model(torch.rand(2, 3, *size))
    side = [-(-n // output_stride) for n in size]
    assert list(middle.shape) == [2, model.channels[0], *side]
    assert list(last.shape) == [2, model.channels[1], *side]


def test_large_fov_is_the_network_of_deeplab():
    model = LargeFOV()
    assert model.channels == (512, 1024)
    assert sum(p.numel() for p in model.parameters()) == 20_483_904  # VGG 14.7 M, fc6, fc7
    conv5 = [m for m in model.features[model.middle :] if isinstance(m, torch.nn.Conv2d)]
    assert [m.dilation for m in conv5] == [(2, 2)] * 3
    assert model.fc6.dilation == (12, 12) and model.fc6.kernel_size == (3, 3)
    assert LargeFOV(output_stride=16).fc6.dilation == (6, 6)


@pytest.mark.parametrize("name", ["vgg16", "mobilenet_v2"])
def test_map_pixel_lies_over_its_image_pixel(name):
    """With equal weights and mean pools the gradient of a map pixel is centred on its pixel."""
    model = build_fcn(name, 3, width=0.25).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        for child, pool in module.named_children():
            if isinstance(pool, torch.nn.MaxPool2d):
                setattr(module, child, torch.nn.AvgPool2d(3, pool.stride, padding=1))
    x = (1e-4 * torch.rand(1, 3, 161, 161)).requires_grad_()  # far from the bound of ReLU6
    middle, _ = model(x)
    stride = 160 // (middle.shape[-1] - 1)
    centre = middle.shape[-1] // 2
    (gradient,) = torch.autograd.grad(middle[0, :, centre, centre].sum(), x)
    seen = gradient.abs().sum((0, 1))
    position = (seen.sum(0) * torch.arange(161)).sum() / seen.sum()
    assert abs(position.item() - centre * stride) < 0.5


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """torchvision's keys and shapes; the classifier counts rows in biases, columns in weights."""
    network = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    state = network.state_dict(prefix="features.")
    for key, columns in (("classifier.0", 512 * 7 * 7), ("classifier.3", 4096)):
        state[f"{key}.weight"] = torch.arange(columns).float().expand(4096, columns)
        state[f"{key}.bias"] = torch.arange(4096).float()
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(state, path)
    return path, state


def test_vgg_weights_and_thinned_classifier(vgg_file):
    path, state = vgg_file
    model = LargeFOV()
    model.load_weights(path)
    assert torch.equal(model.features[28].weight, state["features.28.weight"])
    fc6 = state["classifier.0.weight"].view(4096, 512, 7, 7)
    assert torch.equal(model.fc6.weight[1, :, 1, 2], fc6[4, :, 3, 6])
    assert model.fc6.bias[5] == 20 and model.fc7.bias[6] == 24
    assert model.fc7.weight[2, 3, 0, 0] == 12


@pytest.mark.parametrize("keep_rgb", [True, False])
def test_four_channels(vgg_file, keep_rgb):
    path, state = vgg_file
    model = LargeFOV(in_channels=4)
    before = model.features[0].weight.clone()
    model.load_weights(path, keep_rgb=keep_rgb)
    weight = model.features[0].weight
    assert torch.equal(weight[:, 3], before[:, 3])
    assert torch.equal(weight[:, :3], state["features.0.weight"] if keep_rgb else before[:, :3])
    assert torch.equal(model.features[2].weight, state["features.2.weight"])


def test_mobilenet_weights_in_half_precision(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = {
        k: v.half().contiguous() if v.is_floating_point() else v
        for k, v in torchvision.models.mobilenet_v2(weights=None).state_dict().items()
    }
    save_file(state, tmp_path / "mobilenet.safetensors")
    model = DilatedMobileNetV2(4)
    model.load_weights(tmp_path / "mobilenet.safetensors")
    assert torch.equal(model.features[0][0].weight[:, :3], state["features.0.0.weight"].float())
    key = "features.17.conv.1.0.weight"
    assert torch.equal(model.state_dict()[key], state[key].float())


def test_what_cannot_be_loaded(tmp_path, vgg_file):
    with pytest.raises(InputError, match=r"another shape \(first: features.0.weight"):
        LargeFOV(width=0.5).load_weights(vgg_file[0])
    with pytest.raises(InputError, match="not weights of this mobilenet_v2"):
        DilatedMobileNetV2().load_weights(vgg_file[0])
    with pytest.raises(InputError, match="no such file"):
        LargeFOV().load_weights(tmp_path / "nothing.pth")
    with pytest.raises(InputError, match="neither a"):
        LargeFOV().load_weights("IMAGENET22K")
    with pytest.raises(InputError, match="resnet18"):
        build_fcn("resnet18", 3)
    with pytest.raises(InputError, match="output_stride"):
        build_fcn("vgg16", 3, output_stride=32)


@pytest.mark.parametrize(
    "error",
    [
        URLError(OSError(-3, "Temporary failure in name resolution")),
        RuntimeError('invalid hash value (expected "397923af", got "da39a3ee")'),
    ],
)
def test_weights_that_cannot_be_had(monkeypatch, error):
    """No connection, or one that broke off: one line with the file to fetch elsewhere."""

    class Entry:
        url = "https://example.org/vgg16.pth"

        def get_state_dict(self, **options):
            raise error

    models = backbones.torchvision.models
    monkeypatch.setattr(models, "get_model_weights", lambda name: {"IMAGENET1K_V1": Entry()})
    message = (
        r"IMAGENET1K_V1 of vgg16 could not be downloaded .*`curl -O https://example\.org/vgg16"
    )
    with pytest.raises(InputError, match=message) as raised:
        backbones.find_weights("vgg16", "IMAGENET1K_V1")
    assert "\n" not in str(raised.value)
