"""Recipes: everything that decides a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from ..data.transforms import Augmentation
from ..errors import InputError
from ..limits import (
    Count,
    CountOrNone,
    Frames,
    NotNegative,
    Positive,
    Share,
    SizeList,
    check_plain,
)
from ..networks.losses import LossOptions

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass
class Source:
    """One dataset of the training mix."""

    dataset: str = "???"
    split: str = "train"
    root: str | None = None  # its folder, where data.roots does not say it
    share: Positive = 1.0  # of the samples, relative to the other sources; see data.draw
    labels: str | None = None  # folder of `vsod label coarse`, laid over the ground truth
    options: dict[str, Any] = field(default_factory=dict)  # of the reader


@dataclass
class Shape:
    """What some of the batches look like: `clips` clips of `clip_length` frames of `size`."""

    size: SizeList = field(default_factory=lambda: [224, 224])  # height, width
    clip_length: Frames = 1
    clips: Count = 1  # on each device


@dataclass
class DataConfig:
    train: list[Source] = field(default_factory=list)
    validation: Source | None = None
    roots: dict[str, str] = field(default_factory=dict)  # dataset -> folder
    # (height, width) of the samples; with several sizes, batches alternate between them
    sizes: Annotated[list[SizeList], Field(min_length=1, max_length=64)] = field(
        default_factory=lambda: [[224, 224]]
    )
    clip_length: Frames | None = None  # the model's; another one is an error
    # In place of sizes, clip_length and batch_size: batches of different shapes, in turn.
    shapes: list[Shape] = field(default_factory=list)
    # What a sample is drawn from, once the shares are applied: "shares", a source and then a frame
    # of it; "frames", any labelled frame of all sources; "sequences", a sequence of all sources and
    # then a frame of it.
    draw: str = "shares"
    sampling: str = "adjacent"  # or "random": any frames of a sequence, in order
    max_stride: Count = 1  # adjacent frames of a clip are 1 to this far apart
    augment: bool = True
    augmentation: Augmentation = field(default_factory=Augmentation)
    label_weights: dict[str, NotNegative] = field(default_factory=dict)  # fine, coarse; default 1
    prior: str = "flow-magnitude"  # motion prior of MSST: this, or a folder of `vsod prior train`
    prior_cache: str | None = None  # where priors are kept; default: the user's cache folder
    without_motion: Share = 0.2  # of the clips for a model that takes their motion (MSSA)
    cache: bool = False  # keep the resized frames in memory, in each worker
    workers: Annotated[int, Field(ge=0, le=1024)] = 2


@dataclass
class OptimizerConfig:
    learning_rate: Positive = 1e-5
    backbone_factor: NotNegative = 1.0  # learning rate of the backbone, relative
    halve_every: CountOrNone = 20_000  # iterations; 0: never
    decay: CountOrNone = 0  # the last iterations, in which the rate falls to 0 along a cosine
    warm_up: CountOrNone = 0  # iterations of linear warm-up
    weight_decay: NotNegative = 0.0
    clip_gradient: NotNegative = 1.0  # norm; 0: not clipped
    # Decay of the moving average of the weights that is saved; 0: none.
    average: Annotated[Share, Field(lt=1)] = 0.0
    # Modules, by their names in the model, that stay as they are: no gradients, and batch norm by
    # its stored statistics.
    freeze: list[str] = field(default_factory=list)


@dataclass
class Config:
    """Everything that decides a run; recipes fill it in."""

    out: str = "???"
    model: dict[str, Any] = field(default_factory=lambda: {"name": "mssa"})
    backbone_weights: str | None = None  # torchvision's name or a file
    # A model to start from, after that: folder, checkpoint or shipped name; MSST takes an earlier
    # stage, whose weights then replace those of the backbone where it has them.
    initial: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossOptions = field(default_factory=LossOptions)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    iterations: Count = 100_000
    batch_size: Count = 4  # clips, on each device
    accumulate: Count = 1  # batches an iteration
    precision: str = "32-true"  # Lightning's names: "bf16-mixed", "16-mixed"
    accelerator: str = "auto"
    devices: Count = 1
    nodes: Count = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    half: bool = False  # the saved model/ holds its weights in half precision
    terms: str = ""  # what the weights may be used for, written into the saved model
    checkpoint_every: Count = 500  # iterations
    validate_every: CountOrNone = 5_000  # iterations; 0: never


def find_recipe(name: str | Path) -> Path:
    """The file of that name or, if there is none, the recipe of that name in the package.

    Args:
        name: a path such as "my.yaml"; or "mssa-finetune", "recipes/mssa-finetune.yaml", of the
            package.

    Raises:
        InputError: neither is there; lists the names of the package.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in RECIPES.glob("*.yaml")}
    if (
        path.parent.name in ("", "recipes")
        and path.suffix in ("", ".yaml")
        and path.stem in shipped
    ):
        return shipped[path.stem]
    raise InputError(f"{name}: no such recipe; the package has {', '.join(sorted(shipped))}")


def read_config(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe and applies overrides: `key=value`, with dotted keys and YAML values.

    A recipe may name another one beside it, `base: other.yaml`, which it then changes.

    Args:
        recipe: a file, or a name of the package; see `find_recipe`.

    Raises:
        InputError: unknown key, wrong type or missing value; names the file or the override.
    """
    config = OmegaConf.structured(Config)
    for source, layer in _recipe_layers(find_recipe(recipe)):
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise InputError(f"{source}: {_first_line(error)}") from None
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"{override!r} is not key=value")
        try:
            value = OmegaConf.from_dotlist([f"value={text}"]).value
            OmegaConf.update(config, key, value, merge=True)
        except Exception as error:  # OmegaConf's kinds and the YAML parser's
            raise InputError(f"{override}: {_first_line(error)}") from None
    try:
        done = cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise InputError(f"{recipe}: {_first_line(error)}") from None
    check_plain(Config, plain(done), str(recipe))
    return done


def _recipe_layers(file: Path) -> list[tuple[str, Any]]:
    """A recipe after those that it is based on, each with its name."""
    try:
        loaded = OmegaConf.load(file)
    except FileNotFoundError:
        raise InputError(f"{file}: no such recipe") from None
    except Exception as error:  # the YAML parser's own kinds
        raise InputError(f"{file}: not readable as YAML ({_first_line(error)})") from None
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{file}: a recipe is a mapping of keys to values")
    base = loaded.pop("base", None)
    return (_recipe_layers(file.parent / base) if base else []) + [(str(file), loaded)]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    key = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), ""
    )
    return lines[0] if not key or key in lines[0] else f"{key}: {lines[0]}"


def plain(config: Any) -> dict[str, Any]:
    """The configuration, a `Config` or one of OmegaConf's, as plain dictionaries and lists."""
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}
