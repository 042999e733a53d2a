"""What all pipelines share: transforms, saving, uploading, and a line that says what they are."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from effjax import recipe
from effjax.buckets import POWERS, Buckets, sizes_of
from effjax.executables import Executables
from effjax.fields import Checked
from effjax.forward import Forward, Params, parameter_count
from effjax.pipelines import arguments, families, recipes
from effjax.pipelines.card import CARD, model_card
from effjax.storage import new_directory, write_json
from effjax.transform import Pair

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"

AnyPipeline = TypeVar("AnyPipeline", bound="BasePipeline")
Method = TypeVar("Method", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Origin(Checked):
    """What a pipeline was loaded from, before it was compressed; nothing needs it to load again.

    Attributes:
        model: directory as it was given, or hub repository.
        revision: commit of the repository.
        variant: of the weight files.
    """

    model: str
    revision: str | None = None
    variant: str | None = None

    @property
    def public(self) -> bool:
        """Whether others can find it: on a hub, where it has a commit."""
        return self.revision is not None


@dataclasses.dataclass(frozen=True, repr=False)
class BasePipeline:
    """A model with everything that is needed to use it.

    Attributes:
        forward, params: the model, possibly transformed.
        origin: what the pipeline was loaded from; None if it was not loaded.
        buckets: sizes that shapes are rounded up to, see `effjax.buckets`: of tokens for texts, of
            batches for images. They are not saved.
        executables: compiled programs that run calls which they fit; None compiles all calls.
        family: the pipeline's entry in the table of pipeline classes; that of its model if None.

    Raises:
        ValueError: for buckets that are not valid, and for a model that no entry names.
    """

    forward: Forward
    params: Params
    origin: Origin | None = dataclasses.field(default=None, kw_only=True)
    buckets: Buckets = dataclasses.field(default=POWERS, kw_only=True)
    executables: Executables | None = dataclasses.field(default=None, kw_only=True, compare=False)

    family: Any = dataclasses.field(default=None, kw_only=True, repr=False)

    TASK: ClassVar[str]  # as hubs name it

    def __post_init__(self) -> None:
        sizes_of(self.buckets)
        if self.family is None:
            name, model = type(self).__name__, self.forward.model.__name__
            family = families.of_model(model, name)
            if family is None:
                raise ValueError(
                    f"no pipeline class of effjax.pipelines.families is a {name} of a {model}: "
                    f"give family="
                )
            object.__setattr__(self, "family", family)

    def transform(self: AnyPipeline, *transforms: Callable[[Forward, Params], Pair]) -> AnyPipeline:
        """Return a copy of this pipeline with a transformed model.

        Args:
            transforms: functions `(forward, params) -> (forward, params)`, applied in order.
        """
        forward, params = self.forward, self.params
        for each in transforms:
            forward, params = each(forward, params)
        return self.with_model(forward, params)

    def accelerate(self: AnyPipeline, speed: float | None = None) -> AnyPipeline:
        """Apply a recipe that was measured for this model; it holds for any number of steps.

            fast = pipe.accelerate(speed=1.8)
            images = fast("a red fox", key=key)
            print(fast.summary())

        Args:
            speed: images a second, as a multiple of the dense model's: the mildest recipe that
                reached it is taken. None takes the recommended one. What is reached on another
                machine, model or number of steps differs: `effjax bench` measures it.

        Raises:
            ValueError: for a model without a recipe, for a speed that none reaches, and for a
                pipeline that has a step cache already where the recipe has one.
        """
        speed = None if speed is None else arguments.scale("speed", speed)
        chosen = recipes.choose(self.forward.model.__name__, speed)
        transforms = chosen.transforms(self.params)
        recipes.check_one_step_cache(self.forward, transforms)
        return self.transform(*transforms)

    def with_model(self, forward: Forward, params: Params) -> Any:
        """A copy with another model; a pipeline of the class that the table has for its class.

        Raises:
            ValueError: for a model that no entry names.
        """
        if forward.model is self.forward.model:
            return dataclasses.replace(self, forward=forward, params=params, executables=None)
        family = families.of_model(forward.model.__name__)
        known = {each.__name__: each for each in _subclasses(BasePipeline)}
        if family is None or family.pipeline not in known:
            raise ValueError(
                f"no pipeline class of effjax.pipelines.families is of a {forward.model.__name__}"
            )
        made = known[family.pipeline]
        own = {field.name for field in dataclasses.fields(made)} - {"executables"}
        held = {name: getattr(self, name) for name in own if hasattr(self, name)}
        return made(**{**held, "forward": forward, "params": params, "family": family})

    def save(self, path: str | os.PathLike) -> None:
        """Save all components as one directory, which `effjax.pipeline` reads.

        The directory takes its name when it is complete. Its README.md is a model card, so you may
        upload the directory to a hub as it is.

        Raises:
            ValueError: if the path is taken, or for patches that no transform made.
        """
        path = Path(path)
        with new_directory(path) as directory:
            self._save(directory, path.name)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Upload what `save` writes to a hub repository. `effjax.pipeline` loads it from there.

        Args:
            repo_id: "owner/name". The repository is made if it does not exist.
            private: whether a new repository is private; None takes the account's default.
            commit_message: message of the one commit.
            token: True or None for the one that was stored by logging in.

        Returns:
            The address of the repository.
        """
        from huggingface_hub import HfApi  # slow to import

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            self._save(directory, repo_id, public=True, token=token)
            parts = [each.name for each in directory.iterdir() if each.is_dir()]
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=made.repo_id,
                folder_path=directory,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                delete_patterns=[f"{part}/*" for part in parts],  # what an earlier upload left
            )
        return str(made)

    def _save(
        self, directory: Path, name: str, *, public: bool = False, token: str | bool | None = None
    ) -> None:
        """Write everything into an empty directory.

        Args:
            directory: where to.
            name: what the card calls it.
            public: it goes to a hub: say nothing of this machine, and ask for the license there.
            token: of the hub.
        """
        index: dict[str, Any] = {"_class_name": self.family.name, **self._components(directory)}
        if self.origin is not None and (self.origin.public or not public):
            given = dataclasses.asdict(self.origin).items()
            index["origin"] = {key: value for key, value in given if value is not None}
        write_json(directory / INDEX, index)
        card = model_card(self, name, ask_hub=public, token=token)
        (directory / CARD).write_text(card, encoding="utf-8")

    def component(self, name: str) -> Any:
        """A component by its name in the table: a model's forward and parameters, None if missing.

        Other components are what `effjax.pipeline` takes in their place.
        """
        return (self.forward, self.params) if name == self.family.model else getattr(self, name)

    def _components(self, directory: Path) -> dict[str, Any]:
        """Save the components, each in its folder; return what model_index.json says of them."""
        said: dict[str, Any] = {}
        for name, kind in self.family.kinds.items():
            held, folder = self.component(name), directory / name
            if held is None:
                said[name] = [None, None]
            elif kind == "model":
                recipe.save(folder, *held)
                said[name] = ["effjax", held[0].model.__name__]
            elif kind == "scheduler":
                folder.mkdir()
                write_json(directory / SCHEDULER, held)
                said[name] = ["diffusers", held.get("_class_name")]
            else:
                held.save_pretrained(folder)
                said[name] = ["transformers", type(held).__name__]
        return said

    def __repr__(self) -> str:
        config = self.forward.config
        methods = ", ".join(name for name, _ in self.forward.recipe) or "none"
        return (
            f"{type(self).__name__}({self.forward.model.__name__}, "
            f"{parameter_count(self.params):,} parameters in {config.param_dtype}, computed in "
            f"{config.dtype}, methods: {methods})"
        )


def _subclasses(kind: type) -> Iterator[type]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def runs_executables(method: Method) -> Method:
    """A method of a pipeline within which its executables are used."""

    @functools.wraps(method)
    def run(self: BasePipeline, *args: Any, **kwargs: Any) -> Any:
        if self.executables is None:
            return method(self, *args, **kwargs)
        with self.executables.using():
            return method(self, *args, **kwargs)

    return cast(Method, run)
