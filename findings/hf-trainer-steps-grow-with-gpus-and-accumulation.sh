#!/usr/bin/env bash
# transformers: for most vision heads Trainer's loss and gradient are multiplied by the number
# of GPUs and by the steps of accumulation.
#
# Versions: transformers 5.24.0, accelerate 1.15.0, torch 2.14.1, torchvision 0.29.1,
# numpy 2.4.6.
# Expected: 16 images are one gradient, whether they come as one batch, as four that are
# accumulated, or on two GPUs.
# Behavior: a model whose forward takes **kwargs is trusted to divide its loss by the number
# of labels in all batches and on all GPUs, which Trainer hands it; so Trainer does not
# average over batches, and multiplies by the number of GPUs to undo DDP's mean. In version 5
# nearly every forward takes **kwargs. ViT and DINOv2 use the number; CLIP, SigLIP, BEiT,
# Hiera, Swin v2, ResNet and timm's wrapper drop it and take the mean of a batch, and so does
# ViT itself with several labels an image. SegFormer, DPT and UperNet do the same for masks.
# 8 GPUs with 4 accumulated batches take 32 times the gradient: SGD's rate is 32 times the one
# that was set, and clipping, on by default at 1, rescales many more steps. The logged loss
# grows alike, and the evaluation loss with the number of GPUs. No warning.
# Workaround: model.accepts_loss_kwargs = False before the Trainer is made, for any model.
#
# Output seen (16 images; logged loss, gradient over the true one, evaluation loss):
#   1 process, 4 batches accumulated
#     ViT                      1.387   1.00   1.387
#     ViT, several labels      2.787   4.00   0.697
#     DINOv2                   1.396   1.00   1.396
#     BEiT                     5.550   4.00   1.387
#     CLIP                     5.478   4.00   1.369
#     SigLIP                   6.034   4.00   1.508
#     SigLIP, cure             1.508   1.00   1.508
#   2 processes, 4 batches accumulated
#     ViT                      1.387   1.00   1.387
#     ViT, several labels      5.574   8.00   1.393
#     DINOv2                   1.396   1.00   1.396
#     BEiT                    11.100   8.00   2.775
#     CLIP                    10.955   8.00   2.739
#     SigLIP                  12.067   8.00   3.017
#     SigLIP, cure             1.508   1.00   1.508
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1 torchvision==0.29.1 \
    transformers==5.24.0 accelerate==1.15.0
cat > "$dir/train.py" <<'PY'
import os
import warnings

import torch
import transformers as hf

hf.logging.set_verbosity_error()
warnings.filterwarnings("ignore")
WORLD, STEPS = int(os.environ.get("WORLD_SIZE", 1)), 4
SIZE = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            image_size=16, patch_size=8)  # fmt: skip
HEAD = dict(num_labels=4)
several = hf.ViTConfig(**SIZE, **HEAD, problem_type="multi_label_classification")
torch.manual_seed(0)
siglip = hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=SIZE, **HEAD))
models = {
    "ViT": hf.ViTForImageClassification(hf.ViTConfig(**SIZE, **HEAD)),
    "ViT, several labels": hf.ViTForImageClassification(several),
    "DINOv2": hf.Dinov2ForImageClassification(hf.Dinov2Config(**SIZE, **HEAD)),
    "BEiT": hf.BeitForImageClassification(hf.BeitConfig(**SIZE, **HEAD, drop_path_rate=0)),
    "CLIP": hf.CLIPForImageClassification(hf.CLIPConfig(vision_config=SIZE, **HEAD)),
    "SigLIP": siglip,
    "SigLIP, cure": siglip,
}
images, classes = torch.randn(16, 3, 16, 16), torch.arange(16) % 4
options = hf.TrainingArguments(
    os.environ["FOLDER"], max_steps=1, per_device_train_batch_size=16 // WORLD // STEPS,
    gradient_accumulation_steps=STEPS, optim="sgd", learning_rate=1e-6, logging_steps=1,
    save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)  # fmt: skip
lines = [f"{WORLD} process{'es' * (WORLD > 1)}, {STEPS} batches accumulated"]
for name, model in models.items():
    labels = torch.eye(4)[classes] if "several" in name else classes
    if "cure" in name:
        model.accepts_loss_kwargs = False
    loss = model(pixel_values=images, labels=labels).loss
    gradient = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    norm = torch.cat([g.flatten() for g in gradient if g is not None]).norm().item()

    data = [dict(pixel_values=x, labels=y) for x, y in zip(images, labels)]
    trainer = hf.Trainer(model, options, train_dataset=data, eval_dataset=data)
    trainer.remove_callback(hf.PrinterCallback)
    trainer.train()
    log = trainer.state.log_history[0]
    test = trainer.evaluate()["eval_loss"]
    factor = log["grad_norm"] / norm
    lines.append(f"  {name:22} {log['loss']:7.3f} {factor:6.2f} {test:7.3f}")
    right = name in ("ViT", "DINOv2", "SigLIP, cure")
    expected = 1 if right else WORLD * STEPS
    assert abs(factor / expected - 1) < 1e-2, (name, factor)
    assert abs(log["loss"] / loss.item() / expected - 1) < 1e-2, (name, log, loss)
    assert abs(test / loss.item() / (1 if right else WORLD) - 1) < 1e-2, (name, test, loss)
if os.environ.get("RANK", "0") == "0":
    print("\n".join(lines), flush=True)
PY
export FOLDER="$dir/run" OMP_NUM_THREADS=1 TORCH_CPP_LOG_LEVEL=ERROR
"$dir/venv/bin/python" "$dir/train.py"
"$dir/venv/bin/torchrun" --nproc-per-node 2 "$dir/train.py"
