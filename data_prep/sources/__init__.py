"""Where clips come from. `base` says what a source is; there is one module per kind of input."""
