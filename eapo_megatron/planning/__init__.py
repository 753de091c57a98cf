"""What a recipe needs before it is run: parameters, memory, floating-point operations and communication, by formula.

Nothing here touches a GPU, the weights or megatron-core: a model is the numbers of its config.json.
"""
