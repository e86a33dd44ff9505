"""The plugin's switch, and that it is where vLLM looks for it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from lncompile.engines import vllm_plugin

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("value", [None, "0"])
def test_it_does_nothing_unless_it_is_switched_on(value: str | None) -> None:
    code = (
        "import os, sys\n"
        f"os.environ.update({ {} if value is None else {'LNCOMPILE_VLLM': value} })\n"
        "from lncompile.engines.vllm_plugin import register\n"
        "before = set(sys.modules)\n"
        "register()\n"
        "assert set(sys.modules) == before and 'vllm' not in sys.modules and 'torch._inductor' not in before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vllm_plugin.SWITCH, "yes")
    with pytest.raises(ValueError, match="LNCOMPILE_VLLM is 'yes'"):
        vllm_plugin.register()


def test_vllm_finds_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"lncompile": "lncompile.engines.vllm_plugin:register"}


def test_a_vllm_that_is_not_known_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(vllm_plugin.SWITCH, "1")
    for name in [name for name in sys.modules if name.startswith("lncompile.engines.vllm_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    vllm_plugin.register()
    (record,) = caplog.records
    assert record.getMessage().startswith("lncompile: not folded: this vLLM is not known")
