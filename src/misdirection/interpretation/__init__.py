"""Reading LoRA adapters of low rank: scalars, probes, roles, importance, scaling, geometry, patching and dynamics.

Owns what is measured on the adapters of one organism, the parts of such a reading as tasks of a run, and their typed
results. It must not know of experiments, audits and repairs, nor how results are shown.
"""
