"""The families: one folder for each kind of replacement, all with the same interface (`family.Family`)."""
