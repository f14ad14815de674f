"""Where a result comes from: the commit of this package's checkout, and of no other."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from bucketmoo_ds.apps.bench import provenance

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a package in it, which `provenance` takes for its own."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "readme").write_text("")
    monkeypatch.setattr(provenance, "PACKAGE", package)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


@needs_git
def test_commit_and_changes(checkout: Path) -> None:
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    head = provenance.describe()
    assert (head["commit"], head["dirty"]) == (git(checkout, "rev-parse", "HEAD"), False)
    results = checkout / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "a.json").write_text("{}")
    assert provenance.describe()["dirty"] is False, "a result is no change"
    (checkout / "readme").write_text("more")
    assert provenance.describe()["dirty"] is True, "changes outside of the package count"
    assert " + changes" in provenance.headline(provenance.describe())


@needs_git
def test_an_installed_package_has_no_commit(checkout: Path) -> None:
    assert provenance.describe()["commit"] is None, "no repository at all"
    git(checkout, "init", "-q")
    git(checkout, "add", "readme")
    git(checkout, "commit", "-qm", "first")
    head = provenance.describe()
    assert (head["commit"], head["dirty"]) == (None, None), "somebody else's repository around a virtual environment"
    assert "no commit" in provenance.headline(head)


def test_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert provenance.describe()["commit"] is None


def test_versions_of_what_is_installed() -> None:
    head = provenance.describe(("torch", "no-such-package"))
    assert list(head["versions"]) == ["python", "torch", "bucketmoo_ds"]
    assert head == json.loads(json.dumps(head))
    assert f"torch {head['versions']['torch']}" in provenance.headline(head)
