"""shoal: a node program for decentralized volunteer training."""

__version__ = "0.1.0"
