"""The playground: one question, put to base and organism, each plain and under interventions, on a local page.

Owns the page and its server, which nobody but this machine reaches. It samples, measures and reads by the owners of
these, and knows no verdict.
"""
