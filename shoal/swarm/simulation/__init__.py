"""Simulated network, clock and peers: the same decision code as the daemon, replayed exactly from a seed."""
