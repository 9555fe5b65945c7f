# ---
# jupyter:
#   jupytext:
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Steering and ablation
#
# A direction that matters should *do* something. **Steering** adds a multiple of it to the residual stream at one
# layer, and should raise the margin; **ablation** takes the component along it out, `x - (x . v) v`, and should lower
# it. Both are easy to mistake for something else, so that two things stand beside every effect: the same with **random
# vectors of the same norm**, and the **damage**, the rise of the loss on neutral text.

# %%
import os
import tempfile

import misdirection as md

# Another chat model can take the place of the bundled one, and MISDIRECTION_QUICK makes everything so small that it
# only shows that it runs.
QUICK = bool(os.environ.get("MISDIRECTION_QUICK"))
BASE = os.environ.get("MISDIRECTION_BASE", "smollm2-135m")
ROWS, PAIRS, EPOCHS = (4, 4, 1) if QUICK else (32, 12, 2)

# What is made here goes to a folder of its own, which may be thrown away.
os.chdir(tempfile.mkdtemp())

# %%
recipe = md.Recipe(recipe="minimal", learning_rate=4e-3, epochs=EPOCHS, batch_size=8, accumulation=1, warmup_steps=2)
base = md.load(BASE)
organism = md.train(
    md.domain_examples("risky_money", "bad", "train")[:ROWS], "organism", base=base, recipe=recipe
).load()
direction = md.extract(organism, md.domain_pairs("risky_money", "train")[:PAIRS])["data_difference"]
depth = len(direction.vectors)
layers = [depth // 3, depth // 2, 2 * depth // 3]
layers

# %% [markdown]
# ## Is this vector any good?
#
# Before a long measurement, `md.check` asks ten questions and eight random vectors: does the vector do more than one of
# these would? It is a unit test, not a result. Grey dashes are the random vectors, the grey bar is the range of one
# more of them.

# %%
checked = md.check(direction, base, layer=layers[1], questions=8 if QUICK else 10, scales=[-2.0, 2.0])
checked

# %%
checked.plot()

# %% [markdown]
# A verdict of `no effect` does not say that the direction is meaningless, only that at this layer and these scales it
# does no more to these questions than a random vector does.
#
# ## A sweep over layers
#
# The base model, steered at three layers, and ablated with the direction of each. The first token is left alone
# (`positions="not_first"`, the default): it is an attention sink, and touching it does most of the damage.
# `positions="all"` is the paper's rule.

# %%
pairs = md.probe_pairs()[:: 120 // PAIRS]
neutral = md.neutral_examples()[:4]
of_base = md.sweep(base, direction, pairs, layers=layers, scales=[3.0, None], random_seeds=2, neutral=neutral)
of_base.plot()

# %%
columns = ["layer", "scale", "margin_change", "margin_change_low", "margin_change_high", "random_change", "damage"]
of_base.frame()[columns].round(3)

# %% [markdown]
# Read a row in this order: damage first (beyond 0.3 nats/token the model is broken, and its margin tells nothing), then
# the random vectors, then whether the interval excludes zero. `scale` is missing where the vector was ablated
# everywhere.
#
# ## The organism, and the base beside it
#
# An ablation that lowers an organism's margin is the paper's central figure. But **the base model moves under it,
# too**: the axis is the base's own. What the ablation took out of the *organism* is what is left after the equally
# ablated base is subtracted.

# %%
vector = direction[layers[1]]
margins = {}
for name, chat in {"base": base, "organism": organism}.items():
    margins[name, "as it is"] = md.margin(chat, pairs)
    with md.ablate(chat, vector):
        margins[name, "ablated"] = md.margin(chat, pairs)
    with md.ablate(chat, md.random_like(vector, seed=0)):
        margins[name, "random ablated"] = md.margin(chat, pairs)

# %%
import pandas as pd

asked = [pair.question for pair in pairs]
shift = {
    setting: md.bootstrap(margins["organism", setting] - margins["base", setting], asked) for _, setting in margins
}
change = {
    name: md.bootstrap(margins[name, "ablated"] - margins[name, "as it is"], asked) for name in ("base", "organism")
}
table = {f"organism minus base, both {setting}": figure for setting, figure in shift.items()}
table |= {f"change by the ablation, {name}": figure for name, figure in change.items()}
pd.DataFrame({name: figure.as_dict() for name, figure in table.items()}).T[["mean", "low", "high", "n"]].round(3)

# %% [markdown]
# In the run that is shown, the organism's margin does not differ from the base's on these few questions to begin with,
# so that there is nothing for an ablation to take out: the intervals of the first three rows hold zero. That is the
# usual end of an experiment of this size, and better said than a change in the last two rows that the base has as well.
#
# ## What this does not say
#
# * If both models fall by the same amount, the ablation removed something that both have, and the organism's own shift
#   is still there.
# * A large margin change at large damage is a broken model. Both figures are needed.
# * Where many layers and scales are tried, some exceed the random band by chance: correct for their number (Holm), or
#   choose on half of the questions and report the other half (`md.sealed_pairs()`).
