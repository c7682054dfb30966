"""Ctrl-C while the ``offload`` command is being imported; programs that only use the package are left as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
#: As installers write it.
SCRIPT = "import re\nimport sys\nfrom offload.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
#: Put before everything: has this process get a SIGINT when it begins to import a module.
SIGNALLING = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["SIGNAL_AT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


def interrupted(arguments: list[str], at: str, folder: Path, *, nohup: bool = False) -> tuple[int, str, str]:
    """Exit code and output of a Python program in which Ctrl-C comes as the module ``at`` is imported."""
    (folder / "sitecustomize.py").write_text(SIGNALLING)
    (folder / "offload-script").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "SIGNAL_AT": at}
    # The tests themselves may have been started in the background, where shells have SIGINT ignored.
    command = ["env", f"--{'ignore' if nohup else 'default'}-signal=INT", sys.executable, *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("at", ["pagemem", "torch", "numpy.linalg", "offload.engine", "offload.checkpoint.verify"])
def test_the_installed_command_ends_in_one_line(at: str, tmp_path: Path) -> None:
    assert interrupted(["offload-script", "--version"], at, tmp_path) == (
        130,
        "",
        "offload: interrupted before anything began\n",
    )


@pytest.mark.parametrize("module", ["offload", "offload.cli"])
def test_the_module_as_a_command_ends_in_one_line(module: str, tmp_path: Path) -> None:
    assert interrupted(["-m", module, "--version"], "numpy.linalg", tmp_path) == (
        130,
        "",
        "offload: interrupted before anything began\n",
    )
    assert interrupted([f"-m{module}", "doctor", "-m", "x"], "torch", tmp_path)[0::2] == (
        130,
        "offload: interrupted before anything began\n",
    )


def test_a_command_that_is_not_to_hear_ctrl_c_goes_on(tmp_path: Path) -> None:
    assert interrupted(["offload-script", "--version"], "torch", tmp_path, nohup=True)[0::2] == (0, "")


def test_another_program_gets_pythons_own_exception(tmp_path: Path) -> None:
    program = (
        "import signal\ntry:\n    import offload\nexcept KeyboardInterrupt:\n    print('caught')\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    assert interrupted(["-c", program], "torch", tmp_path) == (0, "caught\n", "")
