#!/usr/bin/env bash
# webdataset: with a cache_dir, shards of equal file names in two folders are one shard; validation
# reads the training images, and the option against it is ignored.
#
# Versions: webdataset 1.0.2, numpy 2.4.6.
# Expected: a cached shard belongs to its URL, so train/000000.tar and val/000000.tar, the usual
# names, are two shards.
# Behavior: the file in the cache is named after the last part of the URL alone. Whatever is read
# second under the same name is the first shard again: validation scores are training scores,
# and a data set whose folders each count from 0 consists of repeats of its first folder. The
# sample's __url__ still names the shard that was asked for. The FAQ advises url_to_name=...;
# WebDataset takes this option and does nothing with it.
# Workaround: a cache_dir for each folder. Shards on a local disk are never cached, so a test with
# local files does not show it.
#
# Output seen (sample, where it says it is from):
#   no cache, val:           val-a from val/000000.tar, val-b from val/000001.tar
#   cache, train:            train-a from train/000000.tar, train-b from train/000001.tar
#   same cache, val:         train-a from val/000000.tar, train-b from val/000001.tar
#   url_to_name, train:      train-a from train/000000.tar, train-b from train/000001.tar
#   url_to_name, val:        train-a from val/000000.tar, train-b from val/000001.tar
#   cache of its own, val:   val-a from val/000000.tar, val-b from val/000001.tar
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 webdataset==1.0.2
cd "$dir"
mkdir -p web/train web/val cache named own
"$dir/venv/bin/python" -W ignore - <<'EOF'
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import webdataset as wds

for split in ("train", "val"):
    for number, name in enumerate("ab"):
        with wds.TarWriter(f"web/{split}/{number:06}.tar") as shard:
            shard.write({"__key__": f"{split}-{name}", "cls": "0"})


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory="web"))
threading.Thread(target=server.serve_forever, daemon=True).start()
host = f"http://127.0.0.1:{server.server_port}/"


def read(title, split, **options):
    urls = host + split + "/{000000..000001}.tar"
    keys, text = [], []
    for sample in wds.WebDataset(urls, shardshuffle=False, **options):
        keys.append(sample["__key__"])
        text.append(f"{keys[-1]} from {sample['__url__'].removeprefix(host)}")
    print(f"{title}, {split}:".ljust(24), ", ".join(text))
    return keys


def full_name(url):
    return url.removeprefix(host).replace("/", "-")


train, val = ["train-a", "train-b"], ["val-a", "val-b"]
assert read("no cache", "val") == val
assert read("cache", "train", cache_dir="cache") == train
assert read("same cache", "val", cache_dir="cache") == train
assert read("url_to_name", "train", cache_dir="named", url_to_name=full_name) == train
assert read("url_to_name", "val", cache_dir="named", url_to_name=full_name) == train
assert read("cache of its own", "val", cache_dir="own") == val
server.shutdown()
EOF
