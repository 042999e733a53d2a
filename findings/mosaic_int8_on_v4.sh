#!/usr/bin/env bash
# Versions: jax 0.10.2, jaxlib 0.10.2, libtpu 0.0.42.1, compiling ahead of time on a machine without a
#   TPU; Python 3.11 or newer.
# Expected: a product of int8 matrices that XLA compiles for a TPU v4 also compiles in a Pallas kernel,
#   as it does for a v5e.
# Behavior: for a v4 the kernel's compiler refuses the type; the same product outside of a kernel
#   compiles.
# Output seen:
#   v5e XLA: compiled
#   v5e kernel: compiled
#   v4 XLA: compiled
#   v4 kernel: Unsupported matmul RHS type
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'libtpu==0.0.42.1'
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost
export TPU_ACCELERATOR_TYPE=v5litepod-4 ALLOW_MULTIPLE_LIBTPU_LOAD=1
"$folder/venv/bin/python" - 2>"$folder/log" <<'END' || { tail "$folder/log" >&2; exit 1; }
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding


def product(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.int32)


def kernel(a, b):
    def body(a_ref, b_ref, out_ref):
        out_ref[...] = product(a_ref[...], b_ref[...])

    return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct((128, 128), jnp.int32))(a, b)


found = []
for chip, topology in (("v5e", "v5e:2x2"), ("v4", "v4:2x2x1")):
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    place = SingleDeviceSharding(description.devices[0])
    matrix = jax.ShapeDtypeStruct((128, 128), jnp.int8, sharding=place)
    for name, function in (("XLA", product), ("kernel", kernel)):
        try:
            jax.jit(function).lower(matrix, matrix).compile()
            found.append("compiled")
        except Exception as error:
            refused = "Unsupported matmul RHS type"
            found.append(refused if refused in str(error) else repr(error))
        print(f"{chip} {name}: {found[-1]}")
if found != ["compiled", "compiled", "compiled", "Unsupported matmul RHS type"]:
    raise SystemExit("changed")
print("as stated")
END
