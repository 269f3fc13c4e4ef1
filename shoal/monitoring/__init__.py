"""What people watch: projections of the typed event stream. Imports only `shoal.protocol.events`."""
