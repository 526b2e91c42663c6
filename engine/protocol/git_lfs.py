"""What Git has in place of a large file that was not fetched, in the directories of both parts."""

POINTER = b"version https://git-lfs.github.com/spec/"  # how such a file begins
