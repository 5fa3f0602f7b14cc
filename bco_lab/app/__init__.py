"""The command line: compose a config, make a run directory, launch, and show what came out."""
