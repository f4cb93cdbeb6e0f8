"""
What every test needs before it is collected, and how the whole suite is run.

Runs are compared bit for bit, so the number of threads is set here, for this process and
those it starts, and nowhere else.
"""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"
# A shell makes what it starts in the background ignore Ctrl-C, programs of the tests too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)
# Without a GPU the kernel runs in Triton's interpreter, which has to be chosen before
# anything imports Triton; torchvision does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# So that their asserts explain themselves as those of the tests do.
pytest.register_assert_rewrite("tests.helpers", "tests.processes")
pytest_plugins = ["tests.fixtures"]


def pytest_addoption(parser):
    words = "damaged and odd inputs of each kind that are tried"
    parser.addoption("--fuzz", type=int, default=200, metavar="N", help=words)


def pytest_configure(config):
    """Properties: the same 50 examples in each run, or with --fuzz N random ones."""
    options = {"deadline": None, "database": None}
    options["suppress_health_check"] = list(HealthCheck)
    settings.register_profile("same", max_examples=50, derandomize=True, **options)
    number = config.getoption("--fuzz")
    settings.register_profile("random", max_examples=number, **options)
    given = any(arg.startswith("--fuzz") for arg in config.invocation_params.args)
    settings.load_profile("random" if given else "same")


@pytest.fixture(scope="session")
def fuzz(request):
    """How many inputs of tests/fuzz.py to try of each kind: seeds 0 to fuzz - 1."""
    return request.config.getoption("--fuzz")
