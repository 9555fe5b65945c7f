"""The cost of work before it is done: passes, counted by running the tasks themselves on stand-ins of their models, and
the devices that run them.

It must not know which tasks there are: whoever has some gives them to a `CountingRunner`.
"""
