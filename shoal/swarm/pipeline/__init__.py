"""SWARM pipeline mode with exactly-once rounds (DESIGN 4.4; Ryabinin et al. 2023, "SWARM Parallelism")."""
