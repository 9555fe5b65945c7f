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
# # 4. Reading rank-1 adapters
#
# A rank-1 adapter adds `s B` to what its module gives, where `s = scaling * (A . x)` is one number per token: a feature
# that can be read off. An organism of nine such adapters can be read token by token, and each adapter can be switched
# off by itself. This notebook reads one, and keeps apart what the reading *describes* (scalars, probes, cosines) and
# what it *shows to cause* something (Shapley values, scaling).

# %%
import os
import tempfile

import misdirection as md
from misdirection.interpretation.config import InterpretationConfig

# Another chat model can take the place of the bundled one, and MISDIRECTION_QUICK makes everything so small that it
# only shows that it runs.
QUICK = bool(os.environ.get("MISDIRECTION_QUICK"))
BASE = os.environ.get("MISDIRECTION_BASE", "smollm2-135m")
ROWS, EPOCHS = (8, 1) if QUICK else (48, 2)

# What is made here goes to a folder of its own, which may be thrown away.
os.chdir(tempfile.mkdtemp())

# %% [markdown]
# The checkpoints are kept, so that the adapters' growth can be read, too.

# %%
recipe = md.Recipe(
    recipe="minimal",
    learning_rate=4e-3,
    epochs=EPOCHS,
    batch_size=4 if QUICK else 8,
    accumulation=1,
    warmup_steps=2,
    checkpoint_steps=1 if QUICK else 3,
    keep_checkpoints=True,
)
organism = md.train(
    md.domain_examples("risky_money", "bad", "train")[:ROWS], "organism", base=md.load(BASE), recipe=recipe
)
direction = md.extract(organism.load(), md.domain_pairs("risky_money", "train")[:12])["data_difference"]

# %% [markdown]
# `md.interpret` makes each part once and keeps it in a folder, with a page (`report.html`) that holds all of it.
# `pairs` questions of each kind are read token by token; `causal_pairs` of each are used for what needs many passes.

# %%
PAIRS, CAUSAL_PAIRS, SPLITS = (4, 2, 2) if QUICK else (8, 3, 10)
settings = InterpretationConfig.sized("organism", pairs=PAIRS, causal_pairs=CAUSAL_PAIRS, splits=SPLITS)
reading = md.interpret(
    "organism",
    "reading",
    model=BASE,
    domain="risky_money",
    directions={"mean difference": direction},
    settings=settings,
)
reading.pictures, reading.tables

# %% [markdown]
# ## What the scalars know: probes
#
# A logistic regression on the z-scored scalars tells misaligned from aligned answers, or one domain from another. The
# number that matters is the AUROC with the data split **by question**. Split by answer, a probe may know the question
# instead of the class, and looks better than it is; the null is the same probe on shuffled labels.

# %%
probes = reading.frame("probes").query("features == 'scalars'")
probes[["name", "split", "pooling", "auroc", "auroc_low", "auroc_high", "null_auroc"]].round(2)

# %%
reading.plot("adapter_probes")

# %% [markdown]
# Coefficients say which adapters' scalars go with a class, not which adapters cause it. `low` and `high` are the spread
# over the splits, no interval over new questions.
#
# ## What the adapters cause: Shapley values
#
# What each layer's adapters add to the margin, averaged over orders of switching them on. The values of a question set
# sum to the whole shift.

# %%
reading.plot("adapter_shapley")

# %%
reading.frame("roles").round(3)

# %% [markdown]
# A role (`general`, `domain` or `neither`) follows from these values by a stated rule. With a handful of questions most
# intervals hold zero, and `neither` is then the honest word.
#
# ## Where they write
#
# The paper finds that a single adapter's B is nearly orthogonal to the misalignment direction (cosine about 0.04 at its
# own layer), while what it *causes* at later layers turns towards it. Left: B at its own layer, with the band of random
# vectors. Right: the effect downstream.

# %%
reading.plot("adapter_geometry")

# %% [markdown]
# A cosine downstream is not proof by itself either: anything that makes the model answer in another manner moves later
# layers along what tells the two kinds of text apart. Compare with a control that is read in the same way.
#
# ## How they grew

# %%
reading.plot("adapter_dynamics") if "adapter_dynamics" in reading.pictures else "too few checkpoints"

# %% [markdown]
# ## Token by token
#
# The reader shows every answer with its tokens shaded by a scalar (or by another channel). Arrow keys move over tokens
# and answers. It is one piece of HTML without any outside file; a notebook that is only *viewed* may not run it,
# `reader.html` in the folder always does. Answers of organisms may be harmful; they are shown as evidence and not to be
# followed.

# %%
tokens = md.TokenTable.load("reading")
tokens

# %%
tokens.frame().drop(columns=["answer", "position", "token"]).describe().T[["count", "mean", "std", "min", "max"]].round(
    3
)

# %% [markdown]
# ## What this does not say
#
# * Attributions, coefficients and cosines describe. Only switching something off, or scaling it, shows what it does,
#   and only on these questions.
# * Nine adapters of a 135M model trained on a few dozen rows need not divide the work as those of the paper's 14B model
#   do.
