"""What is typed is what is meant: text reaches every program letter for letter, through processes and phases too."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from core.child import arguments, command, environment
from core.compose import Composed, ConfigError, Schema, compose
from core.typed import override, read_text, write_text
from launch.compose import SCHEMA as LAUNCH
from launch.compose import PhaseConfig
from train.config import compose_train

NASTY = (
    "1_11", "11_1", "007", "12e3", "1e-5", "3.10", ".5", "0x10", "-1", "inf", "nan", "true", "True", "off", "None", "~",
    "2026_11_28", "A dog barks, a cat runs", "It's raining", '"quoted"', "'quoted'", "''", "f(x)", "choice(a,b)", "(",
    ")", "a=b", "=", "[a,b]", "[", "{a: 1}", "}", "l'été", "\u65e5\u672c", "\U0001f426", "--x", "-", "", " ", " a ",
    "a:b", "a b", "#a", "a\\", "\\'", "\\\\", "${oc.env:HOME}", "\\${x}", "$HOME", "*", "?", "%", "a\nb", "\t",
    "\udce4", "+a", "@a", "&",
)  # fmt: skip


@dataclass
class Inner:
    texts: list[str] = field(default_factory=list)
    name: str = ""


@dataclass
class Example:
    text: str = ""
    maybe: str | None = "x"
    number: float = 0.0
    texts: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    inner: dict[str, Inner] = field(default_factory=dict)


SCHEMA = Schema("example_of_keys", Example, ())


def give(*overrides: str) -> Example:
    example = compose(SCHEMA, overrides).typed()
    assert isinstance(example, Example)
    return example


@pytest.mark.parametrize("text", NASTY)
def test_text_is_taken_as_it_is_typed(text: str) -> None:
    example = give(f"text={text}", f"+maybe={text}", f"names.any={text}", f"inner.x.name={text}")
    assert example.text == example.maybe == example.names["any"] == example.inner["x"].name == text
    again = give(*arguments({"text": text, "maybe": text, "texts": [text, "b"], "names": {"a": text}}))
    assert again == Example(text, text, 0.0, [text, "b"], {"a": text})


def test_null_is_none_where_a_key_may_be_null() -> None:
    assert give("maybe=null").maybe is None and give("maybe=\\null").maybe == "null"
    assert give("maybe=\\\\null").maybe == "\\null" and give("text=null").text == "null"
    assert give("maybe='null'").maybe == "'null'" and give("maybe=Null").maybe == "Null"
    for text in ("null", "\\null", "\\\\null", "nulls", None):
        assert read_text(write_text(text), optional=True) == text
        assert give(override("maybe", text)).maybe == text


def test_what_stands_for_a_missing_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"text=\?\?\?: \?\?\? marks a missing value"):
        give("text=???")


def test_lists_and_dicts_keep_their_grammar() -> None:
    assert give("texts=[a,'b c',\"d=e\"]").texts == ["a", "b c", "d=e"]
    assert give("names={a: b, c: 'd,e'}").names == {"a": "b", "c": "d,e"}
    assert give("number=1e3").number == 1000.0
    for wrong in (
        "number=1,2",
        "number=",
        "number=a b",
        "texts=a",
        "texts=[a=b]",
        "texts=[a",
        "names=[a]",
        "number=(1)",
    ):
        with pytest.raises(ConfigError, match="takes") as refused:
            give(wrong)
        assert "\n" not in str(refused.value) and str(refused.value).startswith(wrong)


def test_a_phase_can_be_typed_by_itself() -> None:
    own = compose(LAUNCH, ["phases.one.train=['run.root=1_1','steps=3']", "phases.two.cluster=['cluster.processes=2']"])
    assert own.typed().phases == {
        "one": PhaseConfig(["run.root=1_1", "steps=3"]),
        "two": PhaseConfig(cluster=["cluster.processes=2"]),
    }
    changed = compose(LAUNCH, ["phases=mova", "phases.phase1.train=['steps=3']"]).typed()
    assert list(changed.phases) == ["phase1", "phase2", "phase3"] and changed.phases["phase1"].train == ["steps=3"]


def test_the_plain_config_has_the_same_text() -> None:
    config, plain = compose_train(["run.id=11_1", "data.path=12e3", "monitor.project=${x}", "run.root=~/runs, 'a'"])
    run = plain["run"]
    assert (run["id"], plain["monitor"]["project"], run["root"]) == ("11_1", "${x}", "~/runs, 'a'")
    assert (config.run.id, plain["data"]["path"]) == ("11_1", "12e3")


def test_text_reaches_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.py").write_text("raise SystemExit('the user\\'s own data.py')\n")
    monkeypatch.chdir(tmp_path)
    values = {"run": 'it\'s (1_1), [a]="b" ${x}', "output": tmp_path / "l'été.png"}
    done = subprocess.run(
        command("tools.curves", values, ["--cfg", "job"]),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    shown = dict(line.partition(": ")[::2] for line in done.stdout.splitlines())
    composed: Composed = compose(Schema("shown", Inner, ()), [f"name={values['run']}"])
    assert composed.typed().name == values["run"] and set(shown) == {"run", "output"}
    assert yaml.safe_load(done.stdout) == json.loads(json.dumps(values, default=str))
