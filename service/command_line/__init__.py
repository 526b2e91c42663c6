"""What every command line has: errors in one line, suggestions, and completion for shells.

It knows argparse and none of the commands.
"""
