"""The code that a run runs: a copy in its folder, taken at submission, which later edits of the checkout do not reach.

    runs/<id>/code/       the packages, as they were
    runs/<id>/code.json   commit, `git status`, versions of Python and of all installed distributions
    runs/<id>/code.diff   what differed from the commit

A submission with other code gets code-2/, and so on: a job keeps the copy that it was submitted with.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import train
from train.errors import RunError
from train.run_dir import write_atomically

PACKAGES = ("conf", "data", "launch", "model", "tools", "train")
BESIDE = ("setup.py", "pyproject.toml", "requirements.lock")  # to make the same environment again
MOST_BYTES = 64 * 1000**2


@dataclass(frozen=True)
class Snapshot:
    """The code of this process, before it is copied. `files`: paths below `source`; `commit`: "" outside of git."""

    source: Path
    files: tuple[str, ...]
    commit: str
    digest: str

    def folder(self, run: Path) -> Path:
        """Where the copy lies, or would lie: the one of the same content, or the first free name."""
        number = 1
        while True:
            folder = run / ("code" if number == 1 else f"code-{number}")
            if not folder.exists():
                return folder
            try:
                if json.loads(_beside(folder, ".json").read_text())["digest"] == self.digest:
                    return folder
            except (OSError, ValueError, KeyError):
                pass  # somebody's own folder
            number += 1

    def write(self, run: Path) -> Path:
        """Copy the code into a run's folder unless the same is there already; returns the copy's folder."""
        folder = self.folder(run)
        if folder.exists():
            return folder
        run.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".code-", dir=run))
        partial.chmod(0o755)
        try:
            for name in self.files:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.source / name, partial / name)
            if self.commit:
                write_atomically(_beside(folder, ".diff"), _git(self.source, "diff", "HEAD", "--", *self._kept()))
            write_atomically(_beside(folder, ".json"), json.dumps(self._describe(), indent=1) + "\n")
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder

    def _kept(self) -> list[str]:
        return [name for name in (*PACKAGES, *BESIDE) if (self.source / name).exists()]

    def _describe(self) -> dict[str, object]:
        installed = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
        return {
            "digest": self.digest,
            "source": str(self.source),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": self.commit,
            "status": _git(self.source, "status", "--porcelain").splitlines() if self.commit else [],
            "python": platform.python_version(),
            "torch": installed.get("torch"),
            "versions": dict(sorted(installed.items(), key=lambda item: str(item[0]).lower())),
        }


def look() -> Snapshot:
    """What would be copied: of a checkout the tracked files and those that git does not ignore, else all code of the
    installed packages. RunError when that is too much to be code."""
    assert train.__file__ is not None
    source = Path(train.__file__).resolve().parents[1]
    commit = ""
    if shutil.which("git") and _git(source, "rev-parse", "--show-toplevel", missing="") == f"{source}\n":
        commit = _git(source, "rev-parse", "HEAD", missing="").strip()
    if commit:
        listed = _git(source, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES, *BESIDE)
        names = [name for name in listed.split("\0") if name]
    else:
        found = [path for package in PACKAGES for path in (source / package).rglob("*") if path.suffix != ".pyc"]
        names = [path.relative_to(source).as_posix() for path in found]
    files = tuple(sorted({name for name in names if (source / name).is_file()}))  # not those deleted and unstaged
    sizes = {name: (source / name).stat().st_size for name in files}
    if sum(sizes.values()) > MOST_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise RunError(
            f"the code to copy has {sum(sizes.values()) / 1e6:.0f} MB, of which {source / largest} has "
            f"{sizes[largest] / 1e6:.0f}: move data out of the packages, or name it in .gitignore"
        )
    digest = hashlib.sha256()
    for name in files:
        digest.update(f"{name}\0{sizes[name]}\0".encode() + (source / name).read_bytes())
    return Snapshot(source, files, commit, digest.hexdigest())


def check_runs_from(folder: str) -> None:
    """RunError when this process imports the packages from elsewhere than `folder` (an installed copy won)."""
    assert train.__file__ is not None
    source = Path(train.__file__).resolve().parents[1]
    if source != Path(folder).resolve():
        raise RunError(
            f"this process runs the code of {source} instead of the run's own copy {folder}: something puts it before "
            "PYTHONPATH (a .pth file, sitecustomize, or python -I)"
        )


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def _git(source: Path, *arguments: str, missing: str | None = None) -> str:
    """Output of git; `missing`: what to give when it fails, else RunError."""
    done = subprocess.run(["git", "-C", str(source), *arguments], capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout
    if missing is not None:
        return missing
    raise RunError(f"git {arguments[0]} failed in {source}: {done.stderr.strip()}")
