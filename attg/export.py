"""
Models of this project as Hugging Face's.

    model = to_hugging_face("out/NAME/last.pt")       # ViTMAEForPreTraining
    model = to_hugging_face("out/NAME/encoder.pt")    # ViTModel, without its pooler
    model.save_pretrained("folder")
"""

import re

from attg.files import require
from attg.weights import read_weights, rename

# From the settings of a Config to Hugging Face's.
ENCODER = {"img_size": "image_size", "patch_size": "patch_size"}
ENCODER |= {"in_chans": "num_channels", "width": "hidden_size"}
ENCODER |= {"depth": "num_hidden_layers", "heads": "num_attention_heads"}
DECODER = {"decoder_width": "decoder_hidden_size", "mask_ratio": "mask_ratio"}
DECODER |= {"decoder_depth": "decoder_num_hidden_layers", "norm_pix": "norm_pix_loss"}
DECODER |= {"decoder_heads": "decoder_num_attention_heads"}


def to_hugging_face(path):
    """ViTMAEForPreTraining of a file with a decoder, ViTModel of one without, to evaluate.

    path: last.pt or encoder.pt of a run. ValueError for files of others, whose settings
    are not known.
    """
    import transformers as hf

    state, config, name = read_weights(path)
    require(config, f"{name}: not written by this project; give the file of a run")
    settings = {new: config[old] for old, new in ENCODER.items()}
    settings |= {"layer_norm_eps": 1e-6, "intermediate_size": 4 * config["width"]}
    if "mask_token" in state:
        settings |= {new: config[old] for old, new in DECODER.items()}
        settings["decoder_intermediate_size"] = 4 * config["decoder_width"]
        model = hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**settings))
    else:
        model = hf.ViTModel(hf.ViTConfig(**settings), add_pooling_layer=False)

    # Its own names tell which of our weights it wants, in any version of transformers.
    wanted = model.state_dict()
    for key in wanted:
        own = rename(key)
        part = re.search(r"attn\.([qkv])\.", own)
        if part:
            joined = state[own.replace(part[0], "attn.qkv.")]
            wanted[key] = joined.chunk(3)["qkv".index(part[1])]
        else:
            wanted[key] = state[own]
    model.load_state_dict(wanted)
    return model.eval()
