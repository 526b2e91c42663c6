"""`python -m service.text_worker`: the process for long texts, without torch.

transformers imports torch where it is installed, and would need five times the memory with it; no
tokenizer needs it. None in place of a module means to Python that there is no such module.
"""

import os
import sys

os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that there is no torch
sys.modules["torch"] = None  # type: ignore[assignment]

from .codec.text_worker import start  # noqa: E402
from .workers.serving import serve  # noqa: E402

if __name__ == "__main__":
    serve(start)
