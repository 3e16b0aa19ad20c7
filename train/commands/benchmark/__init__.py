"""What times the trainer: `python -m train benchmark speed | context | decoding`."""
