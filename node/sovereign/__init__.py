"""What a member makes of the shared base for itself. Nothing of it is contributed back.

    recipe.py      how a derivative is made: the keys of a recipe file, declared once
    derivative.py  HOME/derivatives: what was made of what, how, and which version counts
    rows.py        a member's rows (text, pairs, preferences) -> token ids, some of them held out
    training.py    one stage by trl and peft, resumable
    losses.py      held-out loss of a model
    suite.py       what `evaluate` runs beside it: sets of one's own, lm-eval's tasks, commands
    gates.py       whether a version takes the place of the one before, and why not
    transplant.py  numbers only: a difference brought onto another base; task vectors, TIES, DARE
    build.py       derive, evaluate, rebase, merge: the order of the steps, and nothing else
    standing.py    whether the data may still be used, asked at every step
    release.py     a derivative as a Hugging Face directory with a card

A command of cli/sovereign.py calls build.py; build.py calls the others; none of them calls build.py. The base
comes from lineage/export.py, which reads any epoch that the home can still make, beside a running node or
without one.
"""
