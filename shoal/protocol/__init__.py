"""What peers agree on and say. Imports nothing from the other folders."""
