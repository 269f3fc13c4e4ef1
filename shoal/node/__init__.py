"""What a person runs: command line, daemon, demo. Imports all other folders; nothing imports it."""
