"""ROOM 7. The engine, the tables and the adapter store."""
