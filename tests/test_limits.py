"""Values of model configurations and recipes: types and bounds, before anything is built."""

import json
import math
import shutil

import pytest

pytest.importorskip("lightning", reason="the extra `models` is not installed")
pytest.importorskip("omegaconf", reason="the extra `models` is not installed")
pytest.importorskip("cv2", reason="the extra `models` is not installed")
pytest.importorskip("skimage", reason="the extra `models` is not installed")
pytest.importorskip("torchvision", reason="the extra `models` is not installed")

import torch
from safetensors.torch import load_file, save_file

from vsod_models.errors import InputError
from vsod_models.limits import Backend, check_arguments
from vsod_models.networks.backbones import Backbone
from vsod_models.networks.mssa import MSSA
from vsod_models.networks.msst import MSST
from vsod_models.networks.saved import build_model
from vsod_models.prior.load import load_prior
from vsod_models.prior.regions import MotionPrior
from vsod_models.training.recipe import RECIPES, read_config
from vsod_models.zoo import SHIPPED, load_model, model_class
from vsod_ops import backends

TINY = dict(
    backbone="vgg11", backbone_options={"width": 0.125}, levels=[8], skips=[], num_heads=[2],
    dim=16, depth=1, feed_forward=16, decoder_dim=8, image_size=[32, 32],
)  # fmt: skip


def test_the_backends_are_those_of_the_registry():
    assert Backend.__args__ == backends.BACKENDS


# What nobody should write, by the kind of the argument.
NO_COUNT = [0, -1, 10**9, 2**70, 1.5, "128", True, None, [4], {}, math.nan, math.inf]
NO_LIST = [0, "48", [0, 0], [-1], [10**9], ["8"], [1.5], [None], [[4]], [4] * 100, {}]
NO_SIZE = [0, [], [224], [224, 224, 224], [0, 224], [-1, 5], [10**6, 10**6], [16384, 16384],
           ["a", "b"], [224.0, 224.0], "224x224"]  # fmt: skip
NO_FACTOR = [0, -1.0, 1e9, math.nan, math.inf, "1"]
BAD = [
    *((MSSA, key, value) for key in ("dim", "depth", "feed_forward", "decoder_dim", "clip_length")
      for value in NO_COUNT),
    *((MSSA, key, value) for key in ("levels", "num_heads", "reductions", "skips")
      for value in NO_LIST),
    *((cls, "image_size", value) for cls in (MSSA, MSST) for value in NO_SIZE),
    *((MSST, key, value) for key in ("hidden", "clip_length") for value in NO_COUNT),
    *((MSST, "width", value) for value in NO_FACTOR),
    *((cls, "backend", value) for cls in (MSSA, MSST) for value in ("foo", "", 1, [])),
    *((MSSA, "backbone_options", value)
      for value in (3, [1], {"width": 1e9}, {"width": math.nan}, {"x": {"y": 1}},
                    {"inverted_residual_setting": [[1, 16, 10**9, 1]]})),
    *((MotionPrior, key, value) for key in ("hidden", "side", "region_side", "least_pixels")
      for value in (0, -5, 2**40, 1.5, "8", None)),
    *((MotionPrior, "scales", value) for value in ([], [0.0], [-1.0], [math.nan], "abc", 5)),
]  # fmt: skip


@pytest.mark.parametrize("cls, key, value", BAD)
def test_a_value_that_cannot_be_is_refused_before_anything_is_built(cls, key, value, monkeypatch):
    def built(*_, **__):
        raise AssertionError("it was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", built)
    with pytest.raises(InputError, match=rf"{cls.__name__}: {key}.* is ") as error:
        cls(**{key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [
    {"dim": -128}, {"depth": 10**9}, {"num_heads": [0, 0]}, {"image_size": [10**6, 10**6]},
    {"dim": "128"}, {"backend": "foo"},
])  # fmt: skip
def test_a_saved_configuration_names_file_key_and_value(changes, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED / "mssa-tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_heads"] = config.pop("heads")
    (folder / "config.json").write_text(json.dumps(config | changes))
    ((key, _),) = changes.items()
    with pytest.raises(InputError, match=rf"config\.json: model\.{key}.* is .*it has to be"):
        load_model(folder)
    with pytest.raises(InputError, match=rf"MSSA: {key}"):
        MSSA.from_pretrained(folder)


def test_a_model_of_more_parameters_than_memory_is_not_built():
    arguments = TINY | {"dim": 65536, "num_heads": [1024], "feed_forward": 65536, "depth": 256}
    with pytest.raises(InputError, match=r"recipe: a model of [\d,]+ parameters; at most"):
        build_model(MSSA, arguments, "recipe")


def test_building_without_memory_first_leaves_the_initial_weights_as_they_were():
    torch.manual_seed(3)
    direct = MSSA(**TINY).state_dict()
    torch.manual_seed(3)
    through = build_model(MSSA, TINY, "recipe").state_dict()
    assert all(torch.equal(direct[k], through[k]) for k in direct)


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "9" * 10_000, "[]", "null", "{}", '{"model": []}', '{"model": 3}', "\ufeff{",
     "", "nan"],
)  # fmt: skip
def test_any_json_for_a_configuration_is_one_line(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    for load in (load_model, load_prior):
        with pytest.raises(InputError, match=r"config\.json: not ") as error:
            load(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [
    [], 5, None, {}, {"config": 1, "state_dict": {}},
    {"config": {"model": 1, "data": {}}, "state_dict": {}},
    {"config": {"model": {}, "data": {}}, "state_dict": [1]},
    {"config": {"model": {}, "data": {}}, "state_dict": {"model.x": 1}},
    {"config": {"model": {"name": []}, "data": {}}, "state_dict": {}},
    {"config": {"model": {"name": "mssa", 3: 4}, "data": {}}, "state_dict": {}},
])  # fmt: skip
def test_any_checkpoint_of_another_kind_is_one_line(content, tmp_path):
    torch.save(content, tmp_path / "some.ckpt")
    with pytest.raises(InputError, match=r"some\.ckpt: ") as error:
        load_model(tmp_path / "some.ckpt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(value, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED / "mssa-tiny", folder)
    state = load_file(folder / "model.safetensors")
    state["mask.weight"].view(-1)[3] = value
    save_file(state, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: weights that are NaN or infinite"):
        load_model(folder)


def test_initial_weights_that_are_no_numbers_are_refused(tmp_path):
    """Those of a backbone, and those of an earlier stage."""
    backbone = Backbone("vgg11", (8, 16), width=0.125)
    state = backbone.body.state_dict()
    next(iter(state.values())).view(-1)[0] = math.nan
    torch.save(state, tmp_path / "vgg.pth")
    with pytest.raises(InputError, match=r"vgg\.pth: weights that are NaN or infinite \(in "):
        backbone.load_weights(tmp_path / "vgg.pth")
    later = MSST("st", backbone="vgg16", width=0.125)
    state = MSST("os", backbone="vgg16", width=0.125).state_dict()
    later.load_initial(state)
    next(iter(state.values())).view(-1)[0] = math.inf
    with pytest.raises(InputError, match="first stage: weights that are NaN or infinite"):
        later.load_initial(state, "first stage")


OVERRIDES = [
    "checkpoint_every=0", "accumulate=0", "iterations=0", "iterations=-1", "batch_size=0",
    "seed=-1", "data.sizes=[]", "data.sizes=[[224]]", "data.sizes=[[0,0]]",
    "data.sizes=[[100000,100000]]", "data.workers=-1", "data.clip_length=0", "data.max_stride=0",
    "optimizer.learning_rate=-1e-5", "optimizer.learning_rate=.nan", "optimizer.learning_rate=0",
    "optimizer.halve_every=-1", "optimizer.average=1.0", "optimizer.clip_gradient=-1",
    "optimizer.weight_decay=.inf", "devices=0", "nodes=0", "validate_every=-1", "loss.beta=-1",
    "data.augmentation.crop=[0,0]", "data.augmentation.crop=[0.9,0.1]",
    "data.augmentation.rotation=-5", "data.augmentation.hue=7", "data.augmentation.flip=2",
    "data.label_weights.coarse=-1", "data.train=[{dataset: synthetic, share: 0}]",
    "data.train=[{dataset: synthetic, share: .nan}]", "data.shapes=[{size: [0, 1]}]",
    "data.shapes=[{clips: 0}]", "iterations=100000000000000000000",
]  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_recipe_says_key_value_and_what_is_allowed(override, tmp_path):
    with pytest.raises(InputError) as error:
        read_config("mssa-pretrain", ["out=x", override])
    key = override.partition("=")[0]
    assert key in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_of_the_package_pass(recipe):
    config = read_config(recipe, ["out=x"])
    arguments = dict(config.model)
    check_arguments(model_class(str(arguments.pop("name", "mssa"))), arguments, "recipe: model.")
