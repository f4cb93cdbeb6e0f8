"""
What `pip install .` installs, and which kernels are imported.
"""

import json
import os
import shutil
import subprocess
import tomllib
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from attg import log
from tests.helpers import ROOT, python

PROGRAMS = {"attg_mae", "object_discovery"} | {p.stem for p in ROOT.glob("eval_*.py")}
# Imports every module that is installed, then uses the loss; prints where they lie.
IMPORTS = f"""
import importlib, json, pkgutil
import attg, kernels
names = {sorted(PROGRAMS)}
names += [f"attg.{{m.name}}" for m in pkgutil.iter_modules(attg.__path__)]
files = {{name: importlib.import_module(name).__file__ for name in names}}
from attg.kernels import attg_loss, normalize_map
import attg_mae, torch
loss = attg_loss(torch.zeros(1, 4, 12), torch.rand(1, 3, 4, 4), patch_size=2)
assert abs(loss.item() - 11 / 12) < 1e-3
assert attg_mae.attg_loss is attg_loss, attg_mae.attg_loss
files["the loss"] = attg_loss.__code__.co_filename
print(json.dumps(files | {{"kernels": kernels.__file__}}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that `pip install .` has filled."""
    folder = tmp_path_factory.mktemp("install")
    source, site = folder / "source", folder / "site"
    # pip builds inside the source folder.
    skipped = shutil.ignore_patterns(".*", "build", "out", "results", "*cache*")
    shutil.copytree(ROOT, source, ignore=skipped)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = python("-m", "pip", "install", *options, "--target", site, source)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    return site


def test_revision_is_not_that_of_a_repository_around_the_package(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@here"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "mine"]):
        if not shutil.which("git") or subprocess.run(git + command).returncode:
            pytest.skip("git does not work here")
    monkeypatch.setattr(log, "__file__", str(tmp_path / "attg" / "log.py"))
    assert log.revision() != "unknown"
    monkeypatch.setattr(log, "__file__", str(tmp_path / "site" / "attg" / "log.py"))
    assert log.revision() == "unknown"


def test_installed_files_and_metadata(site):
    top = {path.stem for path in site.iterdir() if path.suffix == ".py"}
    folders = {path.name for path in site.iterdir() if path.is_dir()} - {"__pycache__"}
    (info,) = (name for name in folders if name.endswith(".dist-info"))
    assert top == PROGRAMS and folders == {"attg", "bin", info}
    for folder, target in ((ROOT / "attg", "attg"), (ROOT / "kernels", "attg/kernels")):
        for path in folder.glob("*.py"):
            assert (site / target / path.name).read_bytes() == path.read_bytes()

    distribution = Distribution.at(site / info)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert distribution.version == project["version"]
    assert distribution.metadata["License-Expression"] == "MIT"
    extras = project["optional-dependencies"]
    required = [x for x in distribution.requires if "extra ==" not in x]
    tests = extras.pop("test")
    for name, found in {"": required, "-test": tests}.items():
        lines = (ROOT / f"requirements{name}.txt").read_text().splitlines()
        wanted = {line.replace(" ", "") for line in lines if not line.startswith("#")}
        assert {line.replace(" ", "") for line in found} == wanted
    names = [x.partition(">")[0] for x in tests]
    assert all(x.partition(">")[0] in names for part in extras.values() for x in part)


def test_console_commands_in_an_empty_folder(site, tmp_path):
    (info,) = site.glob("*.dist-info")
    commands = [entry.load() for entry in Distribution.at(info).entry_points]
    assert {command.args[0] for command in commands} == PROGRAMS
    env = os.environ | {"PYTHONPATH": str(site)}
    for command, flag, end in (
        ("attg-mae", "--demo", "step 2: loss"),
        ("attg-knn", "x.pt", "attg-knn: error: "),
    ):
        done = python(site / "bin" / command, flag, cwd=tmp_path, env=env)
        assert end in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("where", ["installed", "checkout"])
def test_modules_beside_another_package_kernels(where, site, tmp_path):
    """Hugging Face has a package `kernels`. A checkout hides an installed attg."""
    package = tmp_path / "third_party" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def get_kernel(): ...\n")
    paths = [package.parent] + [ROOT] * (where == "checkout") + [site]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = python("-c", IMPORTS, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    files = {name: Path(file) for name, file in json.loads(done.stdout).items()}
    assert files.pop("kernels").is_relative_to(package)
    assert all(file.is_relative_to(paths[1]) for file in files.values())
