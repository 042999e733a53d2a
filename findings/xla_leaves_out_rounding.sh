#!/usr/bin/env bash
# Versions: jax 0.10.2 and jaxlib 0.10.2, the same in 0.12.0.1; Python 3.11 or newer; a CPU.
# Expected: a jitted function that casts to bfloat16, multiplies and casts back gives what it gives
#   without jit, since both casts are written down. Models that were trained or released with such
#   casts (a time of FLUX becomes 1000 t in bfloat16) can then be followed to the last digit.
# Behavior: XLA keeps the product in float32: rounding that is written as casts to fewer bits and
#   back is left out. `jax.lax.reduce_precision` is never left out.
# Output seen:
#   1000 x 0.701 in bfloat16: 700.0, under jit 699.21875, by reduce_precision under jit 700.0
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import jax
import jax.numpy as jnp


def by_casts(t):
    return (t.astype(jnp.bfloat16) * jnp.asarray(1000, jnp.bfloat16)).astype(jnp.float32)


def by_name(t):
    def cut(x):
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    return cut(cut(t) * 1000)


t = jnp.float32(0.701)
found = [float(by_casts(t)), float(jax.jit(by_casts)(t)), float(jax.jit(by_name)(t))]
print(
    f"1000 x 0.701 in bfloat16: {found[0]}, under jit {found[1]}, "
    f"by reduce_precision under jit {found[2]}"
)
if found != [700.0, 699.21875, 700.0]:
    raise SystemExit("changed")
print("as stated")
END
