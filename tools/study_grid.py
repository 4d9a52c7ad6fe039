"""The grid of the study as data: `recipes/study/grid.yaml` read, and the cells that it describes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from gspo_megatron.config.refusal import RecipeError
from gspo_megatron.models import load_recipe

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "recipes" / "study"
GRID = FOLDER / "grid.yaml"
SUMMARIES = FOLDER / "summaries"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Algorithm(_Part):
    """An objective of the comparison."""

    title: str
    overrides: tuple[str, ...]


class Value(_Part):
    """One value of a stressor."""

    overrides: tuple[str, ...] = ()
    of_algorithm: dict[str, tuple[str, ...]] = {}
    """Further overrides for one algorithm."""
    router_noise: float = 0.0
    """Standard deviation of the noise on the log of the trainer's router scores; `tools/router_noise/`."""


class Stressor(_Part):
    """What is changed beside the algorithm."""

    title: str
    base: str | None = None
    """The value that the recipe has; null = the stressor has no scale."""
    values: dict[str, Value]


class Block(_Part):
    """A part of the grid: every combination of its lists, seed by seed."""

    name: str
    algorithms: tuple[str, ...]
    stressors: tuple[str, ...]
    """All values of a stressor, or one: `lr`, `lr-3e-4`."""
    seeds: tuple[int, ...]


class Collapse(_Part):
    """When a run counts as collapsed: see `study_summary.collapsed_at`."""

    drop: float
    evaluations: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the study."""

    algorithm: str
    stressor: str
    value: str
    seed: int
    overrides: tuple[str, ...]
    """`section.key=value`, the seed included."""
    router_noise: float

    @property
    def setting(self) -> str:
        """Stressor and value: `lr-3e-4`, `base`."""
        return f"{self.stressor}-{self.value}" if self.value else self.stressor

    @property
    def name(self) -> str:
        """What the cell, its directory and its summary are called: `grpo-lr-3e-4-s2`."""
        return f"{self.algorithm}-{self.setting}-s{self.seed}"

    @property
    def digest(self) -> str:
        """Of what decides the run; a summary of another digest is not of this cell."""
        facts = json.dumps([self.overrides, self.router_noise])
        return hashlib.sha256(facts.encode()).hexdigest()[:12]


class Grid(_Part):
    """The whole grid."""

    recipe: str
    collapse: Collapse
    algorithms: dict[str, Algorithm]
    stressors: dict[str, Stressor]
    blocks: tuple[Block, ...]

    @model_validator(mode="after")
    def names_are_known(self) -> Grid:
        for block in self.blocks:
            strange = [name for name in block.algorithms if name not in self.algorithms]
            strange += [name for name in block.stressors if not self.values_of(name)]
            if strange:
                raise ValueError(f"block {block.name} names {strange[0]}, which is not in the grid")
        return self

    def values_of(self, name: str) -> list[tuple[str, str]]:
        """(stressor, value) of all values of a stressor, or of the one that is named; empty for another name."""
        pairs = [(stressor, value) for stressor, it in self.stressors.items() for value in it.values]
        return [pair for pair in pairs if pair[0] == name] or [pair for pair in pairs if "-".join(pair) == name]

    def cells(self) -> list[Cell]:
        """Every cell once, in the order in which they are run."""
        found = {
            cell.name: cell
            for block in self.blocks
            for seed in block.seeds
            for name in block.stressors
            for stressor, value in self.values_of(name)
            for algorithm in block.algorithms
            for cell in [self.cell(algorithm, stressor, value, seed)]
        }
        return list(found.values())

    def cell(self, algorithm: str, stressor: str, value: str, seed: int) -> Cell:
        """One cell."""
        chosen = self.stressors[stressor].values[value]
        overrides = (
            *self.algorithms[algorithm].overrides,
            *chosen.overrides,
            *chosen.of_algorithm.get(algorithm, ()),
            f"run.seed={seed}",
        )
        return Cell(algorithm, stressor, value, seed, overrides, chosen.router_noise)


def read_grid(path: Path = GRID) -> Grid:
    """Read a grid. Raises ValueError for one that does not fit together."""
    return Grid.model_validate(yaml.safe_load(path.read_text()))


def fault_of(grid: Grid, cell: Cell, folder: Path = FOLDER) -> str:
    """Why this checkout cannot run a cell, in one sentence; empty = it can."""
    try:
        load_recipe(folder / grid.recipe, cell.overrides)
    except RecipeError as error:
        return str(error).splitlines()[0]
    return ""
