"""A trained classifier behind HTTP, with a page to try it; needs the extra `serve`."""
