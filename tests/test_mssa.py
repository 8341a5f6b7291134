"""MSSA: the network, its backbones, its losses, and models on disk."""

import copy
import json

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")

from checks import assert_same_system, exact_float32, system_results
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import vsod_ops.flops  # noqa: F401  counts the op
from vsod_models.errors import InputError
from vsod_models.networks.backbones import Backbone, find_maps
from vsod_models.networks.losses import mssa_loss, soft_iou, weighted_bce
from vsod_models.networks.mssa import MSSA
from vsod_models.prediction import VideoPredictor
from vsod_models.zoo import load_model

SMALL = dict(
    backbone="vgg11_bn",
    backbone_options={"width": 0.125},
    skips=(4,),
    dim=16,
    depth=1,
    num_heads=(2, 4),
    feed_forward=24,
    decoder_dim=8,
)


def small(**changes) -> MSSA:
    torch.manual_seed(0)
    return MSSA(**{**SMALL, **changes}).eval()


@pytest.fixture(scope="module")
def paper() -> MSSA:
    return MSSA()


@pytest.mark.parametrize(
    "name, strides, channels",
    [
        ("vgg16", (2, 4, 8, 16), [128, 256, 512, 512]),
        ("vgg16_bn", (1, 8, 16), [64, 512, 512]),
        ("mobilenet_v2", (2, 4, 8, 16), [16, 24, 32, 96]),
        ("resnet18", (2, 4, 8, 16, 32), [64, 64, 128, 256, 512]),
    ],
)
def test_backbone_gives_the_last_map_of_each_stride(name, strides, channels):
    backbone = Backbone(name, strides).eval()
    maps = backbone(torch.rand(2, 3, 64, 96))
    assert backbone.channels == channels == [m.shape[1] for m in maps]
    assert [tuple(m.shape[-2:]) for m in maps] == [(64 // s, 96 // s) for s in strides]


def test_vgg16_stages_are_those_before_the_pools():
    from torchvision.models import vgg16

    assert find_maps(vgg16(), "last")[8][0] == "features.22"  # relu4_3
    assert find_maps(vgg16(), "last")[16][0] == "features.29"  # relu5_3
    assert find_maps(vgg16(), "first")[16][0] == "features.23"  # pool4
    assert find_maps(vgg16(), "first")[32][0] == "features.30"  # pool5


def test_backbone_normalises_as_torchvision():
    from torchvision.models import resnet18
    from torchvision.transforms.v2.functional import normalize

    backbone = Backbone("resnet18", (4,)).eval()
    network = resnet18().eval()
    backbone.body.load_state_dict(network.state_dict(), strict=False)
    image = torch.rand(1, 3, 64, 64)
    x = normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    x = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(x)))))
    torch.testing.assert_close(backbone(image)[0], x)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_backbone_weights_from_a_file_with_torchvisions_names(ending, tmp_path):
    from torchvision.models import resnet18

    state = resnet18().state_dict()
    file = tmp_path / f"weights.{ending}"
    save_file(state, file) if ending == "safetensors" else torch.save(state, file)
    backbone = Backbone("resnet18", (4, 8))
    backbone.load_weights(file)
    for name, value in backbone.body.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(
    "name, strides, options, message",
    [
        ("vgg17", (8,), {}, "vgg17"),
        ("vgg16", (64,), {}, "strides"),
        ("vgg16", (8,), {"tap": "middle"}, "tap"),
        ("resnet18", (8,), {"width": 0.5}, "width"),
        ("resnet18", (8,), {"depth": 3}, "depth"),
    ],
)
def test_backbones_that_cannot_be(name, strides, options, message):
    with pytest.raises(InputError, match=message):
        Backbone(name, strides, **options)


def test_backbone_weights_that_cannot_be(tmp_path, monkeypatch):
    backbone = Backbone("resnet18", (4,))
    with pytest.raises(InputError, match=r"missing\.pth"):
        backbone.load_weights(tmp_path / "missing.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(InputError, match=r"broken\.safetensors"):
        backbone.load_weights(tmp_path / "broken.safetensors")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth: not weights of this resnet18"):
        backbone.load_weights(tmp_path / "other.pth")
    with pytest.raises(InputError, match="IMAGENET1K_V1"):
        backbone.load_weights("IMAGENET9")

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(InputError, match=r"`curl -O https://\S+resnet18\S*\.pth` gets a file that"):
        backbone.load_weights("IMAGENET1K_V1")


def test_parameters_and_arithmetic_of_the_papers_size(paper):
    parameters = sum(p.numel() for p in paper.parameters())
    # VGG16-BN without classifier 14.7 M; two levels of four blocks at 256 channels 9.6 M.
    assert sum(p.numel() for p in paper.backbone.parameters()) == 14_723_136
    assert parameters == 25_836_081
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        paper.eval()(torch.rand(1, 5, 3, 224, 224))
    # 19.2 GMAC of it are the op's (tests/test_benchmarks_mssa.py).
    assert counter.get_total_flops() / 2e9 == pytest.approx(137.8, abs=0.1)


def test_baseline_has_all_heads_at_full_length(paper):
    baseline = MSSA(reductions=(1,))
    for model, groups in ((paper, 2), (baseline, 1)):
        attention = model.transformers[0][0].attention
        assert len(attention.key_value) == groups
        assert attention.num_heads == 4
        assert model.transformers[1][0].attention.num_heads == 8


@pytest.mark.parametrize("reductions", [(1, 2), (1,)])
@pytest.mark.parametrize("shape", [(1, 5, 3, 64, 64), (2, 1, 3, 17, 63), (1, 3, 3, 113, 9)])
def test_any_clip_length_and_size(shape, reductions):
    logits = small(reductions=reductions)(torch.rand(shape))
    assert logits.shape == (*shape[:2], 1, *shape[3:])
    assert logits.isfinite().all()


def test_the_op_gives_what_the_reference_gives():
    frames = torch.rand(1, 5, 3, 64, 80)
    torch.testing.assert_close(small()(frames), small(backend="reference")(frames))


@pytest.mark.parametrize("position", [None, "depthwise"])
def test_frames_exchange_information_and_clips_do_not(position):
    model = small(position=position)
    frames = torch.rand(2, 3, 3, 48, 48)
    changed = frames.clone()
    changed[0, 2] = 0.5
    before, after = model(frames), model(changed)
    assert (before[0, 0] - after[0, 0]).abs().max() > 1e-6
    assert torch.equal(before[1], after[1])


def test_maps_of_single_frames_can_be_put_together():
    model = small()
    frames = torch.rand(1, 4, 3, 50, 70)
    apart = [model.encode(frames[:, t : t + 1]) for t in range(4)]
    together = [torch.cat(maps, 1) for maps in zip(*apart, strict=True)]
    torch.testing.assert_close(model.decode(together, (50, 70)), model(frames))


def test_every_parameter_gets_a_gradient():
    model = small().train()
    mask = (torch.rand(2, 3, 1, 48, 48) > 0.7).float()
    mssa_loss(model(torch.rand(2, 3, 3, 48, 48)), mask).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_motion_is_added_to_a_model_that_had_none():
    frames, before = torch.rand(1, 3, 3, 50, 70), small()
    motion = torch.rand(1, 3, 4, 13, 18)
    model = small(motion=True)
    model.load_initial(before.state_dict())
    assert torch.equal(model(frames), before(frames)), "nothing, before it is trained"
    assert torch.equal(model(frames, motion), before(frames))
    model(frames, motion).sum().backward()
    for share in model.motion.shares:
        assert share.weight.grad.abs().sum() > 0
        nn.init.normal_(share.weight, std=0.1)
    other = motion.clone()
    other[:, 1] += 1
    maps = [model.encode(frames, m) for m in (motion, other)]
    for one, two in zip(*maps, strict=True):
        assert torch.equal(one[:, ::2], two[:, ::2]) and not torch.equal(one[:, 1], two[:, 1])
    assert torch.equal(model(frames), model(frames, torch.zeros_like(motion)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": (2,)}, "num_heads"),
        ({"skips": (8,)}, "skips"),
        ({"position": "absolute"}, "position"),
    ],
)
def test_configurations_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        small(**changes)


def test_frames_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"frames must be \(B, T, 3, H, W\)"):
        small()(torch.rand(5, 3, 32, 32))


@pytest.mark.parametrize("reading", ["paper", "balanced"])
def test_weighted_bce_by_hand(reading):
    logits = torch.tensor([[[2.0, -1.0], [0.5, -3.0]]], dtype=torch.float64)
    mask = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    p, gamma = logits.sigmoid(), 0.25
    a = gamma if reading == "paper" else 1 - gamma
    by_hand = -(a * mask * p.log() + (1 - a) * (1 - mask) * (1 - p).log()).mean()
    torch.testing.assert_close(
        weighted_bce(logits, mask, reading).double(), by_hand[None], rtol=1e-6, atol=1e-7
    )


def test_soft_iou_at_its_ends():
    mask = torch.zeros(1, 8, 8)
    sure = torch.full((1, 8, 8), -50.0)
    assert soft_iou(sure, mask).item() == 0  # empty and predicted empty
    mask[:, :4] = 1
    right = torch.where(mask > 0, 50.0, -50.0)
    assert soft_iou(right, mask).item() == 0
    assert soft_iou(-right, mask).item() == pytest.approx(1 - 1 / 65)


def test_loss_counts_annotated_frames_alone():
    logits, mask = torch.randn(2, 3, 1, 8, 8), (torch.rand(2, 3, 1, 8, 8) > 0.5).float()
    valid = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    loss = mssa_loss(logits, mask, valid)
    kept = valid.bool()
    torch.testing.assert_close(loss, mssa_loss(logits[kept][:, None], mask[kept][:, None]))
    assert mssa_loss(logits, mask, torch.zeros(2, 3)).item() == 0


def test_loss_of_an_unknown_reading():
    with pytest.raises(ValueError, match="positive_weight"):
        weighted_bce(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), "inverse")


def test_saved_and_loaded(tmp_path):
    model = small(reductions=(1,))
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model"] == "mssa" and config["reductions"] == [1]
    frames = torch.rand(1, 2, 3, 32, 32)
    for loaded in (load_model(tmp_path / "model"), MSSA.from_pretrained(tmp_path / "model")):
        assert torch.equal(loaded.eval()(frames), model(frames))


def test_saved_by_the_former_name_of_an_argument(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    former = {"heads" if key == "num_heads" else key: value for key, value in config.items()}
    assert former["heads"] == [2, 4] and former != config
    file.write_text(json.dumps(former))
    frames = torch.rand(1, 2, 3, 32, 32)
    for load in (load_model, MSSA.from_pretrained):
        loaded = load(tmp_path).eval()
        assert torch.equal(loaded(frames), model(frames))
        loaded.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    file.write_text(json.dumps(config | former))
    for load in (load_model, MSSA.from_pretrained):
        with pytest.raises(
            InputError, match=r"model\.heads is the former name of model\.num_heads"
        ):
            load(tmp_path)


def test_terms_and_half_precision_are_saved(tmp_path):
    model = small().eval()
    model.terms = "birdwatching"
    copy.deepcopy(model).half().save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.terms == "birdwatching" and again.mask.weight.dtype == torch.float32
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=1e-3, atol=1e-6)
    assert "birdwatching" in VideoPredictor(again, "cpu").describe()
    assert "weights for" not in VideoPredictor(small(), "cpu").describe()


def test_models_that_cannot_be_loaded(tmp_path):
    with pytest.raises(InputError, match="neither a folder or checkpoint nor shipped"):
        load_model("mssa-huge")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        load_model(tmp_path / "empty")
    small().save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors: not readable"):
        load_model(tmp_path / "model")
    weights.write_bytes(whole)
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "dim": 32}))
    with pytest.raises(InputError, match="weights of another model"):
        load_model(tmp_path / "model")
    file.write_text(json.dumps({**config, "colour": 3}))
    with pytest.raises(InputError, match=r"model\.colour is not an argument of MSSA"):
        load_model(tmp_path / "model")
    (tmp_path / "some.ckpt").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"some\.ckpt: not a checkpoint"):
        load_model(tmp_path / "some.ckpt")
    torch.save({"config": {"lr": 1}, "state_dict": {}}, tmp_path / "some.ckpt")  # another program's
    with pytest.raises(InputError, match=r"some\.ckpt: not a checkpoint"):
        load_model(tmp_path / "some.ckpt")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_as_on_a_cpu(device="cuda"):
    frames, mask = torch.rand(1, 3, 3, 48, 64), torch.zeros(1, 3, 1, 48, 64)
    mask[..., 10:30, 20:40] = 1

    def loss(logits):
        return mssa_loss(logits, mask.to(logits.device))

    with exact_float32():
        actual = system_results(small().to(device), loss, frames)
    assert_same_system(actual, system_results(small(), loss, frames), 1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_bfloat16_training_on_a_gpu(device="cuda"):
    """20 steps under autocast end where those with the reference of the attention op end."""
    frames = torch.rand(1, 3, 3, 48, 64, device=device)
    mask = (frames[:, :, :1] > 0.5).float()
    losses = {}
    for backend in (None, "reference"):
        model = small(backend=backend).train().to(device)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(20):
            with torch.autocast(device, torch.bfloat16):
                loss = mssa_loss(model(frames), mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.setdefault(backend, []).append(loss.item())
    ours, reference = losses[None], losses["reference"]
    assert ours[0] == pytest.approx(reference[0], rel=0.01)
    assert ours[-1] < 0.99 * ours[0]
    assert ours[-1] == pytest.approx(reference[-1], rel=0.02)
