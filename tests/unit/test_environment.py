"""pyproject.toml, requirements.lock, environment.yml and what is installed say the same thing."""

import importlib.metadata
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from shared.runtime.files import repository_root

ROOT = repository_root()


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(line) for group in groups for line in group]
    return [requirement for requirement in requirements if requirement.name != project["name"]]


def test_every_line_of_the_lock_is_an_exact_pin():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line), f"not an exact pin: {line}"


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_the_lock_satisfies_what_pyproject_asks_for(requirement):
    pins = locked()
    name = canonicalize_name(requirement.name)
    assert name in pins, f"{requirement} is declared and not locked"
    assert requirement.specifier.contains(pins[name], prereleases=True)


def test_what_is_installed_is_what_the_lock_says():
    different = {}
    for name, version in locked().items():
        installed = importlib.metadata.version(name).split("+")[0]  # torch's CPU build is 2.13.0+cpu
        if installed != version:
            different[name] = (version, installed)
    assert not different, f"locked, installed: {different}"


def test_conda_installs_the_lock_and_the_package_on_a_python_that_pyproject_allows():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert environment["name"] == project["name"]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    python = next(entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    allowed = Requirement(f"python{project['requires-python']}").specifier
    assert allowed.contains(python.split("=")[1])


def test_large_weights_go_to_lfs():
    attributes = (ROOT / ".gitattributes").read_text()
    assert "**/large/*.safetensors filter=lfs" in attributes
