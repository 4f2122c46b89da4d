"""Where work runs: the engine interface, its in-process twin, and Ray. The one package that imports ray."""
