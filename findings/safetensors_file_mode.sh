#!/usr/bin/env bash
# safetensors 0.8.0 (CPython 3.11, Linux): save_file makes files that only their owner can read (mode 0600), whatever the
# umask is; a file that was there with mode 0644 becomes 0600 as well. Up to 0.7.0 the umask decides, as with open().
#
# Seen, with umask 022:
#   safetensors 0.7.0: new file 0o644, over a file of 0o644: 0o644
#   safetensors 0.8.0: new file 0o600, over a file of 0o644: 0o600
#
# So a checkpoint saved to a shared folder can no longer be read by colleagues, nor by a server that runs as another user.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
umask 022
seen=""
for version in 0.7.0 0.8.0; do
  "$work/venv/bin/pip" install --quiet "safetensors==$version" numpy==2.2.6
  line=$("$work/venv/bin/python" - "$work" <<'PYTHON'
import os, sys
import numpy, safetensors
from safetensors.numpy import save_file

def mode(name):
    path = os.path.join(sys.argv[1], safetensors.__version__ + name)
    if name == "old":
        open(path, "w").close()
    save_file({"a": numpy.ones(4)}, path)
    return oct(os.stat(path).st_mode & 0o777)

print(f"safetensors {safetensors.__version__}: new file {mode('new')}, over a file of 0o644: {mode('old')}")
PYTHON
  )
  echo "$line"
  seen+="$line;"
done
[ "$seen" = "safetensors 0.7.0: new file 0o644, over a file of 0o644: 0o644;safetensors 0.8.0: new file 0o600, over a file of 0o644: 0o600;" ]
