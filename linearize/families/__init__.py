"""One folder for each kind of replacement, all with the same face (`family.Family`); choosing is approximate."""
