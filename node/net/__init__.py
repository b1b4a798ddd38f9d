"""The network of a node: frames, messages, links to peers, and what is fetched from them."""
