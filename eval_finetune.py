"""
Fine-tuning of all weights of an encoder (arXiv 2402.15172, Table 2 and section 6).

    python eval_finetune.py out/NAME/encoder.pt --data PATH_OR_NAME --save finetuned.pt
    python eval_finetune.py out/NAME/encoder.pt --data PATH_OR_NAME --fraction 0.1
    torchrun --nproc_per_node=8 eval_finetune.py CHECKPOINT --data imagenet --fraction 0.1

By MAE's recipe: random crops, RandAugment, random erasing, mixup or cutmix, smoothed
labels, stochastic depth, and a learning rate that falls from layer to layer towards the
input. Few labels (--fraction) take the same share of every class.

Shapes: B images, N tokens, D width, C classes.
"""

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

import dataclasses
import functools

import torch
import torch.nn as nn
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2

from attg.cli import Parser, end
from attg.datasets import open_labelled
from attg.evaluation import (
    add_data,
    add_running,
    add_training_data,
    check_flags,
    evaluate,
    view_of,
)
from attg.files import require, sha256
from attg.finetuning import Recipe, fill_in, fit, score, take_fraction
from attg.images import rand_augment, train_view
from attg.seeding import seed_for
from attg_mae import ViT, load_encoder, lr_at

# -- The model -------------------------------------------------------------------------


class Classifier(ViT):
    """The encoder with stochastic depth, and a linear layer on the mean of its patches.

    The names are timm's: fc_norm normalizes the mean, in place of the encoder's last
    norm, and head is the linear layer. encoder: a ViT, of which the weights are copied.
    """

    def __init__(self, encoder, num_classes, drop_path):
        super().__init__(encoder.cfg)
        weights = encoder.state_dict()
        # By our own names: an encoder that is an MAE has a decoder as well.
        self.load_state_dict({name: weights[name] for name in self.state_dict()})
        self.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(self.cfg.width, eps=1e-6)
        self.head = nn.Linear(self.cfg.width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        # MAE keeps the positions fixed in pre-training, and trains them here.
        self.pos_embed.requires_grad_()
        self.add_stochastic_depth(drop_path)

    def add_stochastic_depth(self, drop_path):
        """In training a branch is left out of an image, the deeper the more often.

        Hooks leave the blocks, and so the names of the weights, as they are.
        """
        last = max(1, len(self.blocks) - 1)
        for depth, block in enumerate(self.blocks):
            hook = drop_branch(drop_path * depth / last)
            block.attn.register_forward_hook(hook)
            block.mlp.register_forward_hook(hook)

    def forward(self, imgs):
        tokens = self.forward_features(imgs)  # (B, N, D)
        logits = self.head(self.fc_norm(tokens[:, 1:].mean(dim=1)))  # (B, C)
        return logits[None]  # (1, B, C): one feature


def drop_branch(probability):
    """A forward hook that leaves out a module's output, for some rows of a batch."""

    def hook(module, inputs, output):
        return stochastic_depth(output, probability, "row", module.training)

    return hook


def layer_groups(model, weight_decay, layer_decay):
    """Parameter groups of an optimiser, with "scale" for the learning rate of each.

    The scale is layer_decay^(layers above): 1 for the head, least for the embeddings.
    Biases, norms, positions and the class token have no weight decay.
    """
    last = len(model.blocks) + 1
    groups = {}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if words[0] == "blocks":
            layer = int(words[1]) + 1
        elif words[0] in ("fc_norm", "head"):
            layer = last
        else:
            layer = 0
        is_token = words[0] in ("cls_token", "pos_embed")
        decay = weight_decay if parameter.dim() > 1 and not is_token else 0.0
        if (layer, decay) not in groups:
            scale = layer_decay ** (last - layer)
            group = {"params": [], "weight_decay": decay, "scale": scale}
            groups[layer, decay] = group
        groups[layer, decay]["params"].append(parameter)
    return list(groups.values())


def mix(imgs, labels, num_classes):
    """Random erasing by noise, then mixup or cutmix of the batch.

    imgs (B, 3, H, W), labels (B,) -> images of the same shape, targets (B, C).
    """
    erase = v2.RandomErasing(
        0.25, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random"
    )
    mixup = v2.MixUp(alpha=0.8, num_classes=num_classes)
    cutmix = v2.CutMix(alpha=1.0, num_classes=num_classes)
    # Erasing draws anew for each image, the other two once for a batch.
    erased = torch.stack([erase(image) for image in imgs])
    return v2.RandomChoice([mixup, cutmix])(erased, labels)


# -- The protocol ----------------------------------------------------------------------

# Of facebookresearch/mae: ViT-B, then what is different from ViT-L on.
VIT_BASE = Recipe(
    epochs=100,
    batch_size=1024,
    blr=5e-4,
    warmup_epochs=5,
    weight_decay=0.05,
    min_lr=1e-6,
    layer_decay=0.65,
    drop_path=0.1,
)
VIT_LARGE = dataclasses.replace(
    VIT_BASE, epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2
)
VIT_HUGE = dataclasses.replace(VIT_LARGE, drop_path=0.3)
RECIPES = {24: VIT_LARGE, 32: VIT_HUGE}  # by the depth of the encoder


def complete(args, images, depth, device, world):
    """The recipe for `images` training images: MAE's, but for what was given."""
    recipe = RECIPES.get(depth, VIT_BASE)
    return fill_in(recipe, args, images, 128, device, world)


def finetune(args, settings, place):
    """The rows of figures, and the settings with those of the recipe."""
    device, _, world = place
    encoder = load_encoder(args.checkpoint, img_size=args.img_size).to(device)
    settings |= {"protocol": "finetune", "finetune": True}
    settings["sha256"] = sha256(args.checkpoint)
    cfg = encoder.cfg
    after = rand_augment(cfg.mean)
    view = functools.partial(train_view, scale=(0.08, 1.0), after=after)
    train_set, tests = open_labelled(
        args.data, args.val, augment=view, seed=args.seed, **view_of(args, cfg)
    )
    train_set = take_fraction(train_set, args.fraction, args.seed)
    recipe = complete(args, len(train_set), cfg.depth, device, world)
    settings = settings | dataclasses.asdict(recipe)

    torch.manual_seed(seed_for("head", args.seed))
    model = Classifier(encoder, train_set.num_classes, recipe.drop_path).to(device)
    groups = layer_groups(model, recipe.weight_decay, recipe.layer_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    fit(
        model,
        optimizer,
        train_set,
        recipe,
        settings,
        lr_at,
        place,
        mix=mix,
        label_smoothing=0.1,
    )
    rows = score(model, tests, ["patch_mean"], "finetune", settings, place)
    return rows, settings


# -- The command line ------------------------------------------------------------------


def arguments(argv):
    parser = Parser(description=__doc__)
    add_data(parser.add_argument)
    add_training_data(parser.add_argument)
    add_recipe(parser.add_argument)
    add_running(parser.add_argument, "the checkpoint")
    args = parser.parse_args(argv)
    require(args.checkpoint, "a checkpoint is needed: eval_finetune.py CHECKPOINT")
    check_flags(args)
    return args


def add_recipe(flag):
    flag("--epochs", type=int, help="[100, from ViT-L on 50]")
    flag("--batch_size", type=int, help="of all processes [1024, a tenth of few]")
    flag("--accum", type=int, help="micro-batches of a step [of 128 images]")
    flag(
        "--blr",
        type=float,
        help="lr = blr * batch_size / 256 [5e-4, from ViT-L on 1e-3]",
    )
    flag("--warmup_epochs", type=float, help="[5; a fifth of few epochs]")
    flag("--weight_decay", type=float, help="[0.05]")
    flag(
        "--layer_decay",
        type=float,
        help="of the learning rate [0.65, from ViT-L on 0.75]",
    )
    flag("--drop_path", type=float, help="stochastic depth [0.1, ViT-L 0.2, ViT-H 0.3]")
    flag("--precision", choices=("fp32", "bf16"), help="[bf16 on a GPU that has it]")


def main(argv=None, data=None):
    """Returns the rows of figures; data: of one's own, see attg.evaluation.evaluate."""
    return evaluate("eval_finetune", arguments(argv), finetune, data)


if __name__ == "__main__":
    end(main, memory="raise --accum, or lower --batch_size")
