"""Pictures and pages, drawn from typed results alone.

A page is registered in `results.PAGES` under the kind of its result, a figure of a run in `figures.FIGURES`. The room
must not know how results are computed, and measures nothing.
"""
