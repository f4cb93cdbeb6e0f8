#!/usr/bin/env bash
# Hydra: flag=off on the command line switches the flag on, though "flag: off" in the config file
# switches it off; a sweep over on,off runs the same experiment twice.
#
# Versions: hydra-core 1.3.8, omegaconf 2.3.1, PyYAML 6.0.4, numpy 2.4.6.
# Expected: an override means what the same words mean in the file. The loader of the files knows
# on, off, yes and no as YAML 1.1 does, and so do OmegaConf.from_dotlist and from_cli; and what
# would turn the bool of the file into another type is refused.
# Behavior: Hydra reads its command line by a grammar of its own, in which only true and false are
# bool. off, no and No are strings, each of which is true for "if cfg.flag". Nothing compares them
# with the bool they replace, and the config stored with the run shows a plausible 'off'. So an
# ablation by "-m flag=on,off" finds no effect at all. Numbers part likewise: 3:4, a ratio, is 184
# in a file (base 60) and a string on the command line; 010 is 8 in a file (base 8) and a string;
# nan is a string in a file and a number on the command line.
# Workaround: true and false; or a dataclass as schema (ConfigStore), whose bool turns 'off' into
# False.
#
# Output seen (largest value of a patch of 2, 4, 6, 8 as target, normalized if norm_pix_loss):
#   value  in a file    dotlist      command line
#   off    False        False        'off'
#   no     False        False        'no'
#   false  False        False        False
#   3:4    184          184          '3:4'
#   010    8            8            '010'
#   nan    'nan'        'nan'        nan
#   -m norm_pix_loss=true,false: 1.34 8.00
#   -m norm_pix_loss=on,off: 1.34 1.34
#   -m --config-name=typed norm_pix_loss=on,off: 1.34 8.00
set -euo pipefail
script=$(realpath "$0")
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q hydra-core==1.3.8 omegaconf==2.3.1 pyyaml==6.0.4 numpy==2.4.6
cd "$dir"
cat >train.py <<'EOF'
from dataclasses import dataclass

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore


@dataclass
class Schema:
    norm_pix_loss: bool = True


# Two configs with one flag: the first as from a YAML file, without types, the second with them.
ConfigStore.instance().store(name="plain", node={"norm_pix_loss": True})
ConfigStore.instance().store(name="typed", node=Schema)


@hydra.main(version_base=None, config_path=None, config_name="plain")
def main(cfg):
    target = np.array([2.0, 4.0, 6.0, 8.0])
    if cfg.norm_pix_loss:
        target = (target - target.mean()) / target.std()
    print(f"{target.max():.2f}")


main()
EOF
sweep() {
    local quiet=(hydra/hydra_logging=disabled hydra/job_logging=disabled)
    echo "-m $*:" $("$dir/venv/bin/python" train.py -m "$@" "${quiet[@]}")
}

"$dir/venv/bin/python" - <<'EOF' >output.txt
import hydra
from omegaconf import OmegaConf

print("value  in a file    dotlist      command line")
for text in ("off", "no", "false", "3:4", "010", "nan"):
    in_file = OmegaConf.create(f"value: {text}").value
    dotlist = OmegaConf.from_dotlist([f"value={text}"]).value
    with hydra.initialize(version_base=None, config_path=None):
        line = hydra.compose(overrides=[f"+value={text}"]).value
    print(f"{text:6} {in_file!r:12} {dotlist!r:12} {line!r}")
EOF
sweep norm_pix_loss=true,false >>output.txt
sweep norm_pix_loss=on,off >>output.txt
sweep --config-name=typed norm_pix_loss=on,off >>output.txt
cat output.txt
# It must be the output shown at the top of this script.
sed -n 's/^#   //p' "$script" | diff - output.txt
