#!/usr/bin/env bash
# memoization, cacheout, aiocache, dogpile.cache, beaker, klepto, percache: functions of arrays
# cached by them return one mask's result for each mask with the same corners.
#
# Versions: memoization 0.4.0, cacheout 0.17.0, aiocache 0.12.3, dogpile.cache 1.5.0,
# beaker 1.14.1, klepto 0.2.8, percache 0.4.4, joblib 1.6.0, diskcache 5.6.3, cachier 4.2.0,
# numpy 2.4.6.
# Expected: a cache whose decorator accepts an array tells arrays apart by their values; one that
# cannot says so, as functools.lru_cache does, or calculates anew, as klepto.safe promises.
# Behavior: for arguments that cannot be hashed, or for all of them, these take the printed text as
# key. NumPy prints an array of more than 1,000 values by the first and last three of its rows and
# columns, with "..." in between. Masks of objects that leave the border free are the same text, as
# are padded images of one size, and get the result that was computed first. No message. Maps of up
# to 1,000 values, such as patch maps or the arrays of a test, are printed whole and are right.
# Some document that their keys are text, none what that means for arrays. joblib, diskcache and
# cachier go by all values.
# Workaround: one of these three, or a key of one's own (memoization's custom_key_maker, say).
#
# Output seen (20 masks, each with a square of another size; areas that are right):
#                      28 x 28  64 x 64
#   the first seven         20        1
#   joblib                  20       20
#   diskcache               20       20
#   cachier                 20       20
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 memoization==0.4.0 cacheout==0.17.0 aiocache==0.12.3 \
    dogpile.cache==1.5.0 beaker==1.14.1 klepto==0.2.8 percache==0.4.4 joblib==1.6.0 \
    diskcache==5.6.3 cachier==4.2.0
cd "$dir"
venv/bin/python -W ignore - <<'EOF'
import asyncio

import aiocache
import beaker.cache
import cachier
import cacheout
import diskcache
import dogpile.cache
import joblib
import klepto.safe
import memoization
import numpy as np
import percache


def aiocached(function):
    @aiocache.cached()
    async def cached(mask):
        return function(mask)

    return lambda mask: asyncio.run(cached(mask))


region = dogpile.cache.make_region().configure("dogpile.cache.memory")
CACHES = {
    "memoization": memoization.cached,
    "cacheout": cacheout.Cache().memoize(),
    "aiocache": aiocached,
    "dogpile.cache": region.cache_on_arguments(),
    "beaker": beaker.cache.CacheManager(type="memory").cache("area"),
    "klepto.safe": klepto.safe.lru_cache(),
    "percache": percache.Cache("percache"),
    "joblib": joblib.Memory("joblib", verbose=0).cache,
    "diskcache": diskcache.Cache("diskcache").memoize(),
    "cachier": cachier.cachier(cache_dir="cachier"),
}


def area(mask):
    return int(mask.sum())


def right(cached, size):
    """How many of 20 masks get their own area."""
    count = 0
    for side in range(2, 22):
        mask = np.zeros((size, size), bool)
        mask[3 : 3 + side, 3 : 3 + side] = True
        count += cached(mask) == area(mask)
    return count


print(f"{'':18}28 x 28  64 x 64")
for name, cache in CACHES.items():
    cached = cache(area)
    small, large = right(cached, 28), right(cached, 64)
    print(f"{name:18}{small:7}{large:9}")
    assert (small, large) == (20, 20 if name in ("joblib", "diskcache", "cachier") else 1), name
EOF
