"""What crosses the process boundary: requests, outcomes, configuration and errors of an engine.

It knows neither torch nor any model, so that a service imports it at no cost.
"""
