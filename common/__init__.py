"""What the programs share. Nothing here imports a program."""
<<<<<<< HEAD

__all__ = ["bookkeeping", "data", "features", "files", "maps", "pictures", "run", "toy"]
__all__ += ["supervised", "weights"]
=======
>>>>>>> dcb8d3b (Tests: no line above 100 columns)
