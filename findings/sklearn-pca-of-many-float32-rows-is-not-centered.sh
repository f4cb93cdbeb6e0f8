#!/usr/bin/env bash
# scikit-learn: PCA of float32 features with a large mean finds a direction along the mean and loses
# others, as soon as there are ten times as many rows as columns; more rows make it worse.
#
# Versions: scikit-learn 1.9.1, numpy 2.4.6.
# Expected: PCA centers its input, as its reference page says, so a constant added to the features
# changes nothing but mean_, in float32 as in float64, and more rows give a better estimate.
# Behavior: svd_solver="auto" becomes "covariance_eigh" for fewer than 1,000 columns and ten times
# as many rows. The page says that this solver takes the covariance of centered data. In fact it
# takes X.T @ X of the data as they are, in float32, and subtracts the mean's part afterwards,
# which leaves few digits or none if the mean is 100 standard deviations or more. The error grows
# with the mean and the rows and points along the mean. Negative variances become 0 in silence, and
# what whiten=True makes of their components is in the millions. Candidates are thermal images in
# kelvin, CT with its offset, and air pressure. The page's warning about a large range of singular
# values is another matter: in the first data here these differ by a factor of 2 at most, and the
# solver is right on the same rows without their mean.
# Workaround: X - X.mean(axis=0) or StandardScaler before it, svd_solver="full", or float64.
#
# Output seen:
#                                variances  cosine    whitened
#                             first   last to mean     maximum
#   100 features of mean 1000 and variance 1, 999 rows
#     full                    1.667  0.459    0.16           4
#     auto                    1.667  0.459    0.16           4
#     auto, float64           1.667  0.459    0.16           4
#     auto, minus mean        1.667  0.459    0.16           4
#   100 features of mean 1000 and variance 1, 1000 rows
#     full                    1.666  0.459    0.16           4
#     auto                   42.068  0.000    0.67  32,688,016
#     auto, float64           1.666  0.459    0.16           4
#     auto, minus mean        1.666  0.459    0.16           4
#   100 features of mean 1000 and variance 1, 20000 rows
#     full                    1.139  0.865    0.09           5
#     auto                  262.203  0.000    0.76  40,938,672
#     auto, float64           1.139  0.865    0.09           5
#     auto, minus mean        1.139  0.865    0.09           5
#   100 features of mean 100 and variance 1, 20000 rows
#     full                    1.139  0.865    0.09           5
#     auto                    3.056  0.000    0.71  36,624,896
#     auto, float64           1.139  0.865    0.09           5
#     auto, minus mean        1.139  0.865    0.09           5
#   thermal images, patches of 8 x 8 pixels, 20000 rows
#     kelvin, full          254.238  0.080    1.00           5
#     Celsius, auto         254.203  0.080    1.00           5
#     kelvin, auto          260.438  0.000    1.00  36,532,224
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q scikit-learn==1.9.1 numpy==2.4.6
"$dir/venv/bin/python" -W error - <<'EOF'
import numpy as np
from sklearn.decomposition import PCA

random = np.random.default_rng(0)


def fit(name, rows, solver="auto"):
    pca = PCA(whiten=True, svd_solver=solver).fit(rows)
    largest, smallest = pca.explained_variance_[[0, -1]]
    along_mean = abs(pca.components_[0].sum()) / rows.shape[1] ** 0.5
    whitened = np.abs(pca.transform(rows)).max()
    print(f"  {name:20}{largest:9.3f}{smallest:7.3f}{along_mean:8.2f}{whitened:12,.0f}")
    return largest, smallest, whitened


print(f"{'':22}{'variances':>16}  cosine    whitened")
print(f"{'':22}{'first   last':>16} to mean     maximum")
normal = random.normal(size=(20000, 100)).astype(np.float32)
for mean, count in ((1000, 999), (1000, 1000), (1000, 20000), (100, 20000)):
    print(f"100 features of mean {mean} and variance 1, {count} rows")
    rows = normal[:count] + np.float32(mean)
    full, auto = fit("full", rows, "full"), fit("auto", rows)
    assert full[0] < 2 and full[1] > 0.4 and full[2] < 10, full
    if count < 1000:
        assert auto == full, (auto, full)
    elif mean == 1000:
        assert auto[0] > 10 and auto[1] == 0 and auto[2] > 1e5, auto
    else:
        assert auto[0] > 1.2 * full[0], (auto, full)
    for name, same in (("float64", rows.astype(float)), ("minus mean", rows - rows.mean(axis=0))):
        assert np.allclose(fit(f"auto, {name}", same), full, rtol=0.02)

print("thermal images, patches of 8 x 8 pixels, 20000 rows")
y, x = np.mgrid[-1:1:8j, -1:1:8j].reshape(2, 1, 64)
level, down, right = random.normal(size=(3, 20000, 1))
celsius = 22 + 2 * (level + down * y + right * x) + random.normal(0, 0.3, (20000, 64))
celsius = celsius.astype(np.float32)
kelvin = celsius + np.float32(273.15)
full = fit("kelvin, full", kelvin, "full")
for_celsius = fit("Celsius, auto", celsius)
for_kelvin = fit("kelvin, auto", kelvin)
assert np.allclose(for_celsius, full, rtol=0.1), (for_celsius, full)
assert for_kelvin[1] == 0 and for_kelvin[2] > 1e5, for_kelvin
EOF
