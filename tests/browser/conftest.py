"""A browser for the tests of pages, and the page that they open."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.report import page
from tests import evaluated
from tests.browser.chromium import NAMES, Browser, executable

# Where `npm install --prefix .venv axe-core` puts it.
AXE = Path(sys.prefix) / "node_modules" / "axe-core" / "axe.min.js"


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One chromium for all tests."""
    if executable() is None:
        pytest.skip(f"no {' or '.join(NAMES)} here; Debian: apt-get install chromium")
    profile = tmp_path_factory.mktemp("profile")
    started = Browser(profile)
    yield started
    started.close()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture(scope="session")
def axe() -> str:
    """The accessibility checker's source."""
    if not AXE.is_file():
        pytest.skip("axe-core is not here; npm install --prefix .venv axe-core")
    return AXE.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a made-up run."""
    return evaluated.folders(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def report(folders: dict[str, Path]) -> Path:
    """The page of a made-up evaluation."""
    path = folders["train"].parent / page.NAME
    page.write(path, evaluated.results(), evaluated.items(), evaluated.questions(), folders)
    return path
