"""What a finished run is written as: one file, programs of StableHLO, a repository of the hub."""
