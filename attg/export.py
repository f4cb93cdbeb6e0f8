"""Export to timm and to Hugging Face transformers; README.md shows both."""

from attg.weights import HF_SETTINGS, read_weights, to_mae_name

# Settings of Config -> those of Hugging Face's ViTMAEConfig.
HF_DECODER_SETTINGS = {
    "decoder_width": "decoder_hidden_size",
    "decoder_depth": "decoder_num_hidden_layers",
    "decoder_heads": "decoder_num_attention_heads",
    "mask_ratio": "mask_ratio",
    "norm_pix": "norm_pix_loss",
}


def timm_arguments(cfg):
    """Keyword arguments of timm.create_model for the encoder of a Config."""
    images = {"input_size": (cfg.in_chans, *cfg.size), "mean": cfg.mean, "std": cfg.std}
    # eval_view; timm rounds the resized side down.
    resized = round(cfg.size[0] * 256 / 224)
    images |= {"crop_pct": cfg.size[0] / (resized + 0.5), "interpolation": "bicubic"}
    images |= dict.fromkeys(("url", "hf_hub_id", "tag", "license"))  # none of timm's
    return {
        "model_name": "vit_base_patch16_224",  # the sizes below replace its own
        "img_size": cfg.size,
        "patch_size": cfg.patch_size,
        "in_chans": cfg.in_chans,
        "embed_dim": cfg.width,
        "depth": cfg.depth,
        "num_heads": cfg.heads,
        "num_classes": 0,
        "pretrained_cfg_overlay": images,
    }


def hf_arguments(config, with_decoder):
    """Keyword arguments of ViTConfig, or of ViTMAEConfig, for the settings of a Config."""
    names = HF_SETTINGS | (HF_DECODER_SETTINGS if with_decoder else {})
    arguments = {new: config[old] for old, new in names.items()}
    arguments |= {"layer_norm_eps": 1e-6, "intermediate_size": 4 * config["width"]}
    if with_decoder:
        arguments["decoder_intermediate_size"] = 4 * config["decoder_width"]
    return arguments


def to_hugging_face(path, folder=None):
    """Convert last.pt to ViTMAEForPreTraining, encoder.pt to ViTModel, in eval mode.

    folder: where to save the model and preprocessor_config.json, for from_pretrained.
    ValueError for files of other projects, which lack this project's settings.
    """
    import transformers as hf

    weights = read_weights(path)
    state, config, name = weights.state, weights.settings, weights.name
    if not weights.is_own:
        raise ValueError(
            f"{name}: not written by this project; give last.pt or encoder.pt of a run"
        )
    is_mae = "mask_token" in state
    arguments = hf_arguments(config, is_mae)
    sides = config["img_size"]
    height, width = (sides, sides) if isinstance(sides, int) else sides
    if not is_mae:
        model = hf.ViTModel(hf.ViTConfig(**arguments), add_pooling_layer=False)
    elif height != width:
        raise ValueError(f"{name}: ViTMAE takes squares, not {sides}; give encoder.pt")
    else:
        model = hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**arguments))

    # Going by the model's keys works for the names of any version of transformers.
    for key in [key for key in state if ".qkv." in key]:
        parts = zip("qkv", state[key].chunk(3), strict=True)
        state |= {key.replace(".qkv.", f".{x}."): part for x, part in parts}
    names = {key: to_mae_name(key.removeprefix("vit.")) for key in model.state_dict()}
    missing = [ours for ours in names.values() if ours not in state]
    if missing:
        raise ValueError(f"{name}: lacks {missing[:3]}, which Hugging Face's model has")
    model.load_state_dict({key: state[ours] for key, ours in names.items()})
    if folder:
        images = {"image_mean": config["mean"], "image_std": config["std"]}
        images |= {"size": {"height": height, "width": width}, "resample": 3}  # bicubic
        model.save_pretrained(folder)
        hf.ViTImageProcessor(**images).save_pretrained(folder)
    return model.eval()
