"""
Packages that tests need, and the one that this repository's folder kernels/ hides.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

import tests.helpers as helpers


def test_what_is_missing_is_named(monkeypatch):
    for name in ("transformers", "timm.models.vision_transformer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(pytest.skip.Exception, match="'transformers'"):
        helpers.hf_model("ViTModel")
    with pytest.raises(pytest.skip.Exception, match="'timm.models"):
        helpers.timm_model()


def test_transformers_and_the_package_kernels(monkeypatch):
    """transformers imports `kernels` where a package of that name is installed."""
    found = importlib.util.find_spec("kernels")
    assert Path(found.origin) == helpers.ROOT / "kernels" / "__init__.py"
    monkeypatch.setattr(helpers, "version", lambda name: {"kernels": "0.18.2"}[name])
    words = "the package kernels 0.18.2 is installed.* finds this repository's folder"
    with pytest.raises(pytest.skip.Exception, match=words):
        helpers.hf_model("ViTModel")
