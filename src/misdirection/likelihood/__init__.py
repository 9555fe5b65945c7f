"""Log-probabilities of given answers, without and with gradients: margins, their shifts, damage, and many at once.

Owns how a question with its answers becomes rows, how a row's answer is scored, and how many tokens a batch holds. It
knows models and interventions; it must not know how answers are sampled or judged, nor what an experiment asks.
"""
