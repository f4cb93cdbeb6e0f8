from .attg_loss import attg_loss, crop_map, normalize_map

__all__ = ["attg_loss", "crop_map", "normalize_map"]
