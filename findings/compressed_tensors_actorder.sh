#!/usr/bin/env bash
# Versions: compressed-tensors 0.18.0 writes, 0.20.0 reads; torch 2.13.0; Python 3.11 or newer.
# Expected: a quantization config that one version writes is read by a later one, as the checkpoints
#   that it describes stay what they are.
# Behavior: the description of a layer whose inputs have an order of their own ("group"), as GPTQ
#   makes it, is refused from 0.19.0 on; 0.18.0 announces that.
# Output seen:
#   0.18.0 wrote "actorder": "group"
#   0.20.0 refuses: actorder='group' has been removed
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'compressed-tensors==0.18.0'
"$folder/venv/bin/python" - "$folder/layer.json" <<'END'
import json
import sys
from pathlib import Path

from compressed_tensors.quantization import QuantizationArgs

layer = QuantizationArgs(num_bits=4, strategy="group", group_size=128, actorder="group")
written = layer.model_dump_json()
Path(sys.argv[1]).write_text(written)
print(f'0.18.0 wrote "actorder": "{json.loads(written)["actorder"]}"')
END
"$folder/venv/bin/pip" install --quiet 'compressed-tensors==0.20.0'
"$folder/venv/bin/python" - "$folder/layer.json" <<'END'
import sys
from pathlib import Path

from compressed_tensors.quantization import QuantizationArgs

refused = "actorder='group' has been removed"
try:
    QuantizationArgs.model_validate_json(Path(sys.argv[1]).read_text())
except ValueError as error:
    if refused not in str(error):
        raise
    print(f"0.20.0 refuses: {refused}")
else:
    raise SystemExit("changed: 0.20.0 reads it")
print("as stated")
END
