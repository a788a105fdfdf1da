"""Engines that train: one behind `base.Trainer` each."""
