"""
Fixtures of several test files; conftest.py loads them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import attg_mae
from attg import trainer
from tests.helpers import (
    ROOT,
    TINY,
    make_data,
    make_images,
    noise,
    save_encoder,
    stop_after,
    train,
    write,
)
from tests.processes import Process, ranks


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def few_drawings():
    """Runs draw no curves: that takes longer than they do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "plot_panels", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """Settings of a data set with labels and maps, see make_data."""
    return make_data(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="session")
def guided(labelled):
    """guided(guidance) -> settings like labelled; without maps for guidance none."""

    def guided(guidance):
        maps = None if guidance == "none" else labelled["maps"]
        return labelled | {"guidance": guidance, "maps": maps}

    return guided


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A flat folder of 13 images, without maps."""
    folder = tmp_path_factory.mktemp("plain") / "plain"
    make_images(folder, 13, size=(40, 40), suffix=".jpg")
    return str(folder)


@pytest.fixture(scope="session")
def whole(guided, tmp_path_factory):
    """whole(precision="fp32", ...) -> folder of an uninterrupted run of 24 steps."""
    runs = {}

    def whole(**settings):
        key = str(settings)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("whole")
            train(runs[key], **guided(settings.get("guidance", "attg")) | settings)
        return runs[key]

    return whole


@pytest.fixture
def passes(monkeypatch):
    """A list that receives imgs, noise, weight and mask of each training pass."""
    seen, forward = [], attg_mae.MAE.forward

    def spy(self, imgs, **options):
        results = forward(self, imgs, **options)
        if self.training and torch.is_grad_enabled():
            seen.append(SimpleNamespace(imgs=imgs, mask=results[2], **options))
        return results

    monkeypatch.setattr(attg_mae.MAE, "forward", spy)
    return seen


@pytest.fixture
def folder(tmp_path):
    """A folder with classes a, b, c: 4 training images, one of them nested, and 1 in val."""
    for c in "cab":
        for i, name in enumerate(("0.png", "1.png", "sub/2.png", "3.png")):
            write(tmp_path / "train" / c / name, noise(50, 40, i))
        write(tmp_path / "val" / c / "0.png", noise(50, 40, 9))
    return tmp_path


@pytest.fixture
def encoder(tmp_path):
    """A small untrained encoder.pt, alone in its folder."""
    path = tmp_path / "run" / "encoder.pt"
    save_encoder(path)
    return str(path)


@pytest.fixture
def wrong(encoder, plain, monkeypatch):
    """The working directory holds encoder.pt, files that are no encoder, a flat folder."""
    monkeypatch.chdir(Path(encoder).parent)
    Path("text.pt").write_text("no weights")
    torch.save({"decoder_embed.weight": torch.zeros(2, 2)}, "decoder.pt")
    shutil.copytree(plain, "flat")


@pytest.fixture(scope="session")
def ask():
    """ask(request) sends a request to the server of processes, see processes.serve."""
    # PYTHONPATH: the forked processes run in other folders.
    paths = {"MASTER_ADDR": "localhost", "PYTHONPATH": str(ROOT)}
    options = {"text": True, "env": os.environ | paths, "stdin": subprocess.PIPE}
    argv = [sys.executable, "-m", "tests.processes"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, **options) as server:

        def ask(request):
            print(json.dumps(request), file=server.stdin, flush=True)
            return int(server.stdout.readline())

        server.stdout.readline()
        yield ask
        server.stdin.close()


@pytest.fixture(scope="session")
def long(labelled):
    """Settings of a run of 60 steps that writes 5 MB every 6."""
    return TINY | labelled | {"width": 192, "epochs": 10}


@pytest.fixture(scope="session")
def finished(ask, long, tmp_path_factory):
    """`long`, uninterrupted."""
    run = Process(ask, tmp_path_factory.mktemp("long") / "out", long)
    assert run.wait()[0] == 0
    return run.out


@pytest.fixture(scope="session")
def trained(labelled, tmp_path_factory):
    """A run of 12 steps, stopped after the 6th, at the end of the first epoch."""
    out = tmp_path_factory.mktemp("trained") / "out"
    with stop_after(6):
        assert train(out, **labelled, epochs=2)["step"] == 6
    return out


@pytest.fixture
def copy(trained, labelled, tmp_path):
    """A copy of `trained`, and settings that resume it."""
    out = shutil.copytree(trained, tmp_path / "out")
    return out, labelled | {"out": str(out), "epochs": 2}


@pytest.fixture(scope="session")
def distributed(ask, labelled, tmp_path_factory):
    """The folder of an uninterrupted run on 2 processes, with accumulation."""
    out = tmp_path_factory.mktemp("ranks") / "out"
    runs = ranks(ask, out, TINY | labelled | {"eval_every": 2, "accum": 2})
    assert [run.wait()[0] for run in runs] == [0, 0]
    return runs[0].out
