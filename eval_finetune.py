"""
Fine-tuning of all weights of an encoder (arXiv 2402.15172, Table 2 and section 6).

    python eval_finetune.py out/NAME/encoder.pt --data PATH_OR_NAME --save finetuned.pt
    python eval_finetune.py out/NAME/encoder.pt --data PATH_OR_NAME --label_fraction 0.1
    torchrun --nproc_per_node=8 eval_finetune.py CHECKPOINT --data imagenet

By MAE's recipe: random crops, RandAugment, random erasing, mixup or cutmix, label
smoothing, stochastic depth, and layer-wise learning rate decay. 1,024 images per batch,
weight decay 0.05, 5 epochs of warm-up, min_lr 1e-6; epochs, blr, layer decay,
stochastic depth: 100, 5e-4, 0.65, 0.1 for ViT-B; 50, 1e-3, 0.75, 0.2 for ViT-L (0.3 for
ViT-H). With few images the default batch is about a tenth of them. In batches other
than MAE's the default lr is MAE's lr * sqrt(batch size / 1,024).

Shapes: B images, N tokens, D width, C classes.
"""

if __name__ == "__main__":
    from attg.cli import quiet_sigint_during_import

    quiet_sigint_during_import()

import copy
import dataclasses
import functools

import torch
import torch.nn as nn
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2

from attg.cli import RunFlags, flag, parse, run_cli
from attg.evaluation import EvalFlags, LabelFlags, evaluate, open_encoder
from attg.finetuning import RecipeFlags, fit, open_training, score
from attg.images import seed_for
from attg_mae import ViT, load_encoder, lr_at


@dataclasses.dataclass(kw_only=True)
class Settings(EvalFlags, LabelFlags, RecipeFlags, RunFlags):
    layer_decay: float | None = flag(None, "lr decay per layer", 1e-6, 1.0)
    drop_path: float | None = flag(None, "stochastic depth", 0, 0.99)


class Classifier(ViT):
    """The encoder with stochastic depth, and a linear layer on the mean of its patches.

    Names are timm's: fc_norm normalizes the mean, in place of the encoder's last norm,
    and head is the linear layer. encoder: a ViT, whose weights are copied.
    """

    def __init__(self, encoder, num_classes, drop_path):
        super().__init__(encoder.cfg)
        encoder = copy.deepcopy(encoder)
        self.cls_token, self.pos_embed = encoder.cls_token, encoder.pos_embed
        self.patch_embed, self.blocks = encoder.patch_embed, encoder.blocks
        self.norm = nn.Identity()
        fresh = nn.LayerNorm(self.cfg.width, eps=1e-6)
        self.fc_norm = getattr(encoder, "fc_norm", fresh)
        self.head = nn.Linear(self.cfg.width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        # Fixed in pre-training, trained here, as in MAE.
        self.pos_embed.requires_grad_()
        # Stochastic depth: residual branches are dropped per image, more often in deeper
        # blocks. Hooks change neither the blocks nor the names of their weights.
        last = max(1, len(self.blocks) - 1)
        for depth, block in enumerate(self.blocks):
            hook = functools.partial(drop_branch, drop_path * depth / last)
            block.attn.register_forward_hook(hook)
            block.mlp.register_forward_hook(hook)

    def forward(self, imgs):
        tokens = self.forward_features(imgs)  # (B, N, D)
        logits = self.head(self.fc_norm(tokens[:, 1:].mean(dim=1)))  # (B, C)
        return logits[None]  # (1, B, C): one feature


def drop_branch(probability, module, inputs, output):
    """Forward hook that zeroes a module's output for random rows of a batch."""
    return stochastic_depth(output, probability, "row", module.training)


def layer_groups(model, weight_decay, layer_decay):
    """Parameter groups of an optimizer, each with the "scale" of its learning rate.

    The scale is layer_decay^(layers above): 1 for the head, lowest for the embeddings.
    Biases, norms, positions and the class token have no weight decay.
    """
    last = len(model.blocks) + 1
    groups = {}
    for name, parameter in model.named_parameters():
        part, *rest = name.split(".")
        layer = last if part in ("fc_norm", "head") else 0
        if part == "blocks":
            layer = int(rest[0]) + 1
        is_token = part in ("cls_token", "pos_embed")
        decay = weight_decay if parameter.dim() > 1 and not is_token else 0.0
        group = {"weight_decay": decay, "scale": layer_decay ** (last - layer)}
        group = groups.setdefault((layer, decay), group | {"params": []})
        group["params"].append(parameter)
    return list(groups.values())


def rand_augment(mean):
    """RandAugment for train_view's `after`; mean: fractions (C,), the fill color.

    timm's rand-m9-mstd0.5-inc1, which MAE fine-tunes with, as closely as torchvision
    allows: two operations at magnitude 9 of 10, each with probability 0.5. Invert,
    SolarizeAdd and the noise of the magnitudes are missing.
    """
    options = {"interpolation": v2.InterpolationMode.BICUBIC}
    options["fill"] = [round(255 * x) for x in mean]
    one = v2.RandAugment(num_ops=1, magnitude=9, num_magnitude_bins=11, **options)
    return v2.Compose([v2.RandomApply([one], 0.5), v2.RandomApply([one], 0.5)])


def mix(imgs, labels, num_classes):
    """Random erasing with noise, then mixup or cutmix of the batch.

    imgs (B, 3, H, W), labels (B,) -> images of the same shape, targets (B, C).
    """
    erase = v2.RandomErasing(
        0.25, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random"
    )
    mixup = v2.MixUp(alpha=0.8, num_classes=num_classes)
    cutmix = v2.CutMix(alpha=1.0, num_classes=num_classes)
    # Erasing draws for each image, mixup and cutmix once per batch.
    erased = torch.stack([erase(image) for image in imgs])
    return v2.RandomChoice([mixup, cutmix])(erased, labels)


# Recipes of facebookresearch/mae, as flags.
VIT_BASE = {
    "epochs": 100,
    "batch_size": 1024,
    "blr": 5e-4,
    "min_lr": 1e-6,
    "warmup_epochs": 5,
    "weight_decay": 0.05,
    "layer_decay": 0.65,
    "drop_path": 0.1,
}
VIT_LARGE = VIT_BASE | {"epochs": 50, "blr": 1e-3}
VIT_LARGE |= {"layer_decay": 0.75, "drop_path": 0.2}
VIT_HUGE = VIT_LARGE | {"drop_path": 0.3}
RECIPES = {24: VIT_LARGE, 32: VIT_HUGE}  # by the encoder's depth


def finetune(settings, data, dist_info):
    """Results of a fine-tuned encoder."""
    encoder = open_encoder(load_encoder, settings, only_files=True)
    cfg, after = encoder.cfg, rand_augment(encoder.cfg.mean)
    recipe = RECIPES.get(cfg.depth, VIT_BASE)
    train_set, tests = open_training(cfg, settings, data, recipe, 128, dist_info, after)
    torch.manual_seed(seed_for("head", settings.seed))
    model = Classifier(encoder, train_set.num_classes, settings.drop_path)
    model = model.to(dist_info[0])
    # For the file of --save: from now on these are what it was trained on.
    for name in ("data", "classes", "white"):
        setattr(model.cfg, name, getattr(settings, name))
    groups = layer_groups(model, settings.weight_decay, settings.layer_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    fit(model, optimizer, train_set, settings, lr_at, dist_info, mix, smoothing=0.1)
    features = ["patch_mean"]
    return score(model, tests, features, "finetune", settings, data, dist_info)


def main(argv=None, data=None):
    """Returns the results, a list of dicts; data: see attg.evaluation.evaluate."""
    return evaluate("eval_finetune", parse(Settings, __doc__, argv), finetune, data)


if __name__ == "__main__":
    run_cli(main, "raise --accum, or lower --batch_size")
