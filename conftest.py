"""
Settings of the whole test suite: threads, Triton's interpreter, hypothesis.

Runs are compared bit for bit, so the number of threads is set here, for this process and
its children, and nowhere else.
"""

import os
import random
import signal

os.environ["OMP_NUM_THREADS"] = "1"
# A shell makes its background jobs ignore Ctrl-C, and the programs under test inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)
# Without a GPU the kernel runs in Triton's interpreter, which must be chosen before Triton
# is imported; torchvision imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Failed asserts in these files are explained as in tests.
pytest.register_assert_rewrite("tests.helpers", "tests.processes")
pytest_plugins = ["tests.fixtures"]


def pytest_addoption(parser):
    help = "try N random examples of each property, not the same 50 as always"
    parser.addoption("--fuzz", type=int, metavar="N", help=help)


def pytest_configure(config):
    """Load the hypothesis profile, and choose the seed that the summary prints."""
    number = config.getoption("--fuzz")
    # Fixtures are shared by all examples; some examples read and write files.
    options = {"deadline": None, "database": None}
    options["suppress_health_check"] = list(HealthCheck)
    settings.register_profile("same", max_examples=50, derandomize=True, **options)
    settings.register_profile("fuzz", max_examples=number or 1, **options)
    settings.load_profile("fuzz" if number else "same")
    if number and config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(random.randrange(2**32))


def pytest_terminal_summary(terminalreporter, config):
    number, seed = config.getoption("--fuzz"), config.option.hypothesis_seed
    if number:
        terminalreporter.write_line(f"--fuzz {number} --hypothesis-seed {seed}")
