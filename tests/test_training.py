"""Training: recipes, samples by number, resuming after a kill, several devices."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("omegaconf")
pytest.importorskip("cv2")
pytest.importorskip("skimage")
pytest.importorskip("torchvision")

import lightning
from safetensors.torch import load_file
from typer.testing import CliRunner

from vsod_models.cli import app, main
from vsod_models.errors import InputError, Stopped
from vsod_models.files import whole_file, whole_folder
from vsod_models.prior.motion import clip_motion
from vsod_models.training.recipe import RECIPES, Config, Shape, find_recipe, read_config
from vsod_models.training.run import make_model, train
from vsod_models.training.samples import SampleNumbers, make_dataset
from vsod_models.zoo import load_model

ROOT = Path(__file__).parent.parent
RECIPE = """
model:
  name: mssa
  backbone: vgg11
  backbone_options: {width: 0.125}
  levels: [8, 16]
  skips: [4]
  num_heads: [2, 4]
  dim: 16
  depth: 1
  feed_forward: 16
  decoder_dim: 8
  clip_length: 2
  image_size: [32, 32]
data:
  train:
    - {dataset: synthetic, options: {clips: 8, frames: 4, size: [40, 40]}}
  sizes: [[32, 32]]
  workers: 0
accelerator: cpu
batch_size: 2
iterations: 6
checkpoint_every: 2
optimizer: {learning_rate: 0.001}
"""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def start(recipe: Path, out: Path, *arguments: str) -> subprocess.Popen:
    """`vsod train` in a process of its own."""
    command = [sys.executable, "-m", "vsod_models.cli", "train", "--config", str(recipe)]
    return subprocess.Popen(
        [*command, f"out={out}", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen) -> str:
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def assert_same_but_for_rounding(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for name, value in a.items():
        other = b[name]
        if "key_value" in name and name.endswith("bias"):
            # A key's bias moves no softmax: its gradient is rounding, which Adam makes large.
            value, other = value.chunk(2)[1], other.chunk(2)[1]
        torch.testing.assert_close(value, other, rtol=1e-4, atol=2e-5, msg=name)


def test_killed_and_resumed_ends_with_the_same_bits(recipe, tmp_path):
    never = start(recipe, tmp_path / "never", "data.workers=1")
    # So many iterations that the kill comes before the end; the resumed run is told the real end.
    killed = start(recipe, tmp_path / "killed", "data.workers=1", "iterations=100000")
    checkpoint = tmp_path / "killed" / "last.ckpt"
    deadline = time.monotonic() + 240
    while not checkpoint.exists():
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()[0]
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    # The machine decides how far it came; any checkpoint serves, but not one beyond the end.
    iteration = torch.load(checkpoint, weights_only=True)["global_step"]
    assert iteration % 2 == 0 and iteration >= 2
    finish(never)
    ends = max(6, iteration + 2)
    if ends > 6:
        finish(start(recipe, tmp_path / "longer", "data.workers=1", f"iterations={ends}"))
    printed = finish(
        start(recipe, tmp_path / "killed", "data.workers=1", f"iterations={ends}", "--resume")
    )
    assert f"iterations {iteration} to {ends}" in printed
    expected = weights(tmp_path / ("never" if ends == 6 else "longer"))
    resumed = weights(tmp_path / "killed")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_two_processes_are_one_with_twice_the_batch(recipe, tmp_path):
    two = start(recipe, tmp_path / "two", "devices=2", "batch_size=2")
    one = start(recipe, tmp_path / "one", "devices=1", "batch_size=4")
    finish(one)
    assert "cpu x 2" in finish(two)
    assert_same_but_for_rounding(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_accumulated_batches_are_one_large_batch(recipe, tmp_path):
    for name, changes in (("one", ["batch_size=4"]), ("sum", ["batch_size=2", "accumulate=2"])):
        train(read_config(recipe, [f"out={tmp_path / name}", *changes]))
    assert_same_but_for_rounding(weights(tmp_path / "one"), weights(tmp_path / "sum"))


def test_training_improves(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = [f"out={tmp_path}/run", "iterations=60", "checkpoint_every=30", "data.augment=false"]
    changes += ["data.train.0.options.clips=2", "optimizer.learning_rate=0.003"]
    train(read_config(recipe, [*changes, "loss.positive_weight=balanced"]))
    curves = EventAccumulator(str(tmp_path / "run" / "curves"))
    curves.Reload()
    losses = [point.value for point in curves.Scalars("loss")]
    assert len(losses) == 6
    assert losses[-1] < 0.8 * losses[0]


def test_validation_writes_scores_and_pictures(recipe, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    validation = "{dataset: synthetic, split: val, options: {clips: 2, frames: 4, size: [40, 48]}}"
    changes = [f"out={tmp_path}/run", "iterations=2", f"data.validation={validation}"]
    train(read_config(recipe, [*changes, "validate_every=2"]))
    assert "davsod protocol" in capsys.readouterr().out
    curves = EventAccumulator(str(tmp_path / "run" / "curves"))
    curves.Reload()
    assert 0 < curves.Scalars("validation/MAE")[0].value < 1
    assert len([tag for tag in curves.Tags()["images"] if tag.startswith("validation/")]) == 2


def test_a_checkpoint_is_a_model_and_a_start(recipe, tmp_path):
    train(read_config(recipe, [f"out={tmp_path}/first", "iterations=2"]))
    loaded = load_model(tmp_path / "first" / "last.ckpt").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in weights(tmp_path / "first").items())
    other = [f"out={tmp_path}/second", f"initial={tmp_path}/first/model"]
    train(read_config(recipe, [*other, "iterations=2", "optimizer.learning_rate=1e-30"]))
    assert all(torch.equal(loaded[k], v) for k, v in weights(tmp_path / "second").items())
    with pytest.raises(InputError, match="weights of another model"):
        train(read_config(recipe, [*other, f"out={tmp_path}/third", "model.dim=32"]))


def test_a_step_of_msst_is_the_papers_loss(tmp_path):
    """Of the last frame, weighted by its label, with beta; from the earlier stage's weights."""
    from vsod_models.networks.losses import balanced_bce
    from vsod_models.networks.msst import MSST
    from vsod_models.training.run import Task, make_model

    small = {"width": 0.0625, "hidden": 4, "output_stride": 16}
    torch.manual_seed(7)
    before = MSST("st", **small)
    before.save_pretrained(tmp_path)
    config = read_config("msst-full", [
        "out=x", "backbone_weights=null", f"initial={tmp_path}", "loss.beta=0.3",
        *(f"model.{key}={value}" for key, value in small.items()),
    ])  # fmt: skip
    task = Task(make_model(config), config)
    task.log = lambda *_: None
    kept = task.model.state_dict()
    assert all(torch.equal(kept[name], x) for name, x in before.state_dict().items())

    for module in task.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    frames, prior = torch.rand(2, 4, 3, 17, 17), torch.rand(2, 4, 1, 17, 17)
    masks = (torch.rand(2, 4, 1, 17, 17) > 0.6).float()
    valid, weight = torch.ones(2, 4), torch.tensor([[1.0, 1, 1, 0.5], [1, 1, 1, 1]])
    batch = dict(frames=frames, prior=prior, masks=masks, valid=valid, weight=weight)
    each = [balanced_bce(m, masks[:, -1]).squeeze(1) for m in task.model(frames, prior)]
    expected = (weight[:, -1] * (each[0] + 0.3 * each[1])).mean()
    torch.testing.assert_close(task.training_step(batch, 0), expected)
    valid[0, -1] = 0
    expected = each[0][1] + 0.3 * each[1][1]
    torch.testing.assert_close(task.training_step(batch, 0), expected)


def test_the_three_stages_of_msst(tmp_path):
    """os -> st -> full, each from the one before, with priors made and coarse labels mixed in."""
    from vsod_models.cli import app
    from vsod_models.data import open_dataset
    from vsod_models.labels.coarse import make_labels
    from vsod_models.prior.load import load_prior, prior_of
    from vsod_models.prior.regions import MotionPrior

    data = tmp_path / "data"
    options = ["--clips", "3", "--val-clips", "1", "--frames", "4", "--height", "40"]
    arguments = ["data", "synthetic", str(data), *options, "--width", "48"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    records = open_dataset("folder", data, "train")
    make_labels(records.of_sequences(list(records.sequences)[:1]), tmp_path / "labels")
    small = [
        "model.backbone=mobilenet_v2", "model.width=0.25", "model.image_size=[48, 48]",
        "backbone_weights=null", "data.workers=0", "data.sizes=[[33, 33], [48, 48]]",
        f"data.train=[{{dataset: folder, labels: {tmp_path}/labels}}]",
        "data.label_weights.coarse=0.5", "data.validation={dataset: folder, split: val}",
        f"data.roots.folder={data}", f"data.prior_cache={tmp_path}/priors",
        "data.prior=flow-magnitude",
        "iterations=2", "batch_size=2", "checkpoint_every=2", "validate_every=2", "accelerator=cpu",
    ]  # fmt: skip
    MotionPrior(None, scales=(50,), hidden=4).save_pretrained(tmp_path / "regions")
    for stage, before in (("os", None), ("st", "os"), ("full", "st")):
        changes = [*small, f"out={tmp_path}/{stage}"]
        changes += [f"data.prior={tmp_path}/regions"] if stage == "full" else []
        changes.append(f"initial={tmp_path}/{before}/model" if before else "initial=null")
        train(read_config(f"msst-{stage}", changes))
    full, os_stage = weights(tmp_path / "full"), weights(tmp_path / "os")
    assert any(name.startswith("lstm.") for name in full)
    assert set(os_stage) < set(full)
    assert len(list((tmp_path / "priors").rglob("*.png"))) == 2 * 16, "of two kinds"
    assert prior_of(tmp_path / "st" / "model") == prior_of(tmp_path / "st" / "last.ckpt")
    assert prior_of(tmp_path / "st" / "model") == "flow-magnitude"
    assert prior_of(tmp_path / "full" / "last.ckpt") == str(tmp_path / "regions")
    kept = load_prior(prior_of(tmp_path / "full" / "model"))
    assert kept.key() == load_prior(tmp_path / "regions").key()
    assert load_model(tmp_path / "full" / "model").configuration == "full"


def test_samples_are_numbers():
    config = Config(out="", iterations=10, checkpoint_every=4, batch_size=3)
    one = list(SampleNumbers(config, 0, 1, lambda: 0))
    assert one == [[(n, 0) for n in range(3 * i, 3 * i + 3)] for i in range(4)]
    config.accumulate, config.batch_size = 2, 2
    ranks = [list(SampleNumbers(config, rank, 2, lambda: 8)) for rank in range(2)]
    assert [len(r) for r in ranks] == [4, 4]  # two iterations are left, of two batches each
    together = [number for pair in zip(*ranks, strict=True) for part in pair for number in part]
    assert together == [(n, 0) for n in range(8 * 2 * 2 * 2, 10 * 2 * 2 * 2)]


@pytest.mark.parametrize("world", [1, 2])
def test_batches_of_several_shapes_take_turns(world):
    config = Config(out="", iterations=5, checkpoint_every=5)
    config.data.shapes = [Shape([32, 32], 1, 4), Shape([16, 48], 3, 2)]
    ranks = [list(SampleNumbers(config, rank, world, lambda: 0)) for rank in range(world)]
    batches = [[n for part in parts for n in part] for parts in zip(*ranks, strict=True)]
    assert [shape for batch in batches for _, shape in batch[:1]] == [0, 1, 0, 1, 0]
    assert [len(batch) for batch in batches] == [4 * world, 2 * world] * 2 + [4 * world]
    assert [n for batch in batches for n, _ in batch] == list(range(16 * world)), "each once"
    # resumed in the middle, the same as before
    assert list(SampleNumbers(config, 0, world, lambda: 3)) == ranks[0][3:]


def test_the_mix_keeps_to_its_shares_and_sizes(recipe):
    changes = [
        "data.train=[{dataset: synthetic, share: 3, options: {clips: 2, size: [40, 40]}},"
        "{dataset: synthetic, split: val, share: 1, options: {clips: 2, size: [40, 40]}}]",
        "data.sizes=[[32, 32], [16, 48]]",
        "out=unused",
    ]
    config = read_config(recipe, changes)
    mix = make_dataset(config, make_model(config))
    draws = [np.random.default_rng((0, n)).random() for n in range(400)]
    assert abs(np.mean(np.searchsorted(mix.bounds, draws, side="right") == 0) - 0.75) < 0.05
    assert [tuple(mix[0, s]["frames"].shape[-2:]) for s in range(2)] == [(32, 32), (16, 48)]
    assert torch.equal(mix[5, 1]["frames"], mix[5, 1]["frames"])


def test_what_a_sample_is_drawn_from(recipe, tmp_path):
    """Of two sources with 1 and 3 clips of 4 and 2 frames: by share, by frames, by sequences."""
    for draw, expected in (("shares", 1 / 2), ("frames", 4 / 10), ("sequences", 1 / 4)):
        changes = [
            "data.train=[{dataset: synthetic, options: {clips: 1, frames: 4, size: [40, 40]}},"
            "{dataset: synthetic, split: val, options: {clips: 3, frames: 2, size: [40, 40]}}]",
            f"data.draw={draw}",
            "out=unused",
        ]
        config = read_config(recipe, changes)
        mix = make_dataset(config, make_model(config))
        assert mix.bounds[0] == pytest.approx(expected), draw
        assert mix.parts[0][1].by_sequence == (draw == "sequences")


def test_the_data_of_the_papers():
    finetune = read_config("mssa-finetune")
    assert [s.dataset for s in finetune.data.train] == ["davis16", "fbms59"]
    assert finetune.iterations == 100_000 and finetune.optimizer.halve_every == 20_000
    assert finetune.data.draw == "sequences"
    assert [s.dataset for s in read_config("mssa-pretrain").data.train] == ["coco"]
    for stage in ("os", "st", "full"):
        config = read_config(f"msst-{stage}")
        assert [(s.dataset, s.split) for s in config.data.train] == [
            ("davis16", "msst-train"), ("fbms59", "msst-train"), ("segtrackv2", "all")
        ]  # fmt: skip
        assert config.data.draw == "frames" and config.model["full_resolution"]
        assert config.data.prior == "runs/msst-prior"


def test_clips_bring_their_motion_where_the_model_takes_it(recipe):
    changes = [
        "data.train=[{dataset: synthetic, options: {clips: 3, size: [48, 64]}}]",
        "data.without_motion=0.5",
        "model.motion=true",
        "out=unused",
    ]
    config = read_config(recipe, changes)
    mix = make_dataset(config, make_model(config))
    moves = []
    for number in range(16):
        sample = mix[number, 0]
        frames = np.ascontiguousarray((255 * sample["frames"]).byte().movedim(1, -1))
        moves.append(bool(sample["motion"].any()))
        if moves[-1]:
            assert torch.equal(sample["motion"], torch.from_numpy(clip_motion(list(frames))))
    assert 4 <= sum(moves) <= 12 and torch.equal(mix[3, 0]["motion"], mix[3, 0]["motion"])


def test_the_average_of_the_weights_is_what_is_saved(recipe, tmp_path):
    """Frozen parts stay, the others move, and the saved model is the mean of the way."""
    changes = [f"out={tmp_path / 'run'}", "iterations=3", "checkpoint_every=3"]
    changes += ["optimizer.average=0.9", "optimizer.freeze=[backbone.body.features.0]"]
    changes += ["optimizer.decay=2", "optimizer.halve_every=0", "optimizer.learning_rate=0.01"]
    config = read_config(recipe, changes)
    first = make_model(config).state_dict()
    saved = load_model(train(config)).state_dict()
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    assert_same_but_for_rounding(saved, load_model(tmp_path / "run" / "last.ckpt").state_dict())
    frozen = [k for k in saved if k.startswith("backbone.body.features.0.")]
    assert frozen and all(torch.equal(saved[k], first[k]) for k in frozen)
    last = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    way = last["mask.weight"] - first["mask.weight"]
    assert 0 < float((saved["mask.weight"] - first["mask.weight"]).norm()) < float(way.norm())
    with pytest.raises(InputError, match="no part 'head'"):
        again = [*changes, f"out={tmp_path / 'b'}", "optimizer.freeze=[head]"]
        train(read_config(recipe, again))


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda f: f.stem)
def test_recipes_are_complete(file):
    config = read_config(file)
    assert config.out.startswith("runs/") and config.data.train and config.iterations > 0


def test_recipes_of_the_package_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mssa-tiny", "mssa-tiny.yaml", "recipes/mssa-tiny.yaml"):
        assert find_recipe(name) == RECIPES / "mssa-tiny.yaml"
    Path("mssa-tiny").write_text("out: here")  # a file of one's own comes first
    assert read_config("mssa-tiny").out == "here"
    for name in ("mssa", "elsewhere/mssa-tiny.yaml", "mssa-tiny.yml"):
        with pytest.raises(InputError, match=f"{name}: no such recipe; .*mssa-tiny"):
            find_recipe(name)


def test_baseline_recipes_differ_in_the_reductions_alone():
    for stage in ("pretrain", "finetune"):
        mssa = read_config(f"mssa-{stage}")
        baseline = read_config(f"baseline-{stage}")
        assert mssa.model.pop("reductions") == [1, 2]
        assert baseline.model.pop("reductions") == [1]
        baseline.out, baseline.initial = mssa.out, mssa.initial
        assert baseline == mssa


@pytest.mark.parametrize(
    "override, message",
    [
        ("batchsize=3", "batchsize"),
        ("batch_size=many", "batch_size"),
        ("optimizer.rate=3", "rate"),
        ("batch_size", "not key=value"),
        ("data.train=[{set: davis16}]", "set"),
        ("out=[", r"out=\["),
    ],
)
def test_overrides_that_cannot_be(recipe, override, message):
    with pytest.raises(InputError, match=message) as raised:
        read_config(recipe, [override])
    assert "\n" not in str(raised.value)


def test_recipes_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: no such recipe"):
        read_config(tmp_path / "none.yaml")
    file = tmp_path / "bad.yaml"
    for text in ("a: [", "- 1\n- 2\n", "colour: red\n"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"bad\.yaml"):
            read_config(file)
    file.write_text("iterations: 3\n")
    with pytest.raises(InputError, match="out"):
        read_config(file)


@pytest.mark.parametrize(
    "changes, message",
    [
        (["model.colour=3"], r"model\.colour is not an argument"),
        (["model.name=u2net"], "u2net"),
        (["data.train=[]"], r"data\.train is empty"),
        (["data.train=[{dataset: davis16}]"], r"data\.roots\.davis16=DIR"),
        (["data.sampling=sorted"], r"data\.sampling"),
        (["data.draw=lots"], r"data\.draw must be one of shares, frames, sequences"),
        (["initial=runs/mssa-pretrain/model"], "recipe mssa-pretrain makes it"),
        (["initial=elsewhere/model"], r"elsewhere/model: no such model .*train it first"),
        (["data.clip_length=3"], r"data\.clip_length is 3 and the model's 2"),
        (["loss.positive_weight=inverse"], r"loss\.positive_weight"),
        (["optimizer.learning_rate=1e30", "optimizer.clip_gradient=0"], "not finite"),
        (["precision=8-bit"], "precision"),
        (["accelerator=cuda"], "accelerator"),
    ],
)
def test_runs_that_cannot_be(recipe, tmp_path, changes, message):
    if changes == ["accelerator=cuda"] and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(InputError, match=message) as raised:
        train(read_config(recipe, [f"out={tmp_path}/run", *changes]))
    assert "\n" not in str(raised.value)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_bfloat16_on_a_gpu(recipe, tmp_path):
    changes = ["iterations=2", "accelerator=cuda", "precision=bf16-mixed"]
    train(read_config(recipe, [f"out={tmp_path}/run", *changes]))
    before = make_model(read_config(recipe, ["out=unused"])).state_dict()
    after = load_model(tmp_path / "run" / "model").state_dict()
    assert all(torch.isfinite(x).all() for x in after.values())
    assert any(not torch.equal(x, before[name]) for name, x in after.items())


def test_a_run_folder_is_not_overwritten(recipe, tmp_path):
    train(read_config(recipe, [f"out={tmp_path}/run", "iterations=2"]))
    before = (tmp_path / "run" / "last.ckpt").read_bytes()
    with pytest.raises(InputError, match="resume=True"):
        train(read_config(recipe, [f"out={tmp_path}/run", "iterations=2"]))
    with pytest.raises(InputError, match="another batch_size"):
        train(read_config(recipe, [f"out={tmp_path}/run", "batch_size=1"]), resume=True)
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before
    (tmp_path / "run" / "last.ckpt").write_bytes(before[:1000])
    with pytest.raises(InputError, match=r"last\.ckpt: not a checkpoint"):
        train(read_config(recipe, [f"out={tmp_path}/run"]), resume=True)


@pytest.mark.parametrize("stopped", [True, False])
def test_what_fails_while_a_run_is_being_stopped_is_no_fault(recipe, tmp_path, stopped):
    class Late(lightning.Callback):
        def on_train_batch_end(self, *rest):
            raise KeyboardInterrupt if stopped else OSError("the first one")

        def on_exception(self, *rest):
            raise RuntimeError("half-way")

    config = read_config(recipe, [f"out={tmp_path / 'run'}"])
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(Stopped if stopped else RuntimeError):
            train(config, callbacks=[Late()])
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on


def test_a_run_of_before_an_argument_was_renamed(recipe, tmp_path):
    """Its recipe trains, its checkpoint loads, and it is resumed by either name."""
    former = tmp_path / "former.yaml"
    former.write_text(RECIPE.replace("num_heads", "heads"))
    out = f"out={tmp_path}/run"
    train(read_config(former, [out, "iterations=2"]))
    last = tmp_path / "run" / "last.ckpt"
    assert "heads" in torch.load(last, weights_only=True)["config"]["model"]
    model = load_model(last)
    assert [blocks[0].attention.num_heads for blocks in model.transformers] == [2, 4]
    for file, iterations in ((recipe, 4), (former, 6)):
        train(read_config(file, [out, f"iterations={iterations}"]), resume=True)
        assert torch.load(last, weights_only=True)["global_step"] == iterations
    assert "num_heads" in json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    with pytest.raises(InputError, match="another model"):
        train(read_config(former, [out, "model.heads=[4, 4]"]), resume=True)
    with pytest.raises(InputError, match=r"recipe: model\.heads is the former name"):
        make_model(read_config(former, [out, "model.num_heads=[4, 4]"]))


def test_the_command_says_one_line(recipe, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--config", str(recipe), "out=/nowhere", "colour=red"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("vsod: ") and "colour" in error and error.count("\n") == 1
    assert CliRunner().invoke(app, ["train", "--help"]).exit_code == 0


def test_files_and_folders_are_whole_or_not_there(tmp_path):
    file, folder = tmp_path / "a.bin", tmp_path / "b"
    file.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), whole_file(file) as part:
        part.write_bytes(b"half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), whole_folder(folder) as part:
        (part / "x").write_bytes(b"half")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"] and file.read_bytes() == b"before"
    with whole_file(file) as part, whole_folder(folder) as other:
        part.write_bytes(b"after")
        (other / "x").write_bytes(b"after")
    assert file.read_bytes() == (folder / "x").read_bytes() == b"after"
    with pytest.raises(FileExistsError), whole_folder(folder):
        pass
    with pytest.raises(ZeroDivisionError), whole_folder(folder, replace=True):
        raise ZeroDivisionError
    assert (folder / "x").read_bytes() == b"after"
    with whole_folder(folder, replace=True) as part:
        (part / "y").write_bytes(b"new")
    assert [p.name for p in folder.iterdir()] == ["y"]
