"""Runs the tests that touch transformers with another version of it, in an environment that is made for that.

    python tests/integrations/in_newest.py [--version 5.24.0] [--directory DIR] [pytest arguments]

The environment sees the packages of the one that runs this, torch and moekernels among them; transformers and what it
needs are installed anew from the package index.
"""

from __future__ import annotations

import argparse
import site
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What runs transformers, and whose result depends on its version.
TESTS = ("integrations", "company", "bench", "cli", "test_docs.py")


def make_environment(directory: Path, requirements: Sequence[str]) -> Path:
    """An environment with these packages, which sees those of this one too. Returns its Python."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
        packages = next(directory.glob("lib/python*/site-packages"))
        # Read after the environment's own packages, so that those win; links to editable installs are followed.
        lines = [f"import site; site.addsitedir({outer!r})" for outer in site.getsitepackages()]
        (packages / "zz_outer.pth").write_text("\n".join(lines) + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", *requirements], check=True)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", help="of transformers; the newest by default")
    parser.add_argument("--directory", type=Path, help="where the environment is made, or is already")
    arguments, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        wanted = f"transformers=={arguments.version}" if arguments.version else "transformers>=5"
        python = make_environment(arguments.directory or Path(temporary) / "environment", [wanted, "kernels", "trl"])
        found = "import transformers; print('transformers', transformers.__version__, flush=True)"
        subprocess.run([python, "-c", found], check=True)
        tests = rest or [str(ROOT / "tests" / name) for name in TESTS]
        return subprocess.run([python, "-m", "pytest", "-q", *tests], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
