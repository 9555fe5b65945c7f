"""The paper's experiment: its configuration, its texts, its stages, and its results as typed models.

A stage (`experiment.STAGES`) says what work there is and what figures come of it; where and in which process the work
is done is `runs`' business. It must not know how results are shown, nor of audits and repairs.
"""
