#!/usr/bin/env bash
# Keras: each class that ties with the fifth counts as one of the top 5, so k-NN votes for shuffled
# labels score 1, as does a head of zeros; with JAX also a model that has diverged to nan.
#
# Versions: keras 3.15.1, jax 0.10.2, numpy 2.4.6.
# Expected: the top 5 are five classes, ties broken somehow, as in torch.topk, timm, torchmetrics
# and scikit-learn's top_k_accuracy_score: what knows nothing of 100 classes scores about 0.05. A
# prediction of nan is never right.
# Behavior: a class is among the top k if fewer than k have a greater score. Equal scores all count.
# A head of zeros, the usual start of a linear probe, has all classes in its top 5. Votes of k
# nearest neighbors fall on few classes. If on fewer than five, the fifth best class has no vote,
# as most classes, and all of them count, however wrong. Nothing is greater than nan: with JAX
# logits of nan score 1, and the best checkpoint by top-5 accuracy is the diverged one. With NumPy
# (and PyTorch, by the same code) they score 0. SparseCategoricalAccuracy, top 1, is free of this.
# TensorFlow's manual says it of ties; that of Keras, which does the same in all backends, does not.
# Workaround: break ties first (add a tiny random number to votes), and look for nan in the loss.
#
# Output seen (top-1, top-5 of Keras, top-5 of five classes by argsort; 100 classes, 1000 images):
#   numpy  votes, right labels     1.000  1.000  1.000
#   numpy  votes, shuffled labels  0.010  1.000  0.049
#   numpy  head of zeros           0.010  1.000  0.050
#   numpy  random logits           0.008  0.037  0.037
#   numpy  logits of nan           0.010  0.000  0.050
#   jax    ... the same, except:
#   jax    logits of nan           0.010  1.000  0.050
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q keras==3.15.1 jax==0.10.2 numpy==2.4.6
cat >"$dir/top_5.py" <<'EOF'
import keras
import numpy as np

CLASSES, IMAGES, K = 100, 1000, 20
random = np.random.default_rng(0)
labels = np.arange(IMAGES) % CLASSES
shuffled = random.permutation(labels)

# Features that gather around the center of their class; votes of the 20 nearest in a bank.
centers = random.normal(size=(CLASSES, 64))
bank_labels = np.repeat(np.arange(CLASSES), 50)
bank = centers[bank_labels] + 0.5 * random.normal(size=(len(bank_labels), 64))
images = centers[labels] + 0.5 * random.normal(size=(IMAGES, 64))
distances = (bank**2).sum(1) - 2 * images @ bank.T
near = bank_labels[distances.argsort(axis=1)[:, :K]]
votes = (near[:, :, None] == np.arange(CLASSES)).sum(axis=1)


def compare(name, labels, scores):
    scores = scores.astype("float32")
    top_1 = keras.metrics.SparseCategoricalAccuracy()
    top_5 = keras.metrics.SparseTopKCategoricalAccuracy(k=5)
    values = [float(metric(labels, scores)) for metric in (top_1, top_5)]
    five = scores.argsort(axis=1)[:, -5:]
    values.append((five == labels[:, None]).any(axis=1).mean())
    print(f"{backend:6} {name:22}", *(f" {value:.3f}" for value in values))
    return values


backend = keras.config.backend()
assert compare("votes, right labels", labels, votes)[1] == 1
wrong = compare("votes, shuffled labels", shuffled, votes)
assert wrong[1] == 1 and wrong[2] < 0.1 and wrong[0] < 0.1
zeros = compare("head of zeros", labels, np.zeros((IMAGES, CLASSES)))
assert zeros[1] == 1 and zeros[2] < 0.1
noise = compare("random logits", labels, random.normal(size=(IMAGES, CLASSES)))
assert abs(noise[1] - noise[2]) < 1e-6 and noise[1] < 0.1
diverged = compare("logits of nan", labels, np.full((IMAGES, CLASSES), np.nan))
assert diverged[1] == (1 if backend == "jax" else 0)
EOF
for backend in numpy jax; do
    JAX_PLATFORMS=cpu KERAS_BACKEND=$backend "$dir/venv/bin/python" "$dir/top_5.py"
done
