"""What the programs share: data, maps, features, weights, runs, files. Nothing here imports a program."""
