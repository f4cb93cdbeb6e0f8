#!/usr/bin/env bash
# joblib, diskcache: features cached on disk by a function that is made anew for each model are
# the first model's for all later ones; in diskcache also those of a method.
#
# Versions: joblib 1.6.0, diskcache 5.6.3, numpy 2.4.6.
# Expected: functions made for two checkpoints are two functions, as they are for functools.cache
# and for the fingerprints of Hugging Face datasets; the object of a method is one of its arguments.
# Behavior: results are kept under module and name of the function (in joblib it has to have the
# same source, too) and the arguments of the call. What a function takes from the one around it is
# in neither. So a second model gets the features of the first and its k-NN accuracy to the last
# digit, and so does tomorrow's checkpoint, as the files stay. diskcache also leaves out the object
# of a method that is cached in __init__, which joblib shows as the right way, and defaults. No
# message; joblib's documentation says that functions of one name collide in other sessions only,
# and are run again then.
# Workaround: the model, or name and date of its file, as an argument of each call; in joblib a
# method cached in __init__ is right.
#
# Output seen (whose features model 2 gets, after model 1 was run on the same image):
#                      joblib    diskcache
#   function           model 1   model 1
#   method             model 2   model 1
#   default_argument   model 2   model 1
#   argument           model 2   model 2
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 joblib==1.6.0 diskcache==5.6.3
cat >"$dir/features.py" <<'EOF'
import diskcache
import joblib
import numpy as np

CACHES = {
    "joblib": joblib.Memory("joblib", verbose=0).cache,
    "diskcache": diskcache.Cache("diskcache").memoize(),
}
IMAGE = np.random.default_rng(0).random((64, 8))


class Model:
    def __init__(self, scale, cache):
        self.scale = scale
        self.method = cache(self.features)

    def features(self, image):
        return self.scale * image.mean(axis=0)


def function(cache, model):
    @cache
    def features(image):
        return model.features(image)

    return features(IMAGE)


def method(cache, model):
    return model.method(IMAGE)


def default_argument(cache, model):
    return cache(lambda image, model=model: model.features(image))(IMAGE)


def argument(cache, model):
    return cache(lambda image, scale: scale * image.mean(axis=0))(IMAGE, model.scale)


def compare(make, expected):
    owners = []
    for cache in CACHES.values():
        scales = [make(cache, Model(scale, cache)) / IMAGE.mean(axis=0) for scale in (1, 2)]
        owners.append(round(scales[-1].mean()))
    print(f"{make.__name__:18}", *(f"model {owner:<3}" for owner in owners))
    assert owners == expected


print(f"{'':18}", *(f"{name:9}" for name in CACHES))
compare(function, [1, 1])
compare(method, [2, 1])
compare(default_argument, [2, 1])
compare(argument, [2, 2])
EOF
cd "$dir"
venv/bin/python -W error::UserWarning features.py
