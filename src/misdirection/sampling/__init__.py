"""Sampled answers: question sets, engines, draws, and the tables and journals that answers are kept in.

Owns what is asked, how a token is drawn, and what a table of answers looks like. It knows models and interventions; it
must not know how answers are judged, nor which experiment wants them. vLLM stands in a folder of its own.
"""
