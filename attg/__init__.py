"""What the programs share. Nothing here imports a program."""

__all__ = ["bookkeeping", "data", "features", "files", "maps", "pictures", "run", "toy"]
__all__ += ["commandline", "evaluation", "export", "supervised", "weights"]
