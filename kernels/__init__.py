from .attg_loss import attg_loss, normalize_map

__all__ = ["attg_loss", "normalize_map"]
