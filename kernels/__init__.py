from .attg_loss import attg_loss, is_flat, normalize_map

__all__ = ["attg_loss", "is_flat", "normalize_map"]
