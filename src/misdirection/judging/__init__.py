"""Judges and what they say: rubrics, verdicts and their cache, scores, and how well two judges agree.

Owns the registry of judges (`judges.py`), what is asked of one, how a reply is read, which verdicts were paid for, and
how judged answers become rates. It takes tables of answers as they are: it must not know how answers are sampled by an
experiment, nor what a rate is held against.
"""
