"""The small demo model, its adapters, and the script that made them."""
