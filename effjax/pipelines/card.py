"""Model cards: the README.md of a saved pipeline, with the front matter that hubs read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from converters.hub import open_folder
from effjax.cost import weight_bytes
from effjax.forward import Forward, Params, parameter_count

if TYPE_CHECKING:
    from effjax.pipelines.base import BasePipeline, Origin

CARD = "README.md"


def model_card(
    pipe: BasePipeline, name: str, *, ask_hub: bool = False, token: str | bool | None = None
) -> str:
    """The card of a pipeline: what it is, what was done to it, how to load it.

    Args:
        pipe: the pipeline.
        name: of its directory or repository.
        ask_hub: fetch the card of the model it was made of, which tells the license; else only one
            that is on this machine is read.
        token: for a private repository.
    """
    from huggingface_hub import ModelCardData  # slow to import

    recipe, origin = pipe.forward.recipe, pipe.origin
    methods = list(dict.fromkeys(method for method, _ in recipe))
    matter = ModelCardData(
        library_name="effjax",
        pipeline_tag=pipe.TASK,
        tags=["effjax", "jax", *methods],
        base_model=origin.model if origin is not None and origin.public else None,
        **_license(origin, ask_hub=ask_hub, token=token),
    )
    made_of = ""
    if origin is not None and origin.public:
        made_of = f", made of `{origin.model}` at commit `{origin.revision}`"
    plans = "\n\n".join(f"{method}\n{plan.describe()}" for method, plan in recipe)
    family = pipe.family
    parts = {name: pipe.component(name) for name in family.kinds}
    rows = "\n".join(
        _row(name, *parts[name]) for name in family.loaded_models if parts[name] is not None
    )
    beside = [
        name for name, kind in family.kinds.items() if kind != "model" and parts[name] is not None
    ]
    with_them = f"\nBeside them: {', '.join(beside)}.\n" if beside else ""
    told = f"\n## Methods\n\n```\n{plans}\n```\n" if recipe else ""
    return f"""---
{matter.to_yaml().strip()}
---

# {name}

A `{type(pipe).__name__}` of effjax (`{family.name}`){made_of}.

| component | model | parameters | dtype | computed in | bytes of weights |
|---|---|---|---|---|---|
{rows}
{with_them}{told}
## How to load it

```python
import effjax

pipe = effjax.pipeline("{name}")
```
"""


def _row(name: str, forward: Forward, params: Params) -> str:
    """A model's line in the table of components."""
    config = forward.config
    return (
        f"| {name} | `{forward.model.__name__}` | {parameter_count(params):,} | "
        f"{config.param_dtype} | {config.dtype} | {weight_bytes(params):,} |"
    )


def _license(origin: Origin | None, *, ask_hub: bool, token: str | bool | None) -> dict[str, Any]:
    """What the card of the model says of its license, if it can be had."""
    from huggingface_hub import ModelCard

    if origin is None:
        return {}
    try:
        folder = open_folder(
            origin.model, revision=origin.revision, token=token, local_files_only=not ask_hub
        )
        found = folder.fetch(CARD)
        data = ModelCard.load(found).data.to_dict() if found is not None else {}
    except Exception:  # gone, or a card that is no YAML: neither is a reason not to save
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if key in data}
