"""Means, rates and areas under curves, with intervals and p-values. The unit of chance is the question.

Tokens of one answer are alike, and so are answers to one question: what is resampled is always the question, with all
that belongs to it. There is one bootstrap, `resampling.resample`, and one rule for its interval, `percentiles`. Nothing
here knows of models, files or reports.
"""
