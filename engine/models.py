"""The models this engine knows: one YAML per model in `configs/models/`."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec
import yaml

from engine.decode import decode_strictly
from engine.params import ModelParams
from hotreload.shown import shown
from ipc.errors import BadConfig

_PACKAGE = Path(__file__).resolve().parent
CONFIGS = next(p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir())
"""`configs/` of the clone, or its copy inside an installed wheel."""

T = TypeVar("T", bound=msgspec.Struct)


def read_yaml(path: Path, type_: type[T]) -> T:
    """Decode a YAML file strictly into `type_`; `BadConfig` names the file, the field, and what was expected."""
    try:
        data = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise BadConfig(f"{path.name} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise BadConfig(f"{path.name} is not YAML: {error}") from error
    return decode_strictly(type_, data, BadConfig, path.name)


def list_models() -> list[str]:
    """Names of the known models, sorted."""
    return sorted(p.stem for p in (CONFIGS / "models").glob("*.yaml"))


def load_model(name: str) -> ModelParams:
    """The parameters of a model; `BadConfig` lists the known ones if there is none of that name."""
    known = list_models()
    if name not in known:
        raise BadConfig(f"there is no model {name!r}; the known models are: {', '.join(known)}")
    model = read_yaml(CONFIGS / "models" / f"{name}.yaml", ModelParams)
    if model.name != name:
        raise BadConfig(f"{name}.yaml says its name is {model.name!r}; the file and the model must have the same name")
    return model


def known_models() -> tuple[list[ModelParams], list[str]]:
    """Every model whose YAML can be read, by name; and what is wrong with each other one."""
    models, problems = [], []
    for name in list_models():
        try:
            models.append(load_model(name))
        except BadConfig as error:
            problems.append(str(error))
    return models, problems


def checkpoint_directory(model: ModelParams, chosen: str | None) -> Path:
    """Where the weights are: the operator's choice, else what ships with the model."""
    if chosen is not None:
        return existing_directory(chosen)
    if model.checkpoint is not None:
        return existing_directory(CONFIGS / model.checkpoint)
    raise BadConfig(f"{model.name} does not ship with its weights; say where they are with --checkpoint DIR")


def existing_directory(chosen: str | Path) -> Path:
    """The operator's directory, absolute, without links. `BadConfig` for all that is none: a loop of links, a user who
    is not there, a name too long, a directory that may not be entered."""
    name = shown(chosen)
    try:
        directory = Path(chosen).expanduser().resolve()
        found = directory.is_dir()
    except OSError as error:
        raise BadConfig(f"the checkpoint '{name}' cannot be read: {error.strerror}; name another directory") from error
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition(" from ")[0]  # a loop of links is said with its whole path
        raise BadConfig(f"the checkpoint '{name}' is not a directory: {reason}; name another one") from error
    if not found:
        raise BadConfig(f"the checkpoint '{name}' is not a directory")
    return directory
