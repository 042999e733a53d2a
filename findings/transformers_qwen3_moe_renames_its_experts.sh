#!/usr/bin/env bash
# Versions: transformers 5.24.0 writes, 4.57.3 reads; Python 3.11 or newer, no torch.
# Expected: a saved configuration says the number of experts under the name that it was given, that
#   of the released checkpoints and of transformers 4: `num_experts`.
# Behavior: Qwen3-MoE's is saved as `num_local_experts` alone. transformers 4.57 reads such a file as
#   a model of 128 experts, its default, without a word. Qwen2-MoE keeps its `num_experts`.
# Output seen:
#   transformers 5.24.0 writes {'qwen3_moe': {'num_local_experts': 6}, 'qwen2_moe': {'num_experts': 6}}
#   transformers 4.57.3 reads 128 experts of 6
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.24.0 4.57.3; do python3 -m venv "$folder/$version"; done
"$folder/5.24.0/bin/pip" install --quiet 'transformers==5.24.0'
"$folder/4.57.3/bin/pip" install --quiet 'transformers==4.57.3'
"$folder/5.24.0/bin/python" - "$folder" <<'END' 2> /dev/null
import json
import sys

from transformers import Qwen2MoeConfig, Qwen3MoeConfig

found = {}
for kind in (Qwen3MoeConfig, Qwen2MoeConfig):
    kind(num_experts=6).save_pretrained(f"{sys.argv[1]}/{kind.model_type}")
    held = json.load(open(f"{sys.argv[1]}/{kind.model_type}/config.json"))
    names = ("num_experts", "num_local_experts")
    found[kind.model_type] = {name: held[name] for name in names if name in held}
print("transformers 5.24.0 writes", found)
if found != {"qwen3_moe": {"num_local_experts": 6}, "qwen2_moe": {"num_experts": 6}}:
    sys.exit("changed")
END
"$folder/4.57.3/bin/python" - "$folder" <<'END' 2> /dev/null
import sys

from transformers import AutoConfig

read = AutoConfig.from_pretrained(f"{sys.argv[1]}/qwen3_moe").num_experts
print("transformers 4.57.3 reads", read, "experts of 6")
if read != 128:
    sys.exit("changed")
print("as stated")
END
