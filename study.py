"""
The paper's ablations in small: arms x seeds on one data set, each compared with the
vanilla MAE of the same seed (Sick et al., arXiv 2402.15172, Tables 9 to 11).

    python study.py --name toy --arms none masks masks+inverted gaussian self --seeds 0 1 2
    python study.py --name photos --data DIR --maps cut=cut.npy cam=cam.npy \\
        --arms none cut cam cut+tau0.7+constant --seeds 0 1 2 3 4 --jobs 2 \\
        -- --img_size 64 --patch_size 8 --epochs 30 --eval_every 5
    python study.py --table results/study/photos       # the table of what is there

What follows -- are flags of attg_mae.py, for all runs. An arm is where the maps are from,
and what is changed, joined by +:

    none        vanilla MAE              masks       the maps that the data set brings
    NAME        the file of --maps       self        TokenCut of the vanilla run's encoder
    gaussian    a centred Gaussian, the same for each picture: a control
    +inverted +foreground +background +input_masking     uses of the map (Table 10)
    +tau0.7 +constant                                    temperature and schedule (Table 11)

Runs of the same seed begin with the same weights and see the same pictures, crops and
masks in the same order, so their differences are paired. After each run come k-NN
(k = 5, 20), k-NN with few labels and the linear probe (--evaluate). All files of the
runs lie in --out; logs and figures are copied to --results, and the table is written
there, as soon as a run ends; the curves at the end. The same command goes on where a
study was interrupted.
"""

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

import argparse
import concurrent.futures
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from attg.cli import Parser, check_numbers, end, make_folder, say
from attg.datasets import open_data
from attg.evaluation import without_nan
from attg.features import FEATURES
from attg.files import replacing, require
from attg.log import revision
from attg.maps import save_maps

PROGRAMS = Path(__file__).resolve().parent

# -- Arms ------------------------------------------------------------------------------

USES = ("inverted", "foreground", "background", "input_masking")
# Sources of maps that have no file of --maps.
OWN_SOURCES = ("none", "masks", "self", "gaussian")


class Arm(NamedTuple):
    name: str
    # "none", "masks", "self", "gaussian", or a name of --maps
    source: str
    # Flags of attg_mae.py, but for --maps
    flags: list


def parse_arm(name):
    """The Arm of its name; ValueError names what is not understood."""
    source, *changes = name.split("+")
    flags = []
    if source == "none":
        flags += ["--guidance", "none"]
    for change in changes:
        temperature = re.fullmatch(r"tau(\d*\.?\d+)", change)
        if change in USES:
            flags += ["--guidance", change]
        elif change == "constant":
            flags += ["--tau_schedule", "constant"]
        elif temperature:
            flags += ["--tau", temperature[1]]
        else:
            known = ", ".join((*USES, "constant", "tau0.7"))
            raise ValueError(f"--arms {name}: +{change} is none of {known}")
    require(
        source != "none" or not changes,
        f"--arms {name}: a vanilla MAE has no map to change the use of",
    )
    return Arm(name, source, flags)


def gaussian_maps(path, data):
    """Writes a map file of one centred Gaussian, a quarter of the sides wide."""
    dataset = open_data(data, "train")
    axis = (np.arange(14) + 0.5) / 14 - 0.5
    bell = np.exp(-(axis**2) / (2 * 0.25**2))
    maps = np.broadcast_to(np.outer(bell, bell), (len(dataset), 14, 14))
    save_maps(path, maps, dataset, method="gaussian", sigma=0.25)


# -- Programs --------------------------------------------------------------------------


class Programs:
    """Starts programs and waits for them, from several threads; stop() ends them all."""

    def __init__(self, threads):
        self.environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        self.running = set()
        self.stopped = False
        self.lock = threading.Lock()

    def run(self, log, program, *flags):
        """Runs `python program flags`; its output is added to the file log.

        RuntimeError with the command and the last words, if it fails.
        """
        words = [str(flag) for flag in flags]
        command = f"python {program} {shlex.join(words)}"
        with open(log, "a") as file:
            file.write(f"$ {command}    # {revision()}\n")
            file.flush()
            begin = file.tell()
            with self.lock:
                if self.stopped:
                    raise InterruptedError(command)
                process = subprocess.Popen(
                    [sys.executable, PROGRAMS / program, *words],
                    env=self.environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
                self.running.add(process)
            code = process.wait()
            with self.lock:
                self.running.discard(process)
        if self.stopped:
            raise InterruptedError(command)
        if code != 0:
            raise RuntimeError(
                f"{command}: exit code {code}, {last_words(log, begin)} (all in {log})"
            )

    def stop(self):
        """Ends what runs, as Ctrl-C would: trainings save first. Nothing starts anew."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()


def last_words(log, begin):
    """The error in a log from byte `begin` on, or its last line."""
    text = Path(log).read_bytes()[begin:].decode(errors="replace")
    lines = text.strip().splitlines() or ["without a word"]
    # For a wrong flag lines of advice follow.
    errors = [line for line in lines if "error: " in line]
    return (errors or lines)[-1]


# -- Runs ------------------------------------------------------------------------------

EVALUATIONS = ("knn", "shots", "linear", "transfer")
# What is copied to --results of each run.
KEPT = ["config.json", "log.jsonl", "log.txt", "eval.txt"]
KEPT += [f"{name}.jsonl" for name in EVALUATIONS]


class Study:
    """The runs of a command line, args, and their folders."""

    def __init__(self, args):
        self.args = args
        self.arms = [parse_arm(name) for name in args.arms]
        self.files = dict(args.maps)
        self.programs = Programs(args.threads)
        # Of the table, which all runs write.
        self.lock = threading.Lock()

    def folder(self, arm, seed):
        return self.args.out / f"{arm}-seed{seed}"

    def once(self, folder, name, program, *flags):
        """Runs a program in a run's folder, unless it has come to its end there."""
        mark = folder / f"{name}.done"
        if mark.exists():
            return
        log = "log.txt" if name in ("maps", "train") else "eval.txt"
        self.programs.run(folder / log, program, *flags)
        mark.touch()

    def maps_of(self, arm, seed, folder):
        """The map file of a run, made if need be; None for the data set's own."""
        if arm.source == "gaussian":
            return self.args.out / "gaussian.npy"
        if arm.source != "self":
            return self.files.get(arm.source)
        maps = folder / "maps.npy"
        encoder = self.folder("none", seed) / "encoder.pt"
        flags = ["--backbone", encoder, "--data", self.args.data, "--out", maps]
        self.once(folder, "maps", "object_discovery.py", *flags, *self.args.self_flags)
        return maps

    def run(self, arm, seed):
        """One run: maps, training, evaluations, copies of what they wrote."""
        args, folder = self.args, self.folder(arm.name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        data = ["--data", args.data]
        train = [*data, *args.train, "--seed", seed, "--out", folder, *arm.flags]
        maps = self.maps_of(arm, seed, folder)
        if maps:
            train += ["--maps", maps]
        self.once(folder, "train", "attg_mae.py", *train)

        for name, (program, flags) in self.evaluations(folder).items():
            if name in args.evaluate:
                flags = [*flags, "--out", folder / f"{name}.jsonl"]
                self.once(folder, name, program, *flags)
        self.publish(arm, seed)

    def evaluations(self, folder):
        """{name: (program, flags)} of what can be measured of a run."""
        args = self.args
        features = folder / "features.pt"
        of_encoder = [folder / "encoder.pt", "--k", 5, 20, "--data"]
        of_features = ["--features", features]
        found = {}
        flags = [*of_encoder, args.data, "--save_features", features]
        found["knn"] = ("eval_knn.py", flags)
        found["shots"] = ("eval_knn.py", [*of_features, "--shots", *args.shots])
        found["linear"] = ("eval_linear.py", of_features)
        if args.transfer:
            found["transfer"] = ("eval_knn.py", [*of_encoder, args.transfer])
        return found

    def publish(self, arm, seed):
        """Copies logs and figures of a run to --results, and writes the table anew."""
        folder = self.folder(arm.name, seed)
        copy = self.args.results / folder.name
        with self.lock:
            copy.mkdir(parents=True, exist_ok=True)
            for name in KEPT:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, copy / name)
            write_table(self.args.results)
        say(f"{folder.name}: done, see {copy}")

    def run_all(self):
        """All runs, args.jobs at a time. Returns the words of those that failed."""
        args = self.args
        make_folder("out", args.out)
        make_folder("results", args.results)
        if any(arm.source == "gaussian" for arm in self.arms):
            path = args.out / "gaussian.npy"
            if not path.with_suffix(".json").is_file():
                gaussian_maps(path, args.data)
        # Pairs come first: all arms of a seed before the next seed. Maps of `self` need
        # the vanilla run, so they wait for all the others.
        first = [arm for arm in self.arms if arm.source != "self"]
        later = [arm for arm in self.arms if arm.source == "self"]
        failed = []
        for arms in (first, later):
            failed += self.run_some([(a, s) for s in args.seeds for a in arms])
        return failed

    def run_some(self, runs):
        """Runs the (arm, seed) given; returns the words of those that failed."""
        failed = []
        pool = concurrent.futures.ThreadPoolExecutor(self.args.jobs)
        with pool:
            futures = [pool.submit(self.run, *run) for run in runs]
            try:
                for future in concurrent.futures.as_completed(futures):
                    error = future.exception()
                    if error is not None:
                        say(f"failed: {error}")
                        failed.append(str(error))
            except BaseException:
                self.programs.stop()
                raise
        return failed


# -- Figures of the runs ---------------------------------------------------------------


def read_lines(path):
    """The JSON lines of a file, empty if it is not there."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def figures_of_run(folder):
    """{(measure, feature): top-1 in percent} of a run's evaluations."""
    figures = {}
    for file, words in (("knn", "k-NN"), ("shots", "k-NN"), ("transfer", "transfer")):
        for row in last_results(folder / f"{file}.jsonl"):
            measure = f"{words}, k = {row['k']}"
            if file == "shots":
                measure = f"k-NN, {row['protocol']}"
            figures[measure, row["feature"]] = row["top-1"]
    for row in last_results(folder / "linear.jsonl"):
        figures["linear probe", row["feature"]] = row["top-1"]
    return figures


def last_results(path):
    """The rows of the last line that an evaluation has added to a file."""
    lines = read_lines(path)
    return lines[-1]["results"] if lines else []


def read_study(results):
    """{arm: {seed: figures_of_run}} of the folders ARM-seedN in `results`."""
    runs = {}
    for folder in sorted(results.glob("*-seed*")):
        arm, _, seed = folder.name.rpartition("-seed")
        figures = figures_of_run(folder)
        if figures and seed.isdigit():
            runs.setdefault(arm, {})[int(seed)] = figures
    return runs


# Quantiles of Student's t at 97.5 %, for 1, 2, ... degrees of freedom.
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
T_975 += (2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009)
T_975 += (2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518)
T_975 += (2.0484, 2.0452, 2.0423)


def mean_and_deviation(values):
    """(mean, sample deviation) of a list; the deviation of one value is NaN."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), deviation


def interval(values):
    """(mean, low, high): the 95 % interval of the mean, by Student's t.

    NaN for one value. Above 31 values it is a little too wide.
    """
    mean, deviation = mean_and_deviation(values)
    freedom = min(len(values) - 1, len(T_975))
    half = T_975[freedom - 1] * deviation / math.sqrt(len(values))
    return mean, mean - half, mean + half


def table_rows(runs):
    """A dict for each arm, measure and feature of read_study's `runs`.

    mean and sd over the n seeds; difference, low and high: the paired difference to the
    vanilla runs (arm none) of the same seeds, and its 95 % interval, over `pairs` seeds.
    """
    vanilla = runs.get("none", {})
    measures = []
    for seeds in runs.values():
        for figures in seeds.values():
            measures += [key for key in figures if key not in measures]
    rows = []
    # Vanilla first.
    for arm in sorted(runs, key=lambda arm: (arm != "none", arm)):
        for key in measures:
            values = {s: f[key] for s, f in sorted(runs[arm].items()) if key in f}
            if not values:
                continue
            mean, deviation = mean_and_deviation(list(values.values()))
            row = {"arm": arm, "measure": key[0], "feature": key[1]}
            row |= {"n": len(values), "mean": mean, "sd": deviation, "values": values}
            differences = []
            for seed, value in values.items():
                if arm != "none" and key in vanilla.get(seed, {}):
                    differences.append(value - vanilla[seed][key])
            if differences:
                difference, low, high = interval(differences)
                row |= {"pairs": len(differences), "difference": difference}
                row |= {"low": low, "high": high}
            rows.append(row)
    return rows


def markdown(rows):
    """The rows as two Markdown tables: means, and paired differences to vanilla."""
    columns = []
    for row in rows:
        column = (row["measure"], row["feature"])
        if column not in columns:
            columns.append(column)
    means, differences = {}, {}
    for row in rows:
        column = (row["measure"], row["feature"])
        cell = f"{row['mean']:.2f}"
        if row["n"] > 1:
            cell += f" ± {row['sd']:.2f}"
        means.setdefault((row["arm"], row["n"]), {})[column] = cell
        if "difference" in row:
            cell = f"{row['difference']:+.2f}"
            if row["pairs"] > 1:
                cell += f" [{row['low']:+.2f}, {row['high']:+.2f}]"
            differences.setdefault((row["arm"], row["pairs"]), {})[column] = cell
    text = "Top-1 in percent, mean ± standard deviation over n seeds.\n\n"
    text += grid_of_cells(columns, means)
    text += (
        "\nPaired differences to the vanilla runs of the same n seeds, with the 95 % "
    )
    text += "interval of their mean.\n\n"
    return text + grid_of_cells(columns, differences)


def grid_of_cells(columns, cells):
    """A Markdown table: {(arm, n): {column: text}}."""
    titles = [f"{measure}, {in_words(feature)}" for measure, feature in columns]
    lines = [["arm", "n", *titles], ["---"] * (2 + len(columns))]
    for (arm, number), row in cells.items():
        lines.append([arm, str(number), *(row.get(c, "") for c in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def in_words(feature):
    """class_token -> class token"""
    return feature.replace("_", " ")


def write_table(results):
    """table.md and table.jsonl of the runs in the folder `results`."""
    rows = table_rows(read_study(results))
    with replacing(results / "table.md") as temporary:
        temporary.write_text(markdown(rows))
    with replacing(results / "table.jsonl") as temporary:
        lines = [json.dumps(without_nan(row)) for row in rows]
        temporary.write_text("\n".join(lines) + "\n")


def draw_curves(results):
    """curves.png: k-NN accuracy over the epochs, a line for each arm, pale ones of seeds.

    Without matplotlib a line that says so, and nothing without k-NN in the logs.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no curves.png: matplotlib is not installed")
        return
    curves = {}
    for folder in sorted(results.glob("*-seed*")):
        arm = folder.name.rpartition("-seed")[0]
        config = folder / "config.json"
        points = [x for x in read_lines(folder / "log.jsonl") if "knn" in x]
        if points and config.is_file():
            epochs = json.loads(config.read_text())["epochs"]
            curves.setdefault(arm, []).append((epochs / points[-1]["step"], points))
    if not curves:
        return
    figure = Figure((10, 4), layout="constrained")
    for axes, feature in zip(figure.subplots(1, 2), FEATURES, strict=True):
        for number, (arm, runs) in enumerate(curves.items()):
            draw_arm(axes, arm, runs, feature, f"C{number}")
        axes.set(
            title=in_words(feature), xlabel="epoch", ylabel="k-NN, k = 20, top-1 %"
        )
    # Beside the curves, which it would hide.
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    with replacing(results / "curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def draw_arm(axes, arm, runs, feature, colour):
    """The runs of an arm, [(epochs a step, points)], pale, and their mean."""
    values = {}
    for scale, points in runs:
        epochs = [scale * point["step"] for point in points]
        accuracy = [point["knn"][feature] for point in points]
        axes.plot(epochs, accuracy, color=colour, alpha=0.25, linewidth=1)
        for epoch, value in zip(epochs, accuracy, strict=True):
            values.setdefault(round(epoch, 6), []).append(value)
    # Where runs are missing the mean would jump.
    whole = {e: sum(v) / len(v) for e, v in values.items() if len(v) == len(runs)}
    label = f"{arm} (n = {len(runs)})"
    axes.plot(whole.keys(), whole.values(), color=colour, label=label)


# -- The command line ------------------------------------------------------------------


def named_file(text):
    """NAME=FILE -> (NAME, Path)"""
    name, _, file = text.partition("=")
    if not name or not file or "+" in name or "-seed" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    if name in OWN_SOURCES:
        raise argparse.ArgumentTypeError(f"{text!r}: {name} means other maps")
    return name, Path(file)


def arguments(argv):
    """The settings of a command line; ValueError names the flag that is wrong."""
    argv, train = list(sys.argv[1:] if argv is None else argv), []
    if "--" in argv:
        place = argv.index("--")
        argv, train = argv[:place], argv[place + 1 :]
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("--name", default="toy", help="of the study and its folders [%(default)s]")
    text = "as for attg_mae.py, with labels and a test split [%(default)s]"
    flag("--data", default="toy", help=text)
    flag("--arms", nargs="+", default=["none", "masks"], help="[%(default)s]")
    flag("--seeds", nargs="+", type=int, default=[0, 1, 2], help="[%(default)s]")
    text = "map files of the arms NAME"
    flag(
        "--maps", nargs="+", type=named_file, default=[], metavar="NAME=FILE", help=text
    )
    text = "flags of object_discovery.py for the arm self, in quotes"
    flag("--self_flags", type=shlex.split, default=[], metavar="FLAGS", help=text)
    text = "what is measured of each run; knn first, others read its features [all]"
    flag("--evaluate", nargs="+", choices=EVALUATIONS, default=EVALUATIONS, help=text)
    text = "labelled images a class of k-NN with few labels [%(default)s]"
    flag("--shots", nargs="+", type=int, default=[10], help=text)
    flag("--transfer", help="another data set, for k-NN of the same encoders")
    text = "runs at a time, each on its share of the cores [%(default)s]"
    flag("--jobs", type=int, default=1, help=text)
    flag("--out", type=Path, help="folder of the runs [out/study/NAME]")
    text = "folder of logs, table and curves [results/study/NAME]"
    flag("--results", type=Path, help=text)
    flag("--table", type=Path, metavar="DIR", help="only writes the table of DIR")
    args = parser.parse_args(argv)
    args.train = train
    args.out = args.out or Path("out/study", args.name)
    args.results = args.results or Path("results/study", args.name)
    check(args)
    return args


def check(args):
    """Refuses what cannot work before the first run."""
    # A folder ARM-seedN has its seed from its name: no minus there.
    check_numbers(vars(args), seeds=(0, 2**63 - 1))
    require("knn" in args.evaluate, "--evaluate: needs knn, which keeps the features")
    args.threads = max(1, (os.cpu_count() or 1) // args.jobs)
    if args.table:
        require(args.table.is_dir(), f"--table {args.table}: no such folder")
    known = (*OWN_SOURCES, *dict(args.maps))
    for arm in map(parse_arm, args.arms):
        require(
            arm.source in known,
            f"--arms {arm.name}: there are no such maps; give their file, --maps "
            f"{arm.source}=FILE.npy, or choose from {', '.join(known)}",
        )
        needs_vanilla = arm.source == "self" and "none" not in args.arms
        require(not needs_vanilla, f"--arms {arm.name}: needs the arm none beside it")
    require(
        len(set(args.arms)) == len(args.arms)
        and len(set(args.seeds)) == len(args.seeds),
        "--arms, --seeds: each once",
    )
    for name, file in args.maps:
        require(file.is_file(), f"--maps {name}={file}: no such file")
    ours = ("--data", "--maps", "--seed", "--out", "--guidance", "--resume")
    for word in args.train:
        require(
            word.partition("=")[0] not in ours,
            f"{word} behind --: is set by the study; use its own flags",
        )


def main(argv=None):
    """Runs the study. Returns the rows of its table, see table_rows."""
    args = arguments(argv)
    if args.table:
        return show(args.table)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        failed = Study(args).run_all()
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed:
        raise ChildProcessError(
            f"{len(failed)} runs failed, the first: {failed[0]}; "
            "the same command tries them again"
        )
    return show(args.results)


def show(results):
    """Writes table and curves of the folder `results`, prints and returns the table."""
    rows = table_rows(read_study(results))
    require(rows, f"{results}: no figures of runs in it, in folders ARM-seedN")
    write_table(results)
    draw_curves(results)
    say((results / "table.md").read_text())
    return rows


if __name__ == "__main__":
    end(main, interrupted="interrupted; the same command goes on")
