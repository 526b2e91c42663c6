"""Who may come in: API keys and certificates, in files that are read again when they change.

And which hosts the server itself may ask for images.

It knows neither calls nor settings.
"""
