"""What happens with 1 to 1,000 replicas behind Envoy: a simulation with discrete events.

It knows what a replica's step takes and what Envoy and a service take per request and token, as
they were measured (`costs.json`, made by `calibrate.py`), and nothing of the code of the server.

    python -m benchmarks.simulation                      # the figures
    python -m benchmarks.simulation --plot docs/scaling  # and their plots
"""
