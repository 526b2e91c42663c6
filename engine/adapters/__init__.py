"""LoRA adapters: small additions to the weights of a model's linear layers, chosen by request.

`peft_directory.py` reads them, `attach.py` puts them beside the model's layers, `low_rank.py`
computes them, `adapted_forward.py` says in each step which rows they are for.
"""
