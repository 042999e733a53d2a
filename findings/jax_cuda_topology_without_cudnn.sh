#!/usr/bin/env bash
# Versions: jax, jaxlib, jax-cuda13-plugin and jax-cuda13-pjrt 0.11.2; Python 3.12 or newer; on Linux
#   for x86-64 without a GPU and without its driver. Downloads half a gigabyte.
# Expected: compiling for a GPU takes a GPU; or, if a description of one will do, as the option
#   target_config of topologies.get_topology_desc says, JAX names what is missing.
# Behavior: with the plugin and an assembler alone, JAX says that topologies are not implemented for
#   cuda, as if the plugin were none. What is missing is cuDNN, which only a check at the start wants:
#   with JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 the same call compiles for an H100, without CUDA's
#   libraries, driver or GPU, if it is given a topology ("1x1x1") beside the description.
# Output seen:
#   as installed: topology not implemented for cuda
#   without the check: an executable for NVIDIA H100 80GB HBM3
#   without a topology: Cannot create topology without an explicit topology shape or without a client
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.11.2' 'jaxlib==0.11.2'
export PIP_NO_DEPS=1  # neither cuDNN nor CUDA's other libraries
"$folder/venv/bin/pip" install --quiet 'jax-cuda13-plugin==0.11.2' 'jax-cuda13-pjrt==0.11.2'
"$folder/venv/bin/pip" install --quiet 'nvidia-cuda-nvcc==13.5.37' 'nvidia-nvvm==13.5.37' 'nvidia-nvjitlink==13.5.37'
cat > "$folder/compile.py" <<'END'
import sys

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable, topologies

gpu = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  fpus_per_core: 128 core_count: 132 clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
options = {"topology": "1x1x1"} if sys.argv[1] == "topology" else {}
try:
    found = topologies.get_topology_desc("", platform="cuda", target_config=gpu, **options)
    place = jax.sharding.SingleDeviceSharding(found.devices[0])
    x = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16, sharding=place)
    compiled = jax.jit(lambda x: jnp.tanh(x @ x)).lower(x).compile()
    code, *_ = serialize_executable.serialize(compiled)
    print(f"{'an executable' if code else 'nothing'} for {found.devices[0].device_kind}")
except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
    print(str(error).splitlines()[0].removeprefix("FAILED_PRECONDITION: "))
END
export JAX_PLATFORMS=
python="$folder/venv/bin/python"
installed=$("$python" "$folder/compile.py" topology 2> /dev/null)
export JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1
skipped=$("$python" "$folder/compile.py" topology)
shapeless=$("$python" "$folder/compile.py" none)
echo "as installed: $installed"
echo "without the check: $skipped"
echo "without a topology: $shapeless"
"$python" - "$installed" "$skipped" "$shapeless" <<'END'
import sys

stated = [
    "topology not implemented for cuda",
    "an executable for NVIDIA H100 80GB HBM3",
    "Cannot create topology without an explicit topology shape or without a client",
]
if sys.argv[1:] != stated:
    raise SystemExit("changed")
print("as stated")
END
