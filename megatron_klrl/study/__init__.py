"""Studies: many runs that differ in named ways, and the report that compares them."""
