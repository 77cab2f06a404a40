"""The code of a run: a copy in its folder, made at submission, which later edits of the checkout do not affect.

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
from core.durable import write_atomically
from core.errors import RunError

PACKAGES = ("conf", "core", "data", "launch", "model", "tools", "train")
BESIDE = ("setup.py", "pyproject.toml", "requirements.lock")  # to make the same environment again
MOST_BYTES = 64 * 1000**2
MOST_FILES = 20_000
# Left out of the recorded difference, as of the copy (see _is_secret).
SECRET_PATHS = [
    f":(exclude,glob)**/{name}" for name in (".env*", ".netrc", ".pypirc", ".git-credentials", "*.pem", "*.key")
]


@dataclass(frozen=True)
class Snapshot:
    """The code of this process, before it is copied. `files`: paths below `source`; `commit`: "" outside of git."""

    source: Path
    files: tuple[str, ...]
    commit: str
    digest: str

    def folder(self, run: Path) -> Path:
        """The folder of the copy, existing or not: one of the same content, or the first free name."""
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
        partial.chmod(0o777 & ~umask())
        try:
            for name in self.files:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.source / name, partial / name)
                (partial / name).chmod((self.source / name).stat().st_mode & 0o777 & ~umask())
            if self.commit:
                diff = _git(self.source, "diff", "HEAD", "--", *self._kept(), *SECRET_PATHS)
                _beside(folder, ".diff").write_bytes(os.fsencode(diff))  # of files in any encoding
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
    """Collect the files to copy: of a checkout the tracked files and those that git does not ignore, else all code of
    the installed packages. RunError if that is too much to be code."""
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
    files = tuple(sorted({file for name in names for file in _files_of(source, name)}))
    sizes = {name: (source / name).stat().st_size for name in files}
    if sum(sizes.values()) > MOST_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise RunError(
            f"the code to copy has {sum(sizes.values()) / 1e6:.0f} MB, of which {source / largest} has "
            f"{sizes[largest] / 1e6:.0f}: move data out of the packages, or list it in .gitignore"
        )
    digest = hashlib.sha256()
    for name in files:
        digest.update(f"{name}\0{sizes[name]}\0".encode() + (source / name).read_bytes())
    return Snapshot(source, files, commit, digest.hexdigest())


def _files_of(source: Path, name: str) -> list[str]:
    """The files that a listed name stands for: itself, or all of a submodule, a repository within or a linked folder;
    none for one that was deleted. RunError for a link that leads nowhere."""
    path = source / name
    if path.is_symlink() and not path.exists():
        raise RunError(f"{path} is a link to {os.readlink(path)}, which does not exist: repair it or delete it")
    if not path.is_dir():
        return [name] if path.is_file() and not _is_secret(path.name) else []
    found: list[str] = []
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = [each for each in folders if each not in (".git", "__pycache__")]
        if len(found) > MOST_FILES:
            raise RunError(
                f"{path} holds more than {MOST_FILES} files: it is not code, or it is a link to a folder above it"
            )
        found += [
            (Path(folder) / file).relative_to(source).as_posix()
            for file in files
            if file != ".git" and not file.endswith(".pyc") and not _is_secret(file)
        ]
    return found


def _is_secret(name: str) -> bool:
    """Whether a file of this name usually holds keys or passwords: it is not copied, since others may be able to read
    the copy."""
    return (
        name.startswith(".env") or name in (".netrc", ".pypirc", ".git-credentials") or name.endswith((".pem", ".key"))
    )


def umask() -> int:
    """The permissions that this process withholds from files it creates."""
    value = os.umask(0o077)
    os.umask(value)
    return value


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
    """Output of git; `missing`: what to return if it fails, else RunError."""
    done = subprocess.run(
        ["git", "-C", str(source), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="surrogateescape",
    )
    if done.returncode == 0:
        return done.stdout
    if missing is not None:
        return missing
    raise RunError(f"git {arguments[0]} failed in {source}: {done.stderr.strip()}")
