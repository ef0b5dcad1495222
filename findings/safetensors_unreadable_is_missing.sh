#!/usr/bin/env bash
# safetensors 0.8.0: safe_open of a file that is there but may not be read (mode 0000, another user's) raises
# FileNotFoundError "No such file or directory", and not PermissionError, as open() of the same file does in the same process.
#
# Seen:
#   open:      PermissionError: [Errno 13] Permission denied
#   safe_open: FileNotFoundError: No such file or directory: ...
#
# So who shares a checkpoint without the right permissions is told to look for a file that is there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.2.6
"$work/venv/bin/python" - "$work/weights.safetensors" <<'PYTHON'
import os, sys
import numpy
from safetensors import safe_open
from safetensors.numpy import save_file

path = sys.argv[1]
save_file({"a": numpy.ones(4)}, path)
os.chmod(path, 0)
if os.geteuid() == 0:  # who may read everything
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
seen = {}
for name, opened in (("open", lambda: open(path, "rb")), ("safe_open", lambda: safe_open(path, "np"))):
    try:
        opened()
        seen[name] = "no error"
    except Exception as error:
        seen[name] = type(error).__name__
        print(f"{name}: {type(error).__name__}: {error}")
assert os.path.exists(path)
assert seen == {"open": "PermissionError", "safe_open": "FileNotFoundError"}, seen
PYTHON
