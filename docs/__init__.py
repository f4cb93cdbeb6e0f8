"""Figures of the documentation, and the commands that draw them."""
