#!/usr/bin/env bash
# TensorBoard, tbparse: what a resumed run purges (purge_step) is still shown by TensorBoard without
# its fast loader, unless the run had been resumed before, and is always in tbparse's table.
#
# Versions: tensorboard 2.21.0, tensorboard-data-server 0.7.2, tensorboardX 2.6.5, tbparse 0.0.9,
# numpy 2.4.6. torch.utils.tensorboard of torch 2.14.1 writes the same.
# Expected: a run that crashed is resumed from an earlier checkpoint, with purge_step. As the writer
# documents, all earlier values from that step on are purged, in each way to read the folder.
# Behavior: TensorBoard has two loaders. The fast one purges. The one in Python takes the first
# start mark of a folder for the start of the run and purges only from the second on; a writer
# without purge_step, which each fresh run has, leaves no mark. So after the first resume it shows
# lost and new values in one curve. It is used with --load_fast=false, --logdir_spec or
# --detect_file_replacement=true, on paths such as s3://, and where the server of the fast loader
# is not installed. tbparse reads each file for itself and so never purges. Best and last value
# are then those of a model of which no checkpoint exists. No message. TensorBoard's older
# EventAccumulator, which tbparse uses for the single files, purges if it is given the folder.
# Workaround: purge_step=0 in the fresh run, which makes both loaders of TensorBoard agree; the
# older EventAccumulator on the folder in place of tbparse.
#
# Output seen (accuracy logged in steps 0-9, crash, resumed from step 6, at step 8 for now):
#                       values  last step  best
#   fresh run as usual
#     fast loader           9          8  0.62
#     loader in Python     13          9  0.90
#     tbparse              13          9  0.90
#     EventAccumulator      9          8  0.62
#   fresh run with purge_step=0
#     fast loader           9          8  0.62
#     loader in Python      9          8  0.62
#     tbparse              13          9  0.90
#     EventAccumulator      9          8  0.62
#   resumed twice, from steps 6 and 8
#     fast loader           9          8  0.61
#     loader in Python     11          8  0.70
#     tbparse              14          9  0.90
#     EventAccumulator      9          8  0.61
set -euo pipefail
script=$(realpath "$0")
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 tensorboard==2.21.0 tensorboard-data-server==0.7.2 \
    tensorboardX==2.6.5 tbparse==0.0.9
cd "$dir"
cat >read.py <<'EOF'
import json
import logging
import time
import urllib.request

from tbparse import SummaryReader
from tensorboard import program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import SummaryWriter

logging.disable(logging.WARNING)


def write(folder, *accuracies, start, purge_step):
    # The names of event files contain the second in which they were opened.
    time.sleep(1.1)
    with SummaryWriter(f"{folder}/run", purge_step=purge_step) as writer:
        for step, accuracy in enumerate(accuracies, start):
            writer.add_scalar("accuracy", accuracy, step)


def shown(folder, load_fast):
    """The points of the curve in the browser."""
    board = program.TensorBoard()
    board.configure((None, "--logdir", folder, "--load_fast", load_fast, "--port", "0"))
    url = board.launch() + "data/plugin/scalars/scalars?run=run&tag=accuracy"
    points = None
    for _ in range(60):
        time.sleep(0.5)
        try:
            before, points = points, json.load(urllib.request.urlopen(url))
        except urllib.error.HTTPError:  # nothing loaded so far
            continue
        if points == before:
            return [(step, value) for _, step, value in points]


def tables(folder):
    yield "fast loader", shown(folder, "true")
    yield "loader in Python", shown(folder, "false")
    table = SummaryReader(f"{folder}/run").scalars
    yield "tbparse", list(zip(table.step, table.value))
    events = EventAccumulator(f"{folder}/run").Reload().Scalars("accuracy")
    yield "EventAccumulator", [(event.step, event.value) for event in events]


def compare(title, folder):
    print(title)
    for name, points in tables(folder):
        steps, values = zip(*points)
        print(f"  {name:18}{len(steps):5}{max(steps):11}{max(values):6.2f}")


print(f"{'':20}values  last step  best")
for folder, purge_step in (("fresh run as usual", None), ("fresh run with purge_step=0", 0)):
    write(folder, *(step / 10 for step in range(10)), start=0, purge_step=purge_step)
    write(folder, 0.6, 0.61, 0.62, start=6, purge_step=6)
    compare(folder, folder)
write("fresh run as usual", 0.55, start=8, purge_step=8)
compare("resumed twice, from steps 6 and 8", "fresh run as usual")
EOF
venv/bin/python -W ignore read.py 2>log.txt >output.txt || { cat log.txt; exit 1; }
cat output.txt
# It must be the output shown at the top of this script.
sed -n '/^# Output seen/,/^set /s/^#   //p' "$script" | diff - output.txt
