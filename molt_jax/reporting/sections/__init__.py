"""The sections of a page, by what they are about."""
