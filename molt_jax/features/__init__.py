"""Hidden states of frozen towers, computed in the step or once for all runs."""
