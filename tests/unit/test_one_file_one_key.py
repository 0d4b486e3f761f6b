"""One file adds one component, and its file name is its recipe key.

Run: make setup && .venv/bin/python -m pytest tests/unit/test_one_file_one_key.py
"""

import importlib
from pathlib import Path

import pytest

from common.recipe import COMPONENTS

ROOT = Path(__file__).resolve().parents[2]
# Where components live as files; `abliteration.selection` has variants inside one file and no folder.
FOLDERS = {
    "abliteration.direction": "abliteration/directions",
    "abliteration.edit": "abliteration/edits",
    "train.preferences": "train/preferences",
    "eval.benchmarks": "eval/benchmarks",
}
NO_COMPONENTS = {"train/preferences": {"filters"}}
SURFACE = {
    "abliteration.direction": {"estimate", "NEEDS_SAMPLES"},
    "abliteration.edit": {"build"},
    "train.preferences": {"check", "inputs", "prompts_used"},
}


@pytest.mark.parametrize(("key", "folder"), FOLDERS.items())
def test_the_files_of_a_folder_are_the_names_of_the_recipe(key, folder):
    files = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert files - NO_COMPONENTS.get(folder, set()) == set(COMPONENTS[key])


def test_every_kind_of_component_has_its_folder_or_needs_none():
    assert set(COMPONENTS) - set(FOLDERS) == {"abliteration.selection"}


@pytest.mark.parametrize(("key", "names"), SURFACE.items())
def test_every_component_offers_what_its_stage_calls(key, names):
    for component in COMPONENTS[key]:
        module = importlib.import_module(f"{FOLDERS[key].replace('/', '.')}.{component}")
        assert names <= set(dir(module)), f"{module.__name__} lacks {names - set(dir(module))}"


@pytest.mark.parametrize("key", COMPONENTS)
def test_a_component_is_selected_by_its_own_name(key):
    for name, section in COMPONENTS[key].items():
        assert section.model_fields["name"].annotation.__args__ == (name,)
