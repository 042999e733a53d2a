#!/usr/bin/env bash
# Versions: jax 0.10.2 and jaxlib 0.10.2, the same in 0.12.0.1; Python 3.11 or newer; on a CPU.
# Expected: what serialize_executable.serialize gives for a compiled function can be loaded and run,
#   wherever the function's machine code came from.
# Behavior: of a function that the persistent compilation cache brought, the bytes hold no machine
#   code. They are shorter, nothing complains while they are made, and they cannot be loaded.
# Output seen:
#   compiled here: loaded, and it runs
#   from the cache: NOT_FOUND error while it is loaded: a function is not found
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2'
cat > "$folder/serialize.py" <<'END'
import sys

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
x = jnp.arange(8.0)
compiled = jax.jit(lambda x: jnp.sin(x) + 1).lower(x).compile()
try:
    loaded = serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
    same = bool(jnp.all(loaded(x) == compiled(x)))
    print("loaded, and it runs" if same else "loaded, with other results")
except jax.errors.JaxRuntimeError as error:
    found = "a function is not found" if "not found" in str(error) else str(error)
    print(f"{str(error).split(':')[0]} error while it is loaded: {found}")
END
export JAX_PLATFORMS=cpu
first=$("$folder/venv/bin/python" "$folder/serialize.py" "$folder/cache")
second=$("$folder/venv/bin/python" "$folder/serialize.py" "$folder/cache")
echo "compiled here: $first"
echo "from the cache: $second"
"$folder/venv/bin/python" - "$first" "$second" <<'END'
import sys

stated = ["loaded, and it runs", "NOT_FOUND error while it is loaded: a function is not found"]
if sys.argv[1:] != stated:
    raise SystemExit("changed")
print("as stated")
END
