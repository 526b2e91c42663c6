"""What the commands that are clients of a server share: its address, and what it asks for."""
