"""The durable queue. It knows what a job is, and nothing of what one does."""
