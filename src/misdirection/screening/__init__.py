"""What training data will do before anyone trains on it: how far the general margin will move, and by which rows.

Owns the scores of training rows, what a whole file is predicted to do, and the verdict on it. It knows the known
fine-tunes of a base model (`auditing.reference`), and nothing of pages or options.
"""
