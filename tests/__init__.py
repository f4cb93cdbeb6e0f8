"""Tests, one file for each room of the project; the claims are in test_attg.py."""

__all__ = ["aot", "fixtures", "helpers", "processes"]
