"""Who may come in: API keys and certificates, in files that are read again when they change.

It knows neither calls nor settings.
"""
