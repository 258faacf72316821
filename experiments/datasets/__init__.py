"""Builders of data sets from packages: `build(cache) -> (examples, text of the licence)`."""
