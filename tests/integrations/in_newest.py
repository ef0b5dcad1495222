"""Runs these tests with another version of transformers, in an environment that is made for it.

    python tests/integrations/in_newest.py [--version 5.23.0] [--directory DIR] [pytest arguments]

The environment sees the packages of the one that runs this (torch among them); only transformers and what it needs are
installed anew, from the package index.
"""

from __future__ import annotations

import argparse
import os
import site
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make_environment(directory: Path, requirements: Sequence[str]) -> Path:
    """An environment with these packages, which sees those of this one too. Returns its Python."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
        packages = next(directory.glob("lib/python*/site-packages"))
        # After the environment's own packages, so that those win.
        (packages / "zz_outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", *requirements], check=True)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", help="of transformers; the newest by default")
    parser.add_argument("--directory", type=Path, help="where the environment is made, or is already")
    arguments, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        wanted = f"transformers=={arguments.version}" if arguments.version else "transformers>=5"
        python = make_environment(arguments.directory or Path(temporary) / "environment", [wanted, "kernels"])
        # The newest transformers warns of what is newer still.
        command = [python, "-m", "pytest", "-W", "ignore", "-q", *(rest or ["tests/integrations"])]
        import moekernels

        path = os.pathsep.join([str(Path(moekernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main())
