"""Every program answers a user's mistake with one line and the documented exit status, and explains all of its keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from core.compose import _assign, _read, compose
from core.errors import EXIT_FAILED, EXIT_OK, EXIT_RETRY, UserError
from core.help import meanings
from core.keys import is_text, types_of, walk, words
from core.program import Command, Program
from data.errors import ReadError
from tests.core.test_typed import NASTY
from tools import mova

ROOT = Path(__file__).parents[2]


def bench_modules() -> list[str]:
    paths = [path for path in sorted(ROOT.glob("bench/**/*.py")) if "\nPROGRAM = " in path.read_text()]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]


MODULES = {
    **mova.PROGRAMS,
    **{f"bench {name}": f"tools.bench.{module}" for name, module in mova.benchmarks().items()},
    **{name: name for name in bench_modules()},
}
ABSENT = "/absent/folder"
MISSING_FILE = {  # arguments that name something that is not there; None: the program reads nothing of the user's
    "quickstart": [f"clips={ABSENT}"],
    "synthesize": ["output=/proc/absent", "clips=1"],
    "prepare": [f"source={ABSENT}", "output=OUT"],
    "import": [f"source={ABSENT}", "output=OUT", "encoders.video=x", "fps=24"],
    "index": [f"dir={ABSENT}"],
    "inspect": [ABSENT],
    "caption": [f"dataset={ABSENT}", f"table={ABSENT}", "captioner=x"],
    "refilter": [f"dir={ABSENT}"],
    "train-sync": [f"source={ABSENT}", "output=OUT.safetensors"],
    "plan": [f"gpu={ABSENT}.yaml", "cluster.gpus=8"],
    "launch": ["run.id=x", "run.root=OUT", f"data.path={ABSENT}"],
    "status": [ABSENT],
    "upload": [ABSENT],
    "watch": [ABSENT],
    "report": [ABSENT],
    "curves": [ABSENT, "output=OUT.png"],
    "export": [f"run={ABSENT}", "out=OUT"],
    "sample": [f"checkpoint={ABSENT}", "out=OUT.mp4"],
    "sync-score": [f"checkpoint={ABSENT}", f"dataset={ABSENT}", "out=OUT.json"],
    "bench.data.curate": [f"source={ABSENT}", "output=OUT"],
    "bench.train.parity": [f"fixture={ABSENT}", "output=OUT"],
}


def program(name: str) -> Any:
    return mova.load(MODULES[name])


def with_keys() -> list[str]:
    return [name for name in MODULES if isinstance(program(name), Program) or program(name).schema is not None]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    for raw in ("Traceback", "HYDRA_FULL_ERROR", "add --multirun", "full_key", "use +", "Errno", "hydra.cc"):
        assert raw not in said, said
    return said


@pytest.fixture(autouse=True)
def at_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize("name", with_keys())
def test_a_typo_and_a_wrong_type(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = program(name)
    keys = walk(one.schema.type, one.schema.variants)
    key = keys[0].path
    assert one.run([f"{key}x=1"]) == EXIT_FAILED
    said = one_line(capsys)
    assert f"{key}x=1: there is no key {key}x; did you mean" in said and key in said.split("did you mean")[1]
    typed = [k for k in keys if not is_text(k.type) and k.variant != "slurm"]
    if typed:
        assert one.run([f"{typed[0].path}=a b"]) == EXIT_FAILED
        said = one_line(capsys)
        assert f"{typed[0].path}=a b: {typed[0].path} takes " in said and words(typed[0].type) in said
    for strange in ("--multirun", "-x", "loose"):
        if one.name == "launch" or not (strange == "loose" and getattr(one, "first", "")):
            assert one.run([strange]) == EXIT_FAILED
            assert strange in one_line(capsys)


@pytest.mark.parametrize("name", list(MODULES))
def test_help_explains_every_key(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = program(name)
    assert isinstance(one, Command) and one.typed in (f"mova {name}", f"python -m {name}")
    assert one.run(["--help"]) == EXIT_OK
    said = capsys.readouterr().out
    assert mova.first_line(MODULES[name]).rstrip(".") in said
    if one.schema is not None:
        for key in walk(one.schema.type, one.schema.variants):
            text = meanings(key.owner).get(key.name)
            assert text, f"{key.owner.__name__}: the docstring has no line `{key.name}: ...`"
            assert f"\n  {key.path}  <{words(key.type)}>" in said and " ".join(text.split()) in " ".join(said.split())


@pytest.mark.parametrize("name", with_keys())
def test_every_text_key_takes_nasty_text(name: str) -> None:
    schema = program(name).schema
    config = compose(schema, []).config
    keys = [key.path for key in walk(schema.type, schema.variants) if is_text(key.type) and key.variant != "slurm"]
    for text in NASTY:
        for key in keys:
            _assign(config, _read(f"{key}={text}", schema, {}), schema)
            assert OmegaConf.select(config, key) == text


@pytest.mark.parametrize("name", MISSING_FILE)
def test_a_file_that_is_not_there(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = [one.replace("OUT", str(tmp_path / "out")) for one in MISSING_FILE[name]]
    assert program(name).run(given) == EXIT_FAILED
    assert ABSENT in one_line(capsys) or name == "synthesize"


def test_no_program_is_forgotten() -> None:
    untested = set(mova.PROGRAMS) - set(MISSING_FILE)
    assert untested == {"train"}, "train ends its process by itself: test_a_real_process_of_train"
    bare = subprocess.run(["git", "-C", str(ROOT), "grep", "-l", "hydra.main"], capture_output=True, text=True).stdout
    assert [line for line in bare.splitlines() if line.endswith(".py") and not line.startswith("tests")] == []


def test_errors_keep_their_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> int:
        def act(arguments: list[str]) -> None:
            raise error

        return Command("x", "", act).run([])

    assert fail(ReadError("busy")) == EXIT_RETRY and "error: busy" in one_line(capsys)
    assert fail(UserError("a\n  b")) == EXIT_FAILED and one_line(capsys) == "error: a b\n"
    assert fail(FileNotFoundError(2, "No such file", "x.txt")) == EXIT_FAILED
    assert one_line(capsys) == "error: x.txt: No such file\n"
    assert fail(KeyboardInterrupt()) == 130
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


def run(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`mova` as the console script starts it: without the current folder on the path."""
    script = "import sys; from tools.mova import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_from_a_folder_with_modules_of_the_same_names(tmp_path: Path) -> None:
    for name in ("data", "model", "train", "core"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the user\\'s own {name}.py')\n")
    done = run("synthesize", "output=2026_11_28", "clips=1", "frames=9", "workers=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "2026_11_28" / "clip-000000.mp4").exists()
    done = run("launch", "job=prepare", "source=2026_11_28", "output=set", "frames=9", "workers=1", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "set" / "index").exists(), done.stderr


def test_a_real_process_of_train(tmp_path: Path) -> None:
    done = run("train", "run.id=x", f"data.path={ABSENT}", "monitor.wandb=disabled", cwd=tmp_path)
    assert done.returncode == EXIT_FAILED and ABSENT in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = run("train", "run.id=x", "optim.lr_towr=1", cwd=tmp_path)
    assert done.returncode == EXIT_FAILED
    assert done.stderr.startswith("error: optim.lr_towr=1: there is no key optim.lr_towr; did you mean optim.lr_tower")
    done = run("train", "run.id=x", "optim.lr_towr=1", cwd=tmp_path, RANK="1")
    assert done.returncode == EXIT_FAILED and done.stderr == "", "one rank says it"


def test_a_full_log_disk_does_not_end_the_launcher(tmp_path: Path) -> None:
    script = "import sys; from tools.mova import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-P", "-c", script, "launch", "run.id=x", f"data.path={ABSENT}"],
            cwd=tmp_path, env=environment, stderr=full, stdout=subprocess.PIPE, timeout=300,
        )  # fmt: skip
    assert done.returncode == EXIT_FAILED, "120 and a traceback where printing raises"


ENDING = """
import atexit, ctypes, sys, threading, time
from core.errors import UserError
from core.program import Command

def act(arguments):
    late = threading.Thread(target=lambda: (time.sleep(0.3), print("the thread's")))
    late.start()
    atexit.register(lambda: print("the handler's"))
    # As a C++ thread that the interpreter's finalization meets: gloo, Arrow, decoders.
    ctypes.pythonapi.Py_AtExit(ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p))
    if arguments[0] == "error":
        raise UserError("no such run")
    if arguments[0] == "fault":
        raise ZeroDivisionError("of the program")
    return int(arguments[0])

Command("x", "", act).start()
"""


def ended(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    command = [sys.executable, "-c", ENDING, *arguments]
    more = {"stdout": subprocess.PIPE, **more}
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=60, **more)


def test_a_thread_of_a_library_at_the_end_does_not_change_the_exit_status() -> None:
    for argument, status, said in (
        ("0", EXIT_OK, ""), ("7", 7, ""), ("error", EXIT_FAILED, "error: no such run\n"),
        ("fault", EXIT_FAILED, "ZeroDivisionError: of the program\n"),
    ):  # fmt: skip
        done = ended(argument)
        assert (done.returncode, done.stdout) == (status, "the thread's\nthe handler's\n"), done
        assert done.stderr == said or (argument == "fault" and done.stderr.endswith(said)), done.stderr


def test_what_was_printed_before_printing_was_made_safe_is_not_lost() -> None:
    program = """
import os, sys
from core.terminal import print_without_fail
print("before")
print_without_fail("stdout", "stderr")
print("after")
sys.stdout.flush()
os._exit(0)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "before\nafter\n", done


def test_what_cannot_be_printed_at_the_end_is_a_failure() -> None:
    with open("/dev/full", "w") as full:
        done = ended("0", stdout=full)
    assert done.returncode == EXIT_FAILED and done.stderr == "error: standard output: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    done = ended("0", stdout=writer)
    os.close(writer)
    assert done.returncode == EXIT_FAILED and done.stderr == ""


def test_the_overview_and_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert mova.main(["--help"]) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    for name in (*mova.PROGRAMS, "bench", "completion"):
        assert any(line.startswith(f"  {name} ") for line in lines), name
    assert mova.main(["bench", "--help"]) == EXIT_OK and "  step " in capsys.readouterr().out
    assert mova.main(["lanuch"]) == EXIT_FAILED
    assert one_line(capsys) == "error: mova has no lanuch; did you mean launch? (mova --help)\n"


def complete(script: Path, line: str) -> list[str]:
    ask = f'source {script}; COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; _mova; printf "%s\\n" "${{COMPREPLY[@]}}"'
    return subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout.split()


def test_completion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mova.main(["completion", "fish"]) == EXIT_FAILED and "takes one shell" in one_line(capsys)
    assert mova.main(["completion", "bash"]) == EXIT_OK
    script = tmp_path / "mova.sh"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "runs").mkdir()
    assert complete(script, "mova quick") == ["quickstart"]
    assert complete(script, "mova train optim.lr_t") == ["optim.lr_tower="]
    assert complete(script, "mova train model=mova_3") == ["mova_360p"], "bash replaces what follows the ="
    assert complete(script, "mova launch cluster=slurm cluster.part") == ["cluster.partition="]
    wanted = ["parallel.deterministic=true", "parallel.deterministic=false"]
    assert complete(script, "mova train parallel.determ") == wanted
    assert complete(script, "mova bench ste") == ["step"]
    assert complete(script, "mova bench step bat") == ["batch="]
    assert complete(script, "mova report runs") == ["runs/"] and complete(script, "mova curves run=ru") == ["runs/"]


def test_types_of_keys_below_dicts_and_lists() -> None:
    launch = program("launch").schema
    assert types_of(launch.type, "cluster.environment.ANY", launch.variants) == [str]
    assert types_of(launch.type, "phases.any.train", launch.variants) == [list[str]]
    assert types_of(launch.type, "cluster.absent", launch.variants) == []
