"""The start of `vsod predict`: what it does not import."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("av")
cv2 = pytest.importorskip("cv2")

from vsod_models.cli import main  # noqa: E402
from vsod_models.cli.start import shared_threads  # noqa: E402

CODE = """
import sys
from vsod_models import prediction, zoo
for name in ("mssa-tiny", "vsod-mobile"):
    zoo.load_model(name)
assert "torch._dynamo" not in sys.modules and "lightning" not in sys.modules
import torch, torchvision
boxes = torch.tensor([[0.0, 0, 0, 4, 4]])
assert torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), boxes, 2).shape == (1, 1, 2, 2)
import torch._dynamo.utils
assert torch._dynamo.utils.is_compile_supported is not None
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
"""


def test_the_compiler_is_not_imported_and_works_afterwards():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LOADED = """
import sys
from vsod_models.cli import start
thread = start.load_torch()
thread.join()
with open("/proc/self/maps") as maps:
    assert "libtorch_cpu.so" in maps.read()
assert "torch" not in sys.modules
import torch
assert torch.ones(2).sum() == 2
from vsod_models.cli import main  # noqa: E402
try:
    main(["predict", "none.mp4", "-o", "masks.mp4"])
except SystemExit as done:
    assert done.code == 2
assert "vsod_models.prediction" not in sys.modules, "imported before the input is looked at"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="loads it on Linux alone")
def test_torch_finds_its_library_loaded_and_bad_input_is_told_before_it():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_memory_is_kept_in_a_process_of_the_command_alone(monkeypatch):
    """Who calls `main` from Python keeps the C library's settings."""
    kept = []
    monkeypatch.setattr("vsod_models.cli.start.keep_memory", lambda: kept.append(1))
    monkeypatch.setattr("vsod_models.cli.start.load_torch", lambda: None)
    monkeypatch.setattr("vsod_models.cli.start.leave_at_once", lambda: lambda: None)
    arguments = ["predict", "none.mp4", "-o", "masks.mp4"]
    monkeypatch.setattr(sys, "argv", ["vsod", *arguments])
    for given, times in ((arguments, 0), (None, 1)):
        with pytest.raises(SystemExit) as done:
            main(given)
        assert done.value.code == 2
        assert len(kept) == times


def test_threads_are_shared_for_as_long_as_two_want_them():
    before = cv2.getNumThreads()
    torch.set_num_threads(4)
    cv2.setNumThreads(4)
    for shared, threads in ((True, 2), (False, 4)):
        with shared_threads(shared):
            assert torch.get_num_threads() == cv2.getNumThreads() == threads
        assert torch.get_num_threads() == cv2.getNumThreads() == 4
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with shared_threads(True):
        assert torch.get_num_threads() == cv2.getNumThreads() == 1
    cv2.setNumThreads(before)


LEFT = """
import atexit, sys
from vsod_models.cli import start
class Kept:
    def __del__(self):
        print("freed")
kept = Kept()
kept.itself = kept
done = start.leave_at_once()
atexit.register(print, "exit handler")
print("made")
if sys.argv[1] == "done":
    done()
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize("arguments, freed", [(("done", "0"), []), (("not", "3"), ["freed"])])
def test_a_command_that_is_done_leaves_without_freeing_its_objects(arguments, freed):
    call = [sys.executable, "-c", LEFT, *arguments]
    ended = subprocess.run(call, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (int(arguments[1]), "")
    assert ended.stdout.split("\n")[:-1] == ["made", "exit handler", *freed]
