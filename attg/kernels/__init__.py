"""The loss kernels of a checkout, whose folder is kernels/ beside this package.

An installed copy has the files of that folder here instead (see pyproject.toml). Every
module imports `attg.kernels`: the top-level name `kernels` belongs to a package of
Hugging Face.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]

from .attg_loss import attg_loss, normalize_map, pool_maps  # noqa: E402

__all__ = ["attg_loss", "normalize_map", "pool_maps"]
