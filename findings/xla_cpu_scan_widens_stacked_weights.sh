#!/usr/bin/env bash
# Versions: jax 0.10.2 and jaxlib 0.10.2 (jax 0.12.0.1 does not any more); Python 3.11 or newer; a CPU
#   with products of bfloat16 (avx512_bf16 or amx_bf16 among its flags).
# Expected: scanning over stacked layers of bfloat16 needs memory for one layer at a time, beside the
#   weights: that is why layers are stacked.
# Behavior: the whole stack is cast to float32 before the loop and held there, twice the weights' bytes.
#   Stacks of float32 are used as they are.
# Output seen:
#   bfloat16: temporaries of 2.1 x the weights
#   float32: temporaries of 0.0 x the weights
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
    echo "this CPU has no products of bfloat16: nothing to see"
    exit 0
fi
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import jax
import jax.numpy as jnp


def layers(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


found = []
for dtype in (jnp.bfloat16, jnp.float32):
    shapes = [jax.ShapeDtypeStruct(each, dtype) for each in ((24, 512, 512), (64, 512))]
    memory = jax.jit(layers).lower(*shapes).compile().memory_analysis()
    weights = 24 * 512 * 512 * jnp.dtype(dtype).itemsize
    found.append(memory.temp_size_in_bytes / weights)
    print(f"{jnp.dtype(dtype).name}: temporaries of {found[-1]:.1f} x the weights")
if not (found[0] >= 2 and found[1] < 0.5):
    raise SystemExit("changed")
print("as stated")
END
