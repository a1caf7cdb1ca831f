"""Page scorers: how a decode step ranks cold pages."""
