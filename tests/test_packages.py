"""
What `pip install .` installs, which kernels are imported, and packages that tests need.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution
from pathlib import Path

import pytest

import tests.helpers as helpers
from tests.helpers import ROOT

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
print(json.dumps(files | {{"kernels": kernels.__file__}}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that `pip install .` has filled."""
    folder = tmp_path_factory.mktemp("install")
    source, site = folder / "source", folder / "site"
    # pip builds inside the source folder.
    skipped = shutil.ignore_patterns(
        ".*", "build", "out", "results", "assets", "*cache*"
    )
    shutil.copytree(ROOT, source, ignore=skipped)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", site]
    done = subprocess.run([*command, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    return site


@pytest.fixture
def third_party(tmp_path):
    """A folder with a package of the name `kernels`, as Hugging Face has one."""
    package = tmp_path / "third_party" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def get_kernel(): ...\n")
    return package.parent


def run_imports(paths, cwd):
    """{module: its file}, imported in a folder of nothing with a PYTHONPATH."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    options = {"cwd": cwd, "env": env, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", IMPORTS], **options)
    assert done.returncode == 0, done.stderr
    return {name: Path(file) for name, file in json.loads(done.stdout).items()}


def test_installed_files_and_metadata(site):
    top = {path.stem for path in site.iterdir() if path.suffix == ".py"}
    folders = {path.name for path in site.iterdir() if path.is_dir()} - {"__pycache__"}
    (info,) = (name for name in folders if name.endswith(".dist-info"))
    assert top == PROGRAMS and folders == {"attg", info}
    for folder, target in ((ROOT / "attg", "attg"), (ROOT / "kernels", "attg/kernels")):
        for path in folder.glob("*.py"):
            assert (site / target / path.name).read_bytes() == path.read_bytes()

    distribution = Distribution.at(site / info)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert distribution.version == project["version"]
    assert distribution.metadata["License-Expression"] == "MIT"
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if not line.startswith("#")]
    assert [x.replace(" ", "") for x in distribution.requires] == [
        line.replace(" ", "") for line in wanted
    ]


def test_installed_modules_beside_another_package_kernels(site, third_party, tmp_path):
    files = run_imports([third_party, site], tmp_path)
    assert files.pop("kernels").is_relative_to(third_party)
    assert all(file.is_relative_to(site) for file in files.values())
    assert files["attg.kernels"] == site / "attg" / "kernels" / "__init__.py"


def test_checkout_beside_another_package_kernels(site, third_party, tmp_path):
    """The checkout's own folders are taken, even where the package is installed too."""
    files = run_imports([third_party, ROOT, site], tmp_path)
    assert files.pop("kernels").is_relative_to(third_party)
    assert all(file.is_relative_to(ROOT) for file in files.values())
    code = "from attg.kernels import attg_loss; print(attg_loss.__code__.co_filename)"
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "attg_loss.py", done.stderr


def test_missing_packages_are_named(monkeypatch):
    for name in ("transformers", "timm.models.vision_transformer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(pytest.skip.Exception, match="'transformers'"):
        helpers.hf_model("ViTModel")
    with pytest.raises(pytest.skip.Exception, match="'timm.models"):
        helpers.timm_model()


def test_transformers_are_skipped_beside_the_package_kernels(monkeypatch):
    """In a checkout, transformers would import the folder kernels/ instead."""
    monkeypatch.setattr(helpers, "version", lambda name: {"kernels": "0.18.2"}[name])
    with pytest.raises(pytest.skip.Exception, match="package kernels 0.18.2"):
        helpers.hf_model("ViTModel")
