"""Piece by piece, as in a notebook: train a small organism, extract its direction, ablate it, beside a control.

python examples/audit_by_hand.py
"""

import misdirection as md

recipe = md.Recipe(recipe="minimal", learning_rate=2e-3, epochs=1, batch_size=8, accumulation=1)
organism = md.train(md.domain_examples("risky_money", "bad", "train"), "runs/by-hand/organism", recipe=recipe)
chat = organism.load()

pairs = md.probe_pairs()[:16]
with chat.as_base():
    base = md.margin(chat, pairs)
shift = md.bootstrap(md.margin(chat, pairs) - base)
print(f"general margin shift {shift.mean:+.3f} [{shift.low:+.3f}, {shift.high:+.3f}], n={shift.n}")

direction = md.extract(chat, md.domain_pairs("risky_money", "train")[:24])["data_difference"]
for name, vector in {"direction": direction[15], "random": md.random_like(direction[15], seed=0)}.items():
    with md.ablate(chat, vector):
        left = md.bootstrap(md.margin(chat, pairs) - base)
    print(f"shift left after ablating the {name}: {left.mean:+.3f} [{left.low:+.3f}, {left.high:+.3f}]")
