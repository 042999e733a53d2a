#!/usr/bin/env bash
# Versions: jax 0.10.2 and jaxlib 0.10.2, the same in 0.12.0.1; Python 3.11 or newer; a CPU with
#   products of bfloat16 (avx512_bf16 or amx_bf16 among its flags).
# Expected: one row times a matrix of bfloat16 needs no more memory than eight rows, whether or not the
#   matrix is given transposed.
# Behavior: eight rows take 0.1 MiB beside their operands, one row a copy of the whole matrix in
#   float32 (and 2 to 5 times as long as eight); eight rows times the transposed matrix copy it too.
# Output seen:
#   8 rows x [1024, 4096]: no copy
#   1 row x [1024, 4096]: a copy in float32
#   8 rows x [4096, 1024] transposed: a copy in float32
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

COPY = 4 * 1024 * 4096  # bytes of the matrix in float32


def product(x, w):
    return jnp.dot(x, w, preferred_element_type=jnp.float32)


def extra(program, rows, shape):
    operands = [jax.ShapeDtypeStruct(each, jnp.bfloat16) for each in ((rows, 1024), shape)]
    compiled = jax.jit(program).lower(*operands).compile()
    return compiled.memory_analysis().temp_size_in_bytes


cases = {
    "8 rows x [1024, 4096]": (product, 8, (1024, 4096)),
    "1 row x [1024, 4096]": (product, 1, (1024, 4096)),
    "8 rows x [4096, 1024] transposed": (lambda x, w: product(x, w.T), 8, (4096, 1024)),
}
found = []
for name, case in cases.items():
    found.append("a copy in float32" if extra(*case) >= COPY else "no copy")
    print(f"{name}: {found[-1]}")
if found != ["no copy", "a copy in float32", "a copy in float32"]:
    raise SystemExit("changed")
print("as stated")
END
