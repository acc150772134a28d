"""The publisher's side of trust: keys, TUF metadata, rollout, and a tree that changes as a whole."""
