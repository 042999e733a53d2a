#!/usr/bin/env bash
# Versions: jax 0.10.2 and jaxlib 0.10.2, the same in 0.12.0.1; Python 3.11 or newer; a CPU with
#   products of bfloat16 (avx512_bf16 or amx_bf16 among its flags).
# Expected: a product of bfloat16 that is summed in float32 (preferred_element_type) can be
#   transposed like any other array.
# Behavior: it compiles, and fails when it runs: the transposition is folded into the product, and
#   the form that comes out is one that the CPU has no program for. Rounded to bfloat16 first, or kept
#   as it is, it runs.
# Output seen:
#   as it is: runs
#   rounded, then transposed: runs
#   transposed: UNIMPLEMENTED: Unsupported element type for DotThunk::Execute: BF16 x BF16 = F32
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

x = jnp.ones((8, 896), jnp.bfloat16)
w = jnp.ones((896, 5000), jnp.bfloat16)


def product(x, w):
    return jnp.dot(x, w, preferred_element_type=jnp.float32)


programs = {
    "as it is": product,
    "rounded, then transposed": lambda x, w: product(x, w).astype(jnp.bfloat16).T,
    "transposed": lambda x, w: product(x, w).T,
}
found = []
for name, program in programs.items():
    compiled = jax.jit(program).lower(x, w).compile()
    try:
        jax.block_until_ready(compiled(x, w))
        found.append("runs")
    except jax.errors.JaxRuntimeError as error:
        found.append(str(error).splitlines()[0])
    print(f"{name}: {found[-1]}")
refused = "UNIMPLEMENTED: Unsupported element type for DotThunk::Execute: BF16 x BF16 = F32"
if found != ["runs", "runs", refused]:
    raise SystemExit("changed")
print("as stated")
END
