"""Several processes that serve one model: how they are started, watched and ended, and what they say to each other."""
