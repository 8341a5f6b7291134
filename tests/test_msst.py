"""MSST: shapes, the paper's ablations, windows over carried features, stages, disk."""

import math
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision", reason="the extra `models` is not installed")
pytest.importorskip("huggingface_hub", reason="the extra `models` is not installed")

from checks import assert_same_system, exact_float32, system_results

from vsod_models.errors import InputError
from vsod_models.networks.losses import balanced_bce, msst_loss
from vsod_models.networks.msst import CONFIGURATIONS, MSST


def small(configuration="full", **options):
    torch.manual_seed(1)
    return MSST(configuration, **{"width": 0.125, "hidden": 6, "image_size": (65, 65)} | options)


def clip(batch=1, frames=4, size=(41, 57)):
    generator = torch.Generator().manual_seed(2)
    frames_ = torch.rand(batch, frames, 3, *size, generator=generator)
    return frames_, torch.rand(batch, frames, 1, *size, generator=generator)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("options", [{}, {"backbone": "mobilenet_v2", "width": 0.25}])
def test_one_map_of_the_last_frame(configuration, options):
    model = small(configuration, **options).eval()
    frames, prior = clip(2)
    out = model(frames, prior if model.needs_prior else None)
    assert out.shape == (2, 1, 41, 57)
    assert model.clip_length == (4 if configuration == "full" else 1)
    other = frames.clone()
    other[:, 0] = 0
    same = torch.equal(out, model(other, prior if model.needs_prior else None))
    assert same == (configuration != "full"), "only the ConvLSTM looks at earlier frames"


@pytest.mark.parametrize("full_resolution", [False, True])
def test_training_gives_the_auxiliary_map_and_gradients_everywhere(full_resolution):
    model = small(full_resolution=full_resolution).train()
    logits, auxiliary = model(*clip())
    assert logits.shape == auxiliary.shape == (1, 1, 41, 57)
    (logits.square().mean() + 0.1 * auxiliary.square().mean()).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []
    logits, auxiliary = small("st").train()(*clip())
    assert auxiliary is None and logits.shape == (1, 1, 41, 57)


def test_fusion_is_the_papers_formula():
    """S = W_s * X_s + W_t * X_t + O^T, the branch maps upsampled first, as the paper has it."""
    model = small(full_resolution=True).eval()
    frames, prior = clip()
    with torch.no_grad():
        large = [
            model.upsample(m.flatten(0, 1), (41, 57)).unflatten(0, (1, 4))
            for m in model.encode(frames, prior)
        ]
        out, _ = model.lstm(torch.cat(large, 2))
        o_last = model.read_out(out[:, -1])
        expected = model.weight_s(large[0][:, -1]) + model.weight_t(large[1][:, -1]) + o_last
        torch.testing.assert_close(model(frames, prior), expected)
        small_maps = small().eval()  # the same weights, the ConvLSTM at branch resolution
        low = small_maps.read_out(
            small_maps.lstm(torch.cat(small_maps.encode(frames, prior), 2))[0][:, -1]
        )
        torch.testing.assert_close(
            small_maps(frames, prior), expected - o_last + small_maps.upsample(low, (41, 57))
        )


def test_upsampling_keeps_map_pixels_over_their_image_pixels():
    model = small("os")
    maps = torch.rand(1, 1, 5, 8)
    out = model.upsample(maps, (40, 57))
    torch.testing.assert_close(out[..., ::8, ::8], maps)
    out = model.upsample(maps, (33, 64))
    torch.testing.assert_close(out[..., ::8, ::8], maps)
    ramp = torch.arange(5.0).view(1, 1, 1, 5).expand(1, 1, 2, 5)
    torch.testing.assert_close(model.upsample(ramp, (9, 33))[0, 0, 3], torch.arange(33) / 8)


def test_a_window_of_carried_features_gives_the_same():
    """Each frame through each sub-network once: encoded alone, put together for each window."""
    model = small().eval()
    frames, prior = clip(1, 6)
    with torch.no_grad():
        carried = [model.encode(frames[:, t : t + 1], prior[:, t : t + 1]) for t in range(6)]
        assert [list(m.shape) for m in carried[0]] == [[1, 1, 2, 6, 8]] * 2
        for last in range(3, 6):
            window = [torch.cat(m, 1) for m in zip(*carried[last - 3 : last + 1], strict=True)]
            expected = model(frames[:, last - 3 : last + 1], prior[:, last - 3 : last + 1])
            torch.testing.assert_close(model.decode(window, (41, 57)), expected)


@pytest.mark.parametrize("full_resolution", [False, True])
def test_bfloat16_autocast(full_resolution):
    model = small(full_resolution=full_resolution).eval()
    frames, prior = clip()
    expected = model(frames, prior)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(frames, prior)
        msst_loss(*model.train()(frames, prior), torch.ones_like(out)).backward()
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)
    assert torch.isfinite(model.spatial.network.features[0].weight.grad).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 40)])
def test_frames_smaller_than_the_stride(size):
    assert small().eval()(*clip(size=size)).shape == (1, 1, *size)


def test_motion_reaches_the_mask():
    model = small("st").eval()
    frames, prior = clip()
    assert not torch.allclose(model(frames, prior), model(frames, 1 - prior))


def test_a_prior_that_does_not_fit():
    model = small("st").eval()
    frames, prior = clip()
    with pytest.raises(ValueError, match=r'"st" needs prior \(1, 1, 1, 41, 57\)'):
        model(frames)
    with pytest.raises(ValueError, match="got \\(1, 1, 1, 40, 57\\)"):
        model(frames, prior[..., :40, :])
    with pytest.raises(ValueError, match="frames must be"):
        model(frames[:, :, 0])
    with pytest.raises(InputError, match="'all' is not one of os, st, full"):
        MSST("all")


def test_stages_start_from_one_another():
    frames, prior = clip()
    os_, st, full = small("os"), small("st"), small("full")
    for parameter in os_.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    st.load_initial(os_.state_dict())
    full.load_initial(st.state_dict())
    assert torch.equal(full.weight_s.weight, os_.weight_s.weight)
    with torch.no_grad():
        for part in (full.weight_t, full.read_out):  # all that is new turned off
            for parameter in part.parameters():
                parameter.zero_()
        torch.testing.assert_close(full.eval()(frames, prior), os_.eval()(frames))
    with pytest.raises(InputError, match=r"first.pt: not weights of an earlier stage"):
        os_.load_initial(st.state_dict(), "first.pt")
    with pytest.raises(InputError, match=r"1 parameters missing.*weight_s.bias"):
        state = os_.state_dict()
        del state["weight_s.bias"]
        st.load_initial(state)


def test_disk(tmp_path):
    model = small("st", keep_rgb=False).eval()
    model.save_pretrained(tmp_path)
    back = MSST.from_pretrained(tmp_path)
    assert back.configuration == "st" and back.keep_rgb is False and back.image_size == (65, 65)
    frames, prior = clip()
    assert torch.equal(back(frames, prior), model(frames, prior))


def test_backbone_weights_reach_both_streams(tmp_path):
    from torchvision.models import vgg

    state = vgg.make_layers(vgg.cfgs["D"]).state_dict(prefix="features.")
    torch.save(state, tmp_path / "vgg16.pth")
    model = MSST("st", keep_rgb=False)
    model.load_backbone(tmp_path / "vgg16.pth")
    for stream in (model.spatial, model.temporal):
        assert torch.equal(stream.network.features[2].weight, state["features.2.weight"])
    assert torch.equal(model.spatial.network.features[0].weight, state["features.0.weight"])
    first = model.temporal.network.features[0].weight[:, :3]
    assert not torch.equal(first, state["features.0.weight"])
    own = {id(p) for p in model.backbone_parameters()}
    others = [name for name, p in model.named_parameters() if id(p) not in own]
    assert all(name.split(".")[1] in ("branches", "weight", "bias") for name in others)


def test_it_learns_a_moving_square():
    """A few steps of the full model on one clip separate the square from the background."""
    torch.manual_seed(0)
    model = small(backbone="vgg16_bn", width=0.0625, output_stride=16).train()
    frames, prior = clip(2, 4, (33, 33))
    mask = torch.zeros(2, 1, 33, 33)
    mask[..., 8:24, 12:28] = 1
    frames[:, :, 0] = frames[:, :, 0] * 0.5 + 0.5 * mask
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        logits, auxiliary = model(frames, prior)
        loss = msst_loss(logits, auxiliary, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_predict_command(tmp_path, capsys):
    """Stream from the command: a prior is made where the model needs one, masks come out."""
    for package in ("av", "typer", "cv2", "skimage"):
        pytest.importorskip(package, reason="the extra `models` is not installed")
    import cv2

    from vsod_models.cli import main
    from vsod_models.prior.regions import MotionPrior

    frames, _ = clip(1, 3)
    (tmp_path / "frames").mkdir()
    for t, frame in enumerate((255 * frames[0]).byte().movedim(1, -1).numpy()):
        cv2.imwrite(str(tmp_path / "frames" / f"{t:05d}.png"), frame)
    small().save_pretrained(tmp_path / "msst")
    MotionPrior(None, scales=(50,), hidden=4).save_pretrained(tmp_path / "prior")

    def predict(model, *options, out="out"):
        with pytest.raises(SystemExit) as exit:
            paths = [tmp_path / "frames", "-o", tmp_path / out, "--model", tmp_path / model]
            main(["predict", *map(str, (*paths, "--device", "cpu", *options))])
        return exit.value.code

    assert predict("msst", "--crf", "dss") == 0
    assert "prior flow-magnitude\n" in capsys.readouterr().out
    masks = sorted((tmp_path / "out").iterdir())
    assert [cv2.imread(str(p)).shape for p in masks] == [(41, 57, 3)] * 3
    assert predict("msst", "--prior", tmp_path / "prior", out="other") == 0
    assert predict("msst", "--prior", "raft", out="third") == 2
    assert predict("msst", "--crf", "sharp", out="third") == 2
    assert "crf must be one of dss, deeplab, got sharp" in capsys.readouterr().err
    small(prior="regions").save_pretrained(tmp_path / "own")  # as `vsod train` leaves it
    assert predict("own", out="third") == 2
    assert "own/prior: no motion prior here" in capsys.readouterr().err
    shutil.copytree(tmp_path / "prior", tmp_path / "own" / "prior")
    assert predict("own", out="with its prior") == 0
    assert f"prior {tmp_path / 'own' / 'prior'}\n" in capsys.readouterr().out
    expected, found = (
        [cv2.imread(str(p)) for p in sorted((tmp_path / name).iterdir())]
        for name in ("other", "with its prior")
    )
    assert all(map(np.array_equal, expected, found))
    small("os").save_pretrained(tmp_path / "os")
    capsys.readouterr()
    assert predict("os", "--prior", tmp_path / "prior", out="third") == 2
    assert "takes no motion prior" in capsys.readouterr().err
    cv2.imwrite(str(tmp_path / "frames" / "00002.png"), np.zeros((30, 40, 3), np.uint8))
    assert predict("msst", out="third") == 2
    assert "frames 00001 and 00002: optical flow needs" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()
    assert predict("prior", out="third") == 2
    assert "a motion prior, not a model of saliency" in capsys.readouterr().err


# ---- losses


def test_balanced_bce_gives_both_classes_half():
    """At p = 1/2 everywhere both classes cost the same, whatever their shares."""
    mask = torch.zeros(2, 1, 10, 10)
    mask[0, 0, :2] = 1
    mask[1, 0, :5] = 1
    loss = balanced_bce(torch.zeros(2, 1, 10, 10), mask)
    shares = torch.tensor([0.2, 0.5])
    expected = 2 * shares * (1 - shares) * math.log(2)
    torch.testing.assert_close(loss[:, 0], expected)
    wrong = torch.where(mask > 0, -3.0, -30.0)  # only the salient pixels cost anything
    alpha = 1 - shares
    torch.testing.assert_close(
        balanced_bce(wrong, mask)[:, 0], alpha * shares * math.log1p(math.exp(3))
    )


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_balanced_bce_of_a_constant_mask_still_teaches(value):
    logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
    balanced_bce(logits, torch.full_like(logits, value)).sum().backward()
    assert (logits.grad * (0.5 - value) > 0).all() and torch.isfinite(logits.grad).all()


def test_msst_loss_adds_a_tenth_of_the_auxiliary_one():
    logits, auxiliary = torch.randn(2, 3, 1, 5, 6).unbind(0)
    mask = (torch.rand(3, 1, 5, 6) > 0.7).float()
    main, side = balanced_bce(logits, mask).mean(), balanced_bce(auxiliary, mask).mean()
    torch.testing.assert_close(msst_loss(logits, auxiliary, mask), main + 0.1 * side)
    torch.testing.assert_close(msst_loss(logits, None, mask), main)


def test_msst_loss_weighs_labels_even_in_a_batch_of_one():
    logits, mask = torch.randn(2, 1, 5, 6), (torch.rand(2, 1, 5, 6) > 0.7).float()
    each = balanced_bce(logits, mask).squeeze(1)
    loss = msst_loss(logits, None, mask, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(loss, 0.5 * each[0])
    loss = msst_loss(logits, None, mask, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(loss, (0.5 * each[0] + each[1]) / 2)
    none = msst_loss(logits.requires_grad_(), None, mask, torch.zeros(2))
    none.backward()
    assert none == 0 and (logits.grad == 0).all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("options", [{}, {"full_resolution": True}])
def test_on_a_gpu_as_on_a_cpu(options, device="cuda"):
    mask = torch.zeros(1, 1, 41, 57)
    mask[..., 10:30, 20:40] = 1

    def loss(logits, auxiliary):
        return msst_loss(logits, auxiliary, mask.to(logits.device))

    with exact_float32():
        actual = system_results(small(**options).to(device), loss, *clip())
    assert_same_system(actual, system_results(small(**options), loss, *clip()), 1e-4)
