"""LoRA adapters: small additions to the weights of a model's linear layers, chosen by request.

`peft_directory.py` reads them, `adapted_layers.py` makes places for them beside the model's layers,
`low_rank.py` computes them, `bank.py` knows which are loaded and which are on the device,
`loader.py` reads more of them while the engine runs, `adapted_forward.py` says in each step which
rows they are for.
"""
