from .attg_loss import attg_loss, normalize_map, pool_maps

__all__ = ["attg_loss", "normalize_map", "pool_maps"]
