"""The service: everything textual, and everything on the wire. It never touches the device."""
