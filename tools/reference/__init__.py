"""Recording what transformers computes: the inputs of the cases, the tensors on the way, the gradients."""
