"""The runtime: requests, scheduling, the paged KV cache and sampling."""
