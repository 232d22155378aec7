"""Choosing a backend, checking arguments, registering operators: what every call goes through."""
