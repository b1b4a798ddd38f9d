"""How the contributions of a round become one: the mean, and means that no few members can drag away.

    api.py       what a mean is, and what it gets to see
    registry.py  names -> means
    shares.py    their arithmetic on weights and norms: numbers, not vectors

Each of the others is one mean. They are for reduce.py, which checks payloads and weights and encodes what
they give. docs/decisions/011-robust-means.md says why there are these.
"""
