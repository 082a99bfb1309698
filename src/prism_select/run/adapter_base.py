"""Adapter's base: a folder with an adapter, given as the model, stands for its base and itself.

    --model FOLDER      adapter_config.json: base_model_name_or_path = BASE
    =  --model BASE --adapter FOLDER

Choices made here:
- the base is a path or a hub id, as PEFT wrote it; a path that is not here stops at once;
- other weights beside an adapter stop the run: which of the two is meant is not known.
"""

import json
from pathlib import Path

from prism_select.run.errors import BadModel, BadOption

__all__ = ["CONFIG", "WEIGHTS", "base_of_adapter", "looks_local", "named_base"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def base_of_adapter(name: str, adapter: str | None) -> str | None:
    """The base of the adapter in the folder `name`; None where there is no adapter. Raises
    BadOption for a second adapter or for weights beside it, BadModel for a base that is not
    here."""
    folder = Path(name)
    if not _has_adapter(folder):
        return None
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    if others := [file.name for file in weights if not file.name.startswith("adapter_")]:
        raise BadOption(
            f"--model {name}: it holds an adapter ({CONFIG}) and a model ({others[0]}); move the "
            "adapter to a folder of its own, and give --model MODEL, with or without --adapter"
        )
    if adapter:
        raise BadOption(
            f"--model {name}: an adapter, and --adapter {adapter} is another one; merge one of "
            "them into a model of its own"
        )
    base = named_base(folder)
    advice = f"give --model BASE --adapter {name}"
    if not base:
        raise BadModel(f"--model {name}: an adapter that does not say which base it has; {advice}")
    if looks_local(base) and not Path(base).exists():
        raise BadModel(f"--model {name}: an adapter of {base}, which is not here; {advice}")
    if _has_adapter(Path(base)):
        raise BadModel(
            f"--model {name}: an adapter of {base}, which is an adapter itself; merge that into a "
            f"model, and {advice}"
        )
    return base


def _has_adapter(folder: Path) -> bool:
    try:
        return (folder / CONFIG).is_file()
    except OSError:  # no name of a file
        return False


def named_base(folder: Path) -> str:
    """What the adapter's configuration names as its base; empty where it names none."""
    try:
        base = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return base if isinstance(base, str) else ""


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: a hub id has one slash at most."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
