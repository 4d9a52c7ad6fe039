"""What makes weights a model that one can chat with: tokenizer, chat template and stop ids beside them.

A run keeps the small files of its tokenizer when it is prepared, so an export needs nothing from outside the run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from gspo_megatron.config.schema import Recipe
from gspo_megatron.data.sentencepiece_files import write_sentencepiece
from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.models.tokenizer_files import GENERATION_CONFIG, stop_file, tokenizer_files, tokenizer_folders

SENTENCEPIECE = "sentencepiece.model"
"""Name of a SentencePiece model in a run directory."""


def keep_tokenizer(recipe: Recipe, directory: Path) -> None:
    """Copy the tokenizer of a recipe into a directory of its run. What is not there is left for its reader to say."""
    path, model = recipe.tokenizer.path or recipe.model.path, recipe.model.path
    if path is None:
        return
    directory.mkdir(exist_ok=True)
    if recipe.tokenizer.kind == "sentencepiece":
        if path.is_file():
            shutil.copyfile(path, directory / SENTENCEPIECE)
        return
    copy_tokenizer(path, directory)
    # transformers takes the class of a tokenizer that does not name it from there.
    if (path / "config.json").is_file():
        shutil.copyfile(path / "config.json", directory / "config.json")
    places = [place for place in dict.fromkeys((path, model)) if place is not None]
    stops = [stop for place in places for stop in _stops(_read(stop_file(place)))]
    settings = [_read(place / GENERATION_CONFIG) for place in places]
    merged = {key: value for values in settings for key, value in values.items()}
    if stops:
        merged["eos_token_id"] = list(dict.fromkeys(stops))
    if merged:
        (directory / GENERATION_CONFIG).write_text(json.dumps(merged, indent=1))


def write_tokenizer(recipe: Recipe, kept: Path, directory: Path) -> None:
    """Write the tokenizer, the chat template and the generation config of a run into a directory of weights.

    Args:
        recipe: of the run.
        kept: what `keep_tokenizer` wrote; where it is empty, as in a run of an earlier version, the recipe's own paths.
        directory: of the weights.

    Raises:
        ValueError: there is no tokenizer, or it cannot be written so that transformers reads the same; a sentence.
    """
    has_kept = kept.is_dir() and any(kept.iterdir())
    section = recipe.tokenizer
    if section.kind == "sentencepiece":
        place = kept / SENTENCEPIECE if has_kept else section.path
        tokenizer = load_tokenizer(section.model_copy(update={"path": place}), None)
        assert place is not None
        written = write_sentencepiece(place, directory)
    else:
        place = kept if has_kept else section.path or recipe.model.path
        tokenizer = load_tokenizer(section.model_copy(update={"path": place}), None if has_kept else recipe.model.path)
        assert place is not None
        copy_tokenizer(place, directory)
        written = {}
    settings = {**_read(place / GENERATION_CONFIG), **written, "eos_token_id": list(tokenizer.stop_ids)}
    (directory / GENERATION_CONFIG).write_text(json.dumps(settings, indent=1))


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy the files of a Hugging Face tokenizer, byte by byte."""
    for file in tokenizer_files(source):
        shutil.copyfile(file, directory / file.name)
    for folder in tokenizer_folders(source):
        shutil.copytree(folder, directory / folder.name, dirs_exist_ok=True, copy_function=shutil.copyfile)


def _read(file: Path) -> dict[str, Any]:
    """The settings of a file; a missing or broken one, which the plan warns of, is empty."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _stops(values: dict[str, Any]) -> list[int]:
    named = values.get("eos_token_id")
    return [stop for stop in (named if isinstance(named, list) else [named]) if isinstance(stop, int)]
