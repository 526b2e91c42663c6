"""What protoc makes of the protos; see `protos/generate.py`."""
