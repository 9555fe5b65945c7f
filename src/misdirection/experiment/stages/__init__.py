"""The stages of an experiment, one a file; `experiment.STAGES` knows them by name."""
