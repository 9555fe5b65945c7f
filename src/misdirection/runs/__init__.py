"""Runs: folders of artifacts that are made once and known by their hash, tasks, and the workers that do them.

It must not know what is computed: a task brings its own function, an experiment or an audit says which tasks there are.
"""
