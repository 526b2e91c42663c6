"""Traces: what was noted of a call becomes spans of OpenTelemetry, which go to a collector.

Nothing here runs, and no module of OpenTelemetry is imported, unless traces are asked for.
"""
