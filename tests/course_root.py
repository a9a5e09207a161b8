"""A course of tiny notebooks in a temporary folder, for the tests of the runner and the command line."""

import json
import textwrap
from pathlib import Path

WEEK = "phase1-fundamentals/week1-attention"
PARAMETERS = 'scale = "auto"\nseed = 0'
START = """\
from shared.curriculum.claims import Claims
claims = Claims("week1", "{name}", scale="cpu", seed=seed)"""
CLAIM = """\
- name: {claim}
  says: The value is at least one half.  # a comment that has to stay
  source: ours
  notebook: {name}
  unit: fraction
  bounds: {{cpu: {{min: 0.5}}}}
  null: 0.0
"""


def code(source: str, *tags: str) -> dict:
    """A code cell."""
    return {
        "cell_type": "code",
        "id": f"cell-{abs(hash((source, tags))) % 10**8}",
        "metadata": {"tags": list(tags)} if tags else {},
        "execution_count": None,
        "outputs": [],
        "source": textwrap.dedent(source).strip().splitlines(keepends=True),
    }


def markdown(source: str) -> dict:
    """A cell of prose."""
    return {
        "cell_type": "markdown",
        "id": f"md-{abs(hash(source)) % 10**8}",
        "metadata": {},
        "source": source,
    }


def notebook(*cells: dict) -> dict:
    """A notebook with the parameters cell first."""
    kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": [code(PARAMETERS, "parameters"), *cells],
        "metadata": {"kernelspec": kernelspec},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def add_notebook(root: Path, name: str, *cells: dict | str) -> Path:
    """Write a notebook of week 1; a string is the source of a code cell."""
    path = root / WEEK / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    made = notebook(*(code(cell) if isinstance(cell, str) else cell for cell in cells))
    path.write_text(json.dumps(made), encoding="utf-8")
    return path


def add_claiming_notebook(root: Path, name: str, claim: str, value: str, *before: str) -> Path:
    """Write a notebook that measures one claim (at least 0.5), and the claim."""
    claims = root / WEEK / "claims.yaml"
    claims.parent.mkdir(parents=True, exist_ok=True)
    old = claims.read_text(encoding="utf-8") if claims.exists() else ""
    claims.write_text(old + CLAIM.format(claim=claim, name=name), encoding="utf-8")
    start = START.format(name=name)
    return add_notebook(root, name, start, *before, f'claims.measure("{claim}", {value})', "claims.show()")
