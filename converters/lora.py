"""LoRA files: adapters of PEFT, diffusers, Kohya's scripts and ComfyUI, by a model's own names.

    PEFT, diffusers    transformer.transformer_blocks.0.attn.to_q.lora_A.weight  (and lora_B)
    Kohya              lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight  (lora_up, alpha)
    ComfyUI            diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight

The names in front of these ends are those of a layout that the model's converter knows. A layer
that is a part of a fused one has the same `down` and its rows of `up`, or its columns of `down`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from converters.checkpoint import SUFFIXES, open_checkpoint
from converters.family import family_of_config
from converters.hub import open_folder, resolve
from converters.names import LAYOUTS, Piece
from effjax.fields import naming
from effjax.forward import Forward, flatten_params
from effjax.methods.adapters.lora import Adapter
from effjax.storage import Tensor, read_json
from effjax.storage.reading import metadata

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_model.bin")
_SETTINGS = "adapter_config.json"  # of PEFT, beside the file
_METADATA = "lora_adapter_metadata"  # of diffusers, in the file

# Prefixes of names, by the component of a pipeline. Kohya's scripts and ComfyUI call T5 the third
# text encoder, also where FLUX has it as the second.
_COMPONENTS = {
    "transformer": (
        *("transformer.", "lora_transformer_"),
        *("diffusion_model.", "model.diffusion_model.", "lora_unet_"),
    ),
    "text_encoder": (
        *("text_encoder.", "lora_te_", "lora_te1_"),
        "text_encoders.clip_l.transformer.",
    ),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_", "text_encoders.clip_g.transformer."),
    "text_encoder_3": ("text_encoder_3.", "lora_te3_", "text_encoders.t5xxl.transformer."),
}
_WRAPPER = "base_model.model."  # of PEFT
_DOWN = (".lora_A.weight", ".lora_down.weight", ".lora_A.default.weight", ".lora.down.weight")
_UP = (".lora_B.weight", ".lora_up.weight", ".lora_B.default.weight", ".lora.up.weight")
_ALPHA = ".alpha"
_OTHER_KINDS = {  # by what stands in a name
    r"\.dora_scale$|lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_": "OFT",
    r"\.lora_embedding_": "embeddings",
    r"\.lora_B(\.default)?\.bias$": "biases",
    r"\.diff(_b)?$": "whole weights",
}
_MOVES_WEIGHTS = ("pissa", "olora", "corda")  # ways to begin that change the model's weights too


def load_lora(
    source: str | os.PathLike,
    forward: Forward,
    *,
    component: str = "transformer",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Adapter:
    """Read a LoRA file as the factors of a model's layers, for `effjax.methods.lora`.

    alpha / rank (alpha / sqrt(rank) with PEFT's `use_rslora`) is multiplied into `up`. Alpha comes
    from the tensors, from the metadata that diffusers writes, or from an adapter_config.json beside
    the file, patterns included; without any it equals the rank, as in diffusers.

    Args:
        source: the file, a directory with one, or a hub repository ("owner/name", or
            "owner/name/file.safetensors").
        forward: of the model that it changes.
        component: which model of a pipeline that is; files may change several. Those of Kohya's
            scripts and ComfyUI have T5 as "text_encoder_3", for FLUX too.
        revision, token, cache_dir, local_files_only: of the hub, as in `from_pretrained`.

    Returns:
        (down float32[I, r], up float32[r, O]) by path of the layer.

    Warns:
        UserWarning: if the file changes other components too.

    Raises:
        ValueError: for a file that cannot be found or read, of another kind (DoRA, LoHa, ...), or
            of another model; the message lists all names that do not fit. For one that changes
            copies of a weight, which the model has once, in different ways.
    """
    remote = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    path, settings = _open(source, component, remote)
    tensors = open_checkpoint(path)
    _refuse_other_kinds(path, tensors)
    own, others = _of_component(tensors, component)
    if not own:
        raise ValueError(
            f"{path} changes no {component}; it changes {', '.join(others) or 'nothing known'}"
        )
    if others:
        warnings.warn(
            f"{path.name} changes {', '.join(others)} too: read these with component=",
            stacklevel=2,
        )
    pairs = _pairs(path, own)
    pieces = _pieces(forward, pairs)
    if unknown := [name for name in pairs if name not in pieces]:
        raise ValueError(
            f"{path} is no adapter of this {forward.model.__name__}: {len(unknown)} of its "
            f"{len(pairs)} layers are not in the model:\n  " + "\n  ".join(unknown)
        )
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, pair in pairs.items():
        down, up = (each.read().astype(np.float32) for each in (pair.down, pair.up))
        up = up * np.float32(settings.scale(name, down.shape[0], pair.alpha))
        for piece in pieces[name]:
            target, factors = piece.target.removesuffix(".kernel"), _cut(piece, down, up)
            if not all(map(np.array_equal, found.setdefault(target, factors), factors)):
                raise ValueError(
                    f"{path} changes {target} twice, in different ways ({name} and another): this "
                    f"model has that weight once"
                )
    return found


class _Pair(NamedTuple):
    """The tensors of one layer: down [r, in], up [out, r], alpha if the file has it."""

    down: Tensor
    up: Tensor
    alpha: float | None


class _Settings(NamedTuple):
    """What stands beside the tensors: alphas by patterns of names."""

    alpha: float | None = None
    patterns: Mapping[str, float] = MappingProxyType({})
    root: bool = False

    def scale(self, name: str, rank: int, alpha: float | None) -> float:
        """alpha / rank of a layer."""
        if alpha is None:
            matching = (p for p in self.patterns if re.fullmatch(rf"(.*\.)?({p})", name))
            alpha = next((self.patterns[pattern] for pattern in matching), self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.root else rank)


def _open(
    source: str | os.PathLike, component: str, remote: Mapping[str, Any]
) -> tuple[Path, _Settings]:
    """The file, and the settings of PEFT or diffusers with it."""
    given = Path(os.path.expanduser(source))
    beside: dict[str, Any] = {}
    if given.is_file() or str(source).endswith(SUFFIXES):
        path = given if given.is_file() else resolve(source, **remote)
        settings: Path | None = path.parent / _SETTINGS
        if not given.is_file():  # of the hub, where only the file itself was asked for
            owner, name, *inner = str(source).split("/")
            folder = open_folder(f"{owner}/{name}", **remote)
            settings = folder.fetch("/".join([*inner[:-1], _SETTINGS]))
        if path.name in FILES and settings is not None and settings.is_file():
            beside = read_json(settings)
    else:
        folder = open_folder(source, **remote)
        files = [file for name in FILES if (file := folder.fetch(name)) is not None]
        if not files:
            raise ValueError(
                f"{source} has no LoRA file; looked for {', '.join(FILES)}. For a file of another "
                f"name, give the file itself."
            )
        path = files[0]
        if folder.has(_SETTINGS):
            beside = folder.read(_SETTINGS)
    with naming(path):
        if not beside and path.name.endswith(".safetensors"):
            beside = _of_metadata(metadata(path).get(_METADATA), component)
        return path, _settings(beside)


def _of_metadata(text: str | None, component: str) -> dict[str, Any]:
    """What diffusers says of a component in a file: names with the component in front, or bare."""
    said = json.loads(text) if text else {}
    starts = [key.removesuffix("lora_alpha") for key in said if key.endswith(".lora_alpha")]
    if not starts:
        return said
    start = f"{component}." if f"{component}." in starts or len(starts) > 1 else starts[0]
    return {key[len(start) :]: value for key, value in said.items() if key.startswith(start)}


def _settings(said: Mapping[str, Any]) -> _Settings:
    """Those that matter of a configuration of PEFT.

    Raises:
        ValueError: for other kinds of adapters, and for patterns that are none.
    """
    if said.get("use_dora"):
        raise ValueError("this is DoRA, which has magnitudes besides; it is not read")
    begin = said.get("init_lora_weights")
    if isinstance(begin, str) and begin.startswith(_MOVES_WEIGHTS):
        raise ValueError(
            f"training began with {begin!r}, which changes the model's own weights too: convert it "
            f"to plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )
    alpha, patterns = said.get("lora_alpha"), dict(said.get("alpha_pattern") or {})
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"alpha_pattern {pattern!r} is no regular expression: {error}"
            ) from None
    return _Settings(
        None if alpha is None else float(alpha),
        {pattern: float(value) for pattern, value in patterns.items()},
        bool(said.get("use_rslora")),
    )


def _refuse_other_kinds(path: Path, names: Iterable[str]) -> None:
    for name in names:
        for mark, kind in _OTHER_KINDS.items():
            if re.search(mark, name):
                raise ValueError(
                    f"{path} holds {kind} ({name}), and only LoRA's pairs of matrices are read: "
                    f"merge it with the tool that made it, and load the model"
                )


def _of_component(
    tensors: Mapping[str, Tensor], component: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of one component without its prefix, and which other components there are."""
    own, others = {}, []
    for name, tensor in tensors.items():
        bare = name.removeprefix(_WRAPPER)
        prefixes = [
            (part, prefix)
            for part, known in _COMPONENTS.items()
            for prefix in known
            if bare.startswith(prefix)
        ]
        part, prefix = max(prefixes, key=lambda each: len(each[1]), default=(component, ""))
        if part == component:
            own[bare.removeprefix(prefix).removeprefix(_WRAPPER)] = tensor
        elif part not in others:
            others.append(part)
    return own, others


def _pairs(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, _Pair]:
    """The tensors by layer."""
    found: dict[str, dict[str, Any]] = {}
    strange = []
    for name, tensor in tensors.items():
        for part, ends in (("down", _DOWN), ("up", _UP), ("alpha", (_ALPHA,))):
            end = next((end for end in ends if name.endswith(end)), None)
            if end is not None:
                found.setdefault(name.removesuffix(end), {})[part] = tensor
                break
        else:
            strange.append(name)
    for name, held in found.items():
        if not {"down", "up"} <= set(held):
            strange.append(f"{name}: only {', '.join(held)}")
        elif len(held["down"].shape) != 2 or held["down"].shape[:1] != held["up"].shape[1:]:
            shapes = f"{list(held['down'].shape)} and {list(held['up'].shape)}"
            strange.append(f"{name}: {shapes} are no [rank, in] and [out, rank]")
    if strange:
        raise ValueError(f"{path} is no LoRA file that is read:\n  " + "\n  ".join(strange))
    return {
        name: _Pair(
            held["down"],
            held["up"],
            float(held["alpha"].read().reshape(())) if "alpha" in held else None,
        )
        for name, held in found.items()
    }


def _pieces(forward: Forward, names: Iterable[str]) -> dict[str, tuple[Piece, ...]]:
    """The parameters of each layer of the file, in the layout that knows most of the names."""
    names = list(names)
    leaves = flatten_params(forward.abstract_params())
    targets = {name: leaf for name, leaf in leaves.items() if name.endswith("kernel")}
    best: dict[str, tuple[Piece, ...]] = {}
    for table in family_of_config(forward.config).tables.values():
        rules = [rule for rule in table.rules if rule.source.endswith(".weight")]
        weights = dataclasses.replace(table, rules=tuple(rules))
        known = {}
        for source, pieces in weights.bind(targets).sources.items():
            layer = source.removesuffix(".weight")
            plain = [each for each in pieces if each.layout in _MATRICES and each.place is None]
            if len(plain) == len(pieces):
                known |= dict.fromkeys((layer, layer.replace(".", "_")), pieces)
        found = {name: known[name] for name in names if name in known}
        best = max(best, found, key=len)
    return best


_MATRICES = (LAYOUTS["linear"], LAYOUTS["swapped-linear"])


def _cut(piece: Piece, down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors of a parameter, from those of the tensor that holds it."""
    if piece.axis == 0:
        return np.ascontiguousarray(down.T), np.ascontiguousarray(piece.read(up))
    whole = Piece(piece.source, piece.target, LAYOUTS["linear"], *piece[3:])
    return np.ascontiguousarray(whole.read(down)), np.ascontiguousarray(piece.layout.forward(up))
