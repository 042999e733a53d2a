#!/usr/bin/env bash
# Versions: jax 0.10.2 and jaxlib 0.10.2, the same in 0.12.0.1; Python 3.11 or newer.
# Expected: lax.platform_dependent keeps a Pallas kernel for TPU apart from plain code for CPU, so
#   the function is exported for ["cpu", "tpu"], as it is for each of the two alone.
# Behavior: for both at once the kernel's branch is lowered for the CPU too, and the export fails
#   with a message about a CPU kernel that the function does not have.
# Output seen:
#   ['cpu'] exported
#   ['tpu'] exported
#   ['cpu', 'tpu'] ValueError: Only interpret mode is supported on CPU backend.
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import jax
import jax.numpy as jnp
from jax import export, lax
from jax.experimental import pallas as pl


def kernel(x):
    def body(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


@jax.jit
def double(x):
    return lax.platform_dependent(x, tpu=kernel, default=lambda x: 2 * x)


shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
found = []
for platforms in (["cpu"], ["tpu"], ["cpu", "tpu"]):
    try:
        export.export(double, platforms=platforms)(shape)
        found.append("exported")
    except ValueError as error:
        found.append(f"ValueError: {error}")
    print(platforms, found[-1])
refused = "ValueError: Only interpret mode is supported on CPU backend."
if found != ["exported", "exported", refused]:
    raise SystemExit("changed")
print("as stated")
END
