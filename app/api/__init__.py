"""ROOM 1. HTTP in, HTTP out: parse, authenticate, call one function, shape the reply."""
