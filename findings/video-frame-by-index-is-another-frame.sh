#!/usr/bin/env bash
# imageio, OpenCV: frame i of a video that lacks some frames, or that starts late, is another one
# than the i-th read in order; some come twice, the last ones never.
#
# Versions: imageio 2.38.1, av 18.1.0, opencv-python-headless 5.0.0.93, numpy 2.4.6.
# Expected: imread(video, index=i, plugin="pyav") is the i-th frame of imiter, as its argument
# constant_framerate=None reads "from the container format" whether frames are evenly spaced.
# Behavior: the flag it reads belongs to formats as they are written; MP4 and Matroska being read
# lack it, and their videos count as evenly spaced. The key frame before i gets its number from
# its time: too large by the frames dropped before it (phones, screen recordings, web cameras),
# so the frame returned lies as many before. In a clip whose times start at 0.48 s (a segment of
# a longer recording), frames 2 to 12 are all frame 0, the rest are 12 early. Up to the second key
# frame all may be right. OpenCV's CAP_PROP_POS_FRAMES fails for dropped frames only.
# Workaround: constant_framerate=False (slow), or read in order.
#
# Output seen (60 frames, every 12th a key frame: right by index, and what imageio returns):
#                     imageio  not constant  OpenCV
#   even                   60            60      60
#   6 frames dropped       14            60      29  14 is 12, 15 is 13, ..., 59 is 53
#   start at 0.48 s         2            60      60  2 is 0, 3 is 0, ..., 59 is 47
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install -q numpy==2.4.6 imageio==2.38.1 av==18.1.0 opencv-python-headless==5.0.0.93
venv/bin/python - <<'PY'
from fractions import Fraction

import av
import cv2
import imageio.v3 as iio
import numpy as np

even = np.arange(60) * 40  # milliseconds
dropped = np.delete(np.arange(66) * 40, [5, 9, 20, 21, 33, 47])
pyav = dict(uri="video.mp4", plugin="pyav")


def write(times):
    with av.open("video.mp4", "w") as video:
        stream = video.add_stream("libx264", rate=25, options=dict(g="12"), width=64, height=64)
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):  # Frame n has the gray value 4 n + 5.
            gray = np.full((64, 64, 3), 4 * number + 5, np.uint8)
            frame = av.VideoFrame.from_ndarray(gray, format="rgb24")
            frame.pts, frame.time_base = int(time), Fraction(1, 1000)
            video.mux(stream.encode(frame))
        video.mux(stream.encode())


def opencv(index, video):
    return video.set(cv2.CAP_PROP_POS_FRAMES, index) and video.read()[1]


def right(frames):
    found = [round((float(frame.mean()) - 5) / 4) for frame in frames]
    wrong = [f"{i} is {n}" for i, n in enumerate(found) if i != n]
    return len(found) - len(wrong), ", ".join([*wrong[:2], "...", wrong[-1]] if wrong else [])


print(f"{'':18} imageio  not constant  OpenCV")
counts = []
for title, times in ("even", even), ("6 frames dropped", dropped), ("start at 0.48 s", even + 480):
    write(times)
    assert right(iio.imiter(**pyav)) == (60, "")
    imageio, wrong = right(iio.imread(index=i, **pyav) for i in range(60))
    exact, _ = right(iio.imread(index=i, constant_framerate=False, **pyav) for i in range(60))
    video = cv2.VideoCapture("video.mp4")
    found, _ = right(opencv(i, video) for i in range(60))
    print(f"{title:18} {imageio:7} {exact:13} {found:7}  {wrong}".rstrip())
    counts.append((imageio, exact, found))
assert counts[0] == (60, 60, 60) and counts[2] == (2, 60, 60), counts
assert counts[1][0] < 20 and counts[1][1] == 60 and counts[1][2] < 40, counts
PY
