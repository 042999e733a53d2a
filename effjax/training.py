"""A training loop that can be interrupted and resumed.

`train` takes a loss, an optax transform and an iterator of batches. It writes orbax checkpoints,
and a second run with the same folder goes on where the first one stopped. Methods that train
(`cskv.fit`) use it, and so do the tiny models that come with the library. It knows nothing about
methods: their parameters can be trained by any other loop as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Key
from tqdm.auto import trange

from effjax.compat import relaxed_promotion
from effjax.context import PyTree
from effjax.fields import naming
from effjax.forward import Params
from effjax.storage import read_json

Loss = Callable[..., jax.Array]
SAVED = 200  # steps from one checkpoint to the next


class Trained(NamedTuple):
    """The result of `train`.

    Attributes:
        params: the parameters after the last step.
        average: their exponential moving average, with the decay min(0.999, (1 + n) / (10 + n)) at
            step n: after some thousand steps it reaches back about a thousand steps.
        log: "runs", a list with the first step and the number of steps of each run; "loss", the
            mean loss of every 50 steps, by the last of them; "seconds" of all runs together.
    """

    params: Params
    average: Params
    log: dict[str, Any]


def same_run(folder: Path, said: Mapping[str, str]) -> None:
    """Note in a new folder what its files are made of; of another run, find that it is the same.

    Args:
        folder: made if it does not exist.
        said: what the files depend on, by name; of arrays a `digest`.

    Raises:
        ValueError: if the files are made of something else, or nobody noted of what, and for a
            file in the place of the folder.
    """
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "made_of.json"
    if not file.is_file():
        if others := sorted(path.name for path in folder.iterdir() if path.suffix != ".partial"):
            raise ValueError(
                f"{folder} holds {others[0]}, and no {file.name} says what that was made of: give "
                f"another folder"
            )
        write_whole(file, lambda partial: partial.write(json.dumps(said, indent=2).encode()))
        return
    with naming(file):
        noted = read_json(file)
    for name in sorted({*noted, *said}):
        if noted.get(name) != said.get(name):
            raise ValueError(
                f"what {folder} holds was made with {name} {noted.get(name)}, and now it is "
                f"{said.get(name)}: give the same as before, or another folder"
            )


def _check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is no folder: checkpoints need one, or the name of a new")


def digest(*trees: PyTree) -> str:
    """A short name for the values of arrays."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        value = np.asarray(leaf)
        found.update(f"{value.dtype}{value.shape}".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()[:16]


def write_whole(file: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file that has its name once it is complete."""
    partial = file.with_name(f"{file.name}.partial")
    with open(partial, "wb") as opened:
        write(opened)
    os.replace(partial, file)


def train(
    loss: Loss,
    params: Params,
    batches: Callable[[int], Iterator[PyTree]],
    *,
    steps: int,
    key: Key[Array, ""],
    transform: optax.GradientTransformation,
    constants: tuple[PyTree, ...] = (),
    checkpoints: Path | None = None,
    progress: bool = True,
) -> Trained:
    """Train, from the beginning or from the last checkpoint.

    A step is one compiled program: the loss and its gradients, the update, and the moving average.
    A run that resumes sees the batches and the random numbers that an uninterrupted run would have
    seen.

    Args:
        loss: (params, batch, key, *constants) -> float32[].
        params: initial parameters.
        batches: a function of the number of a step. It gives an iterator over the batches from that
            step on.
        steps: number of steps in all, those of earlier runs included.
        key: PRNG key. The key of a step is `jax.random.fold_in(key, step)`.
        transform: the optax transform, such as `optax.adamw(1e-3)`.
        constants: further arguments of the loss that are not trained, such as the parameters of the
            model itself.
        checkpoints: folder of the checkpoints, made if it does not exist. A checkpoint is written
            every 200 steps and after the last one, and the last two are kept. With None nothing is
            written.
        progress: show a progress bar.

    Raises:
        ValueError: if `steps` is below 1, or `checkpoints` is a file.
    """
    if steps < 1:
        raise ValueError(f"training takes 1 or more steps, got {steps}")
    if checkpoints is not None:
        _check_folder(Path(checkpoints))
    carry = {"params": params, "average": params, "optimizer": transform.init(params)}
    log: dict = {"runs": [], "loss": {}, "seconds": 0.0}
    start, manager = 0, None
    if checkpoints is not None:
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        manager = ocp.CheckpointManager(Path(checkpoints).absolute(), options=options)
        start = manager.latest_step() or 0
    try:
        if manager is not None and start:
            parts = ocp.args.Composite(
                carry=ocp.args.StandardRestore(carry), log=ocp.args.JsonRestore()
            )
            restored = manager.restore(start, args=parts)
            carry, log = restored["carry"], restored["log"]
        if start < steps:
            # A resumed run may shorten or lengthen the learning-rate schedule: note each.
            log.setdefault("runs", []).append({"first_step": start, "steps": steps})
        step_once = _step(loss, transform)
        began, recent = time.monotonic() - log["seconds"], []
        data = batches(start)
        bar = trange(start, steps, initial=start, total=steps, unit="step", disable=not progress)
        for step in bar:
            carry, value = step_once(carry, next(data), key, np.int32(step), constants)
            recent.append(value)
            done = step + 1
            if done % 50 == 0 or done == steps:
                log["loss"][str(done)] = round(float(np.mean(jax.device_get(recent))), 5)
                log["seconds"] = round(time.monotonic() - began, 1)
                bar.set_postfix(loss=log["loss"][str(done)])
                recent = []
            if manager is not None and (done % SAVED == 0 or done == steps):
                parts = ocp.args.Composite(
                    carry=ocp.args.StandardSave(carry), log=ocp.args.JsonSave(log)
                )
                manager.save(done, args=parts)
    finally:
        if manager is not None:
            manager.close()
    return Trained(carry["params"], carry["average"], log)


def _step(loss: Loss, transform: optax.GradientTransformation) -> Callable:
    @jax.jit
    def step(
        carry: dict, batch: PyTree, key: Array, number: jax.Array, constants: tuple
    ) -> tuple[dict, jax.Array]:
        params, own = carry["params"], jax.random.fold_in(key, number)
        value, gradients = jax.value_and_grad(loss)(params, batch, own, *constants)
        with relaxed_promotion():
            updates, state = transform.update(gradients, carry["optimizer"], params)
            params = optax.apply_updates(params, updates)
            decay = jnp.minimum(0.999, (1 + number) / (10 + number))
            average = optax.incremental_update(params, carry["average"], 1 - decay)
        return {"params": params, "average": average, "optimizer": state}, value

    return step
