"""One folder for each kind of replacement, all with the same face (`family.Family`). Choosing and fitting are approximate."""
