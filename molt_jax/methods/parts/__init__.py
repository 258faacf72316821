"""Parts that methods are built of."""
