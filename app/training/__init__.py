"""The training side of the gateway: a worker's client, datasets, the loop. No SQL, no torch."""
