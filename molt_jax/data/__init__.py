"""From files to batches: sources, transforms, missing-modality protocol, the Grain pipeline."""
