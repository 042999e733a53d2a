"""What every kernel takes of a TPU, from programs compiled ahead of time, without a TPU.

    python -m experiments.kernels.tpu_table      (needs the `tpu` extra)

Fast memory (VMEM) as the compiler allots it, the work and the traffic that kernels declare, and the
time these would take at the rates that the compiler itself reckons with. Nothing is timed, and the
rates know nothing of faster int8 products.
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

import jax

from experiments import report, tpu
from experiments.kernels.cases import CASES

# FLOP/s of bfloat16 products and bytes/s of memory, which `cost_analysis` of a lone 4096^3 product
# and of a copy of 512 MiB imply.
RATES = {
    "v5e": (1.56e14, 7.4e11),
    "v5p": (3.4e14, 2.35e12),
    "v6e": (5.9e14, 1.64e12),
    "tpu7x": (7.9e14, 3.7e12),
}

_CONFIG = re.compile(r'custom_call_target="tpu_custom_call".*backend_config=(\{.*\})')


def kernels(program: str) -> list[dict[str, Any]]:
    """Declared cost and allotted memory of every kernel in a compiled program."""
    found = []
    for line in program.splitlines():
        if match := _CONFIG.search(line):
            config, _ = json.JSONDecoder().raw_decode(match[1])
            declared = config["custom_call_config"]["cost_estimate"]
            # Memory space 1 is VMEM.
            spaces = config["used_scoped_memory_configs"]
            found.append(
                {
                    "flops": int(declared["flops"]),
                    "bytes": int(declared["bytes_accessed"]),
                    "vmem": sum(int(s["size"]) for s in spaces if s["memory_space"] == "1"),
                }
            )
    return found


def row(chip: str, name: str) -> dict[str, Any]:
    """Compile one case for one chip."""
    function, operands = CASES[name]
    named = jax.jit(lambda *operands: function(*operands, implementation="pallas_tpu"))
    program = named.lower(*tpu.on_chip(chip, operands)).compile()
    own = kernels(program.as_text())
    if not own:
        raise SystemExit(f"{name}: the program for {chip} has no kernel in it")
    flops, moved = (sum(kernel[what] for kernel in own) for what in ("flops", "bytes"))
    rate, bandwidth = RATES[chip]
    return {
        "kernel": name,
        "chip": chip,
        "GFLOP": flops / 1e9,
        "memory_MB": moved / 1e6,
        "VMEM_KiB": max(kernel["vmem"] for kernel in own) / 1024,
        "roofline_microseconds": 1e6 * max(flops / rate, moved / bandwidth),
        "bound_by": "products" if flops / rate > moved / bandwidth else "memory",
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default=",".join(tpu.CHIPS))
    arguments = parser.parse_args(argv)
    rows = []
    for name in CASES:
        for chip in arguments.chips.split(","):
            rows.append(row(chip, name))
            print(report.markdown(rows[-1:]).splitlines()[-1], flush=True)
    report.write(
        "kernels_tpu",
        title="Kernels compiled ahead of time for TPUs",
        command=f"python -m experiments.kernels.tpu_table --chips {arguments.chips}",
        per_call=rows,
    )


if __name__ == "__main__":
    main()
