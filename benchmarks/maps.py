"""
TokenCut's normalized cut beside scipy's, and relative to the backbone's time.
"""

from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from attg.toy import toy
from attg_mae import Config, build_model, normalize
from benchmarks.measure import compare, take_turns
from object_discovery import tokencut


def cut_features(keys):
    """{kind: features (B, L, d)} of three kinds of graphs, easy and hard."""
    B, L, _ = keys.shape
    return {
        "keys of ViT-S": keys,
        "keys, centered": keys - keys.mean(1, keepdim=True),
        "noise": torch.randn(B, L, 64, generator=torch.Generator().manual_seed(0)),
    }


def scipy_cut(features):
    """TokenCut's eigenvectors (L, 2) of each image, as its authors compute them."""
    import scipy.linalg

    x = F.normalize(features.double(), dim=-1)
    # An edge is 1 for a cosine above 0.2, else 1e-5.
    for affinity in torch.where(x @ x.mT > 0.2, 1.0, 1e-5):
        degree = affinity.sum(1).diag()
        scipy.linalg.eigh(degree - affinity, degree, subset_by_index=[1, 2])


@torch.no_grad()
def run(settings, device):
    """Rows: ms per image of 196 and 784 patches, at the default size.

    The backbone is a ViT-S with random weights on toy images. scipy runs on the CPU.
    """
    B, size = settings.batch_size, settings.size
    images = toy("test")[0][:B]
    imgs = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    imgs = F.interpolate(imgs, size, mode="bilinear").to(device)
    for patch in (16, 8):
        model = build_model(Config("vit_small", img_size=size, patch_size=patch))
        model.eval().to(device)
        backbone = partial(model.last_qkv, normalize(imgs.byte(), model.cfg))
        keys = backbone()[1]  # (B, heads, 1 + L, D / heads)
        keys = keys[:, :, 1:].transpose(1, 2).flatten(2)  # (B, L, D)
        for kind, features in cut_features(keys.cpu()).items():
            calls = {"tokencut": partial(tokencut, features.to(device))}
            if find_spec("scipy"):
                calls["scipy"] = partial(scipy_cut, features)
            if kind == "keys of ViT-S":
                calls["backbone"] = backbone
            times = take_turns(calls, device, settings.repeats)
            for name, columns in compare(times, B).items():
                yield {"graphs": kind, "L": keys.shape[1], "cut": name} | columns
