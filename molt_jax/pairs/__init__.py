"""A pair of towers with projection heads: contrastive training, retrieval and probes."""
