import signal

import pytest
import torch

# A shell starts what it runs in the background with Ctrl-C ignored, other programs with it blocked,
# and so would this process what it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "pthread_sigmask"):  # not on Windows
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def pytest_addoption(parser):
    parser.addoption(
        "--sweep",
        type=int,
        default=12,
        help="random cases an op and backend (thousands for a soak)",
    )


def pytest_generate_tests(metafunc):
    if "sweep_index" in metafunc.fixturenames:
        metafunc.parametrize("sweep_index", range(metafunc.config.getoption("--sweep")))


@pytest.fixture(autouse=True)
def _torch_state():
    """Each test starts from the same seed and leaves torch's global switches as they were, and
    Ctrl-C, which what later tests start would inherit."""
    torch.manual_seed(0)
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    yield
    if handler is not None:
        signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # tests in other processes share the GPU
