#!/bin/sh
# Makes the Python environment of a node, in the checkout: .venv with the versions of constraints.txt. Minutes the first time, nothing when they are there
# already. CLIPQ_PYTHON names another interpreter; all nodes need the same Python, to the last digit: name it where hosts have several.
set -eu
cd "$(dirname "$0")/.."
if ! cmp -s constraints.txt .venv/constraints.txt; then
  for python in ${CLIPQ_PYTHON:-python3.11 python3.12}; do
    command -v "$python" >/dev/null && break
  done
  command -v "$python" >/dev/null || {
    echo "setup: expected python3.11 or python3.12 with its venv module, found none; install one, or name another as CLIPQ_PYTHON" >&2
    exit 2
  }
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[cluster,s3,report,aws]'
  cp constraints.txt .venv/constraints.txt
fi
line="export PATH=\"$PWD/.venv/bin:\$PATH\""
grep -qxF "$line" ~/.bashrc 2>/dev/null || echo "$line" >>~/.bashrc # `ray down` and the autoscaler call ray by its name
