"""ROOM 3. One driver per dialect of model server."""
