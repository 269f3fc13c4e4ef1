"""What peers compute together. Imports only `shoal.protocol`."""
