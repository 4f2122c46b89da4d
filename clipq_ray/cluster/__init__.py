"""Where work runs: the engine interface, its in-process twin, and Ray. The one package that imports ray."""

import os

# Else a call of Ray's from a thread that has outlived an interrupt starts another Ray, on this machine, behind the shutdown of the first. Ray reads it when imported.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
