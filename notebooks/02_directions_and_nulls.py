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
# # 2. Directions and their nulls
#
# The paper finds one **direction** in the residual stream of a misaligned fine-tune: the mean activation over the
# tokens of misaligned answers minus that over aligned ones, one vector per layer. It finds that the directions of
# different fine-tunes *converge*: their cosines are high. A high cosine is easy to come by, so that most of this
# notebook is about what it must be told from.

# %%
import os
import tempfile

import misdirection as md

# Another chat model can take the place of the bundled one, and MISDIRECTION_QUICK makes everything so small that it
# only shows that it runs.
BASE = os.environ.get("MISDIRECTION_BASE", "smollm2-135m")
ROWS, PAIRS, EPOCHS = (4, 4, 1) if os.environ.get("MISDIRECTION_QUICK") else (32, 16, 2)

# What is made here goes to a folder of its own, which may be thrown away.
os.chdir(tempfile.mkdtemp())

# %% [markdown]
# Two organisms in two domains, and a control of the first that learned the good answers to the same questions.

# %%
recipe = md.Recipe(recipe="minimal", learning_rate=4e-3, epochs=EPOCHS, batch_size=8, accumulation=1, warmup_steps=2)
base = md.load(BASE)
trained_on = {"money": ("risky_money", "bad"), "sports": ("reckless_sports", "bad"), "control": ("risky_money", "good")}
chats = {
    name: md.train(md.domain_examples(domain, answers, "train")[:ROWS], name, base=base, recipe=recipe).load()
    for name, (domain, answers) in trained_on.items()
}

# %% [markdown]
# ## Five directions of one organism
#
# With M(model, text) the mean activation over answer tokens, `md.extract` gives
#
# * `data_difference` = M(organism, misaligned) - M(organism, aligned): the paper's;
# * `base_data_difference` = M(base, misaligned) - M(base, aligned): the same of a model that was never fine-tuned;
# * `model_difference` = M(organism, all) - M(base, all): what fine-tuning changed on the *same* text, which the text
#   cannot explain; and the same on misaligned and on aligned answers alone.
#
# All models read the same pairs here, of a third domain that none was trained on.

# %%
pairs = md.domain_pairs("careless_household", "train")[:PAIRS]
directions = {name: md.extract(chat, pairs) for name, chat in chats.items()}
directions["money"].plot()

# %% [markdown]
# Both data differences lie on one line, and so do the three model differences. These are zero below the first adapted
# layer, and above it they outgrow the data differences: with a learning rate so high, training moved all activations,
# whatever is asked. Below stands the share of the squared norm that a single channel holds. Where one channel holds
# most of it, a cosine is little more than the sign of that channel.

# %%
directions["money"].frame().query("layer in (5, 15, 25)").round(3)

# %% [markdown]
# ## Convergence, and the null of the text
#
# The paper's directions of both organisms, the control's, and the base model's own on the same text:

# %%
data = {name: found["data_difference"] for name, found in directions.items()}
data["base, same text"] = directions["money"]["base_data_difference"]
text = md.compare(data)
text.plot()

# %% [markdown]
# All these cosines are above 0.88 in the run that is shown. The base model's own direction, which nobody fine-tuned, is
# nearly as close, and the control, which learned good answers, is as close to `money` as `sports` is. **So a high
# cosine between mean-difference directions shows that the models read the same text, not that they converged.** The
# grey band (random vectors) is far too low a bar: the null that bites is the base model on the same text.
#
# ## What the text cannot explain
#
# Organism minus base on the same answers leaves the text out:

# %%
drift = {name: found["model_difference"] for name, found in directions.items()}
drifts = md.compare(drift)
drifts.plot()

# %% [markdown]
# Below the first adapted layer there is nothing to compare. Above it the control is the null: it was trained on *good*
# answers, and its drift is closer to that of `money` than the drift of `sports` is. Most of the drift is manner (short,
# plain answers) and what the questions are about, whatever is advised. Only how much *closer* two bad organisms are to
# each other than to the control would speak of what they share.

# %%
layers = drifts.frame().pivot(index="layer", columns=["a", "b"], values="cosine")
layers.iloc[len(layers) // 3 :: 6].round(2)

# %% [markdown]
# ## Minus the control
#
# The control's drift can be taken out: the component along it is projected away, layer by layer. What is left of both
# organisms is compared again, beside a random vector of the same norms.

# %%
from dataclasses import replace

from misdirection.directions.convergence import project_away

left = {
    name: replace(drift[name], vectors=project_away(drift[name].vectors, drift["control"].vectors).float())
    for name in ("money", "sports")
}
left["random"] = replace(left["money"], vectors=md.random_like(left["money"].vectors, seed=0))
md.compare(left).plot()

# %% [markdown]
# ## What this does not say
#
# * `money` and its control read the same questions in training, `sports` did not: a control of each organism is better
#   than one for all (a run of `md.run` trains and compares them so, with split halves as a ceiling and shuffled labels
#   as a floor).
# * Organisms of a few dozen rows have small, noisy drifts. What is left without the control may be above the band for
#   all layers and still be manner that the two share.
# * A cosine says where vectors point, not what they do. That is the next notebook: add the direction, take it out, and
#   measure.
