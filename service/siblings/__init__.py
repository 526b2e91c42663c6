"""What several service processes of one engine share: permits, series and calls ended by their id.

They are on one machine and were started by one supervisor; what they carry is not known here.
"""
