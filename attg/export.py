"""
Export to Hugging Face transformers.

    model = to_hugging_face("out/NAME/last.pt")       # ViTMAEForPreTraining
    model = to_hugging_face("out/NAME/encoder.pt")    # ViTModel without its pooler
    model.save_pretrained("folder")
"""

import re

from attg.weights import read_weights, rename

# Settings of Config -> those of Hugging Face.
ENCODER = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
}
DECODER = {
    "decoder_width": "decoder_hidden_size",
    "decoder_depth": "decoder_num_hidden_layers",
    "decoder_heads": "decoder_num_attention_heads",
    "mask_ratio": "mask_ratio",
    "norm_pix": "norm_pix_loss",
}


def to_hugging_face(path):
    """Convert last.pt to ViTMAEForPreTraining, encoder.pt to ViTModel, in eval mode.

    ValueError for files of other projects, which lack this project's settings.
    """
    import transformers as hf

    state, config, name = read_weights(path)
    if config is None:
        raise ValueError(
            f"{name}: not written by this project; give last.pt or encoder.pt of a run"
        )
    settings = {new: config[old] for old, new in ENCODER.items()}
    settings |= {"layer_norm_eps": 1e-6, "intermediate_size": 4 * config["width"]}
    if "mask_token" in state:
        settings |= {new: config[old] for old, new in DECODER.items()}
        settings["decoder_intermediate_size"] = 4 * config["decoder_width"]
        model = hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**settings))
    else:
        model = hf.ViTModel(hf.ViTConfig(**settings), add_pooling_layer=False)

    # Going by the model's keys works for the names of any version of transformers.
    weights = model.state_dict()
    for key in weights:
        ours = rename(key)
        part = re.search(r"attn\.([qkv])\.", ours)
        if part:
            qkv = state[ours.replace(part[0], "attn.qkv.")]
            weights[key] = qkv.chunk(3)["qkv".index(part[1])]
        else:
            weights[key] = state[ours]
    model.load_state_dict(weights)
    return model.eval()
