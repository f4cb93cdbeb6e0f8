"""
Console commands of an installed copy, such as attg-mae for `python attg_mae.py`.
"""

import runpy
from functools import partial


def run(program):
    """Run the module of a program as a script does."""
    runpy.run_module(program, run_name="__main__")


mae = partial(run, "attg_mae")
maps = partial(run, "object_discovery")
knn = partial(run, "eval_knn")
linear = partial(run, "eval_linear")
finetune = partial(run, "eval_finetune")
retrieval = partial(run, "eval_retrieval")
