"""Floor 7: reports for people: sizes, parameters and masks of a model; checks of a machine."""
