"""Figures of the documentation, and the commands that draw them."""

__all__ = ["drawing", "idea", "walkthrough"]
