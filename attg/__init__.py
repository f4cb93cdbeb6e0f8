"""Code that the programs share. Nothing here imports a program."""
