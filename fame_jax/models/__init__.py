"""One file per model; `build` holds the table of them."""
